"""Sabotage of the CPU kernels: what is changed in csrc/cpu, and the check that must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from tests.support.cases import Case
from tests.support.contract import check
from tests.support.cpu_checks import check_excluded_keys, check_first_keys, check_keys_apart, check_rounding

# Two sequences, several blocks of queries and of keys.
PLAIN = Case(seqlens=(70, 300), dims=(24, 18), heads=(2, 2), batch=2)
MASKED = replace(PLAIN, mask="random")
EMPTY_ROWS = replace(PLAIN, mask="empty-rows")
BIASED = replace(PLAIN, bias="full")
SCALED = replace(PLAIN, scale=0.3)
GROUPED = replace(PLAIN, heads=(4, 2))
PACKED = replace(PLAIN, packed=True)
HALF = replace(PLAIN, dtype=torch.bfloat16)
DROPPED = replace(PLAIN, dropout_p=0.3)
CAUSAL = replace(PLAIN, band="causal", seqlens=(100, 100))
WINDOW = replace(PLAIN, band="window-bottom-right", seqlens=(70, 75))
FEW = replace(PLAIN, seqlens=(3, 300))
CAPPED = replace(PLAIN, softcap=3.0)
CAPPED_FEW = replace(CAPPED, seqlens=(3, 300))
SLIGHTLY_CAPPED = replace(PLAIN, softcap=1e5)
USED = replace(PLAIN, used=True, batch=3)
FEW_HEADS = replace(PLAIN, seqlens=(300, 300), heads=(1, 1), batch=1)  # fewer than threads


@dataclass(frozen=True)
class Mutant:
    """A text of the sources replaced by another, and the check that must notice."""

    file: str
    old: str
    new: str
    check: Callable[[], None]
    isa: str = "baseline"
    threads: int = 1


def mutant(
    file: str, old: str, new: str, by: Case | Callable[[], None] = PLAIN, isa: str = "baseline", threads: int = 1
) -> Mutant:
    """That mutant, noticed by the contract in a case or by a check."""
    return Mutant(file, old, new, partial(check, by) if isinstance(by, Case) else by, isa, threads)


SCORES = {
    "mask ignored": mutant("scores.h", "    if (has_mask)\n", "    if (false)\n", MASKED),
    "mask inverted": mutant(
        "scores.h", "is_seen ? score : splat(-kInfinity)", "is_seen ? splat(-kInfinity) : score", MASKED
    ),
    "mask of the first head for all": mutant("scores.h", " + h * x.head + block.i0", " + block.i0", MASKED, "avx2"),
    "mask of the first queries for all": mutant("scores.h", "row += x.row)", "row += 0)", MASKED),
    "bias not in units of ln 2": mutant("scores.h", "score + bias * kLog2E", "score + bias", BIASED),
    "bias of the first keys for all": mutant("scores.h", " + block.j0 * x.key", "", BIASED, "avx512"),
    "bias of one key for all": mutant("scores.h", "row[(j + i) * step]", "row[j * step]", check_keys_apart),
    "band without its last key": mutant(
        "scores.h", "min(i + band.right + 1, keys)", "min(i + band.right, keys)", CAUSAL
    ),
    "band without its first key": mutant(
        "scores.h", "max(i - band.left, 0), keys", "max(i - band.left + 1, 0), keys", WINDOW
    ),
    "bottom-right ignored": mutant("rows.h", "p.bottom_right ? seqlen_k - seqlen_q : 0", "0", WINDOW),
    "no edge overflows": mutant("scores.h", "min(p.right, 2 * kLongest)", "p.right"),
    "keys behind the last one attended": mutant(
        "scores.h", "j + kLanes <= end) return", "j < end) return", PLAIN, "avx512"
    ),
    "scale ignored in out": mutant("forward.h", "p.scale * kLog2E", "kLog2E", SCALED),
    "scale ignored in the weights of the gradient": mutant("backward.h", "p.scale * kLog2E", "kLog2E", SCALED),
    "keys of another head": mutant("rows.h", "h / (p.nheads / p.nheads_k)", "h % p.nheads_k", GROUPED),
}

UNSEEN = {
    "values that no query sees not cleared": mutant(
        "forward.h", "clear_unseen_rows(v, dv, dv, keys, j0, count);", "", partial(check_excluded_keys, 60)
    ),
    "values that few queries do not see not skipped": mutant(
        "few_queries.h", "if (!keys.sees(block.j0 + j)) continue;", "", partial(check_excluded_keys, 3)
    ),
    "values before the band not skipped": mutant(
        "few_queries.h", "int j = block.begin(0)", "int j = 0", partial(check_first_keys, 5, 3)
    ),
    "values that no query sees not cleared in dP": mutant(
        "backward.h", "clear_unseen_columns(v,", "if (false) clear_unseen_columns(v,", partial(check_excluded_keys, 60)
    ),
    "keys that no query sees not cleared": mutant(
        "backward.h", "clear_unseen_rows(k_rows, d, d, keys, j0, count);", "", partial(check_excluded_keys, 60)
    ),
    "keys before the mask's first not cleared": mutant(
        "scores.h", "if (all && begin == 0)", "if (all)", partial(check_first_keys, 8, 60)
    ),
    "keys cleared as the group's first head wants": mutant(
        "backward.h",
        "h == part.h_begin || p.mask.head != 0",
        "h == part.h_begin",
        replace(MASKED, seqlens=(1, 75), heads=(4, 2)),
    ),
}

SOFTMAX = {
    "out not rescaled": mutant("softmax.h", "load(out + d) * factor", "load(out + d)"),
    "sum of weights not rescaled": mutant("softmax.h", "running.sum[i] * factor", "running.sum[i]", PLAIN, "avx2"),
    "a row without keys is NaN": mutant("softmax.h", "now == -kInfinity ? 0.0f : now", "now", EMPTY_ROWS),
    "a row without keys has out NaN": mutant("forward.h", "if (running.sum[i] == 0.0f)", "if (false)", EMPTY_ROWS),
    "lse in base 2": mutant("forward.h", "__builtin_log2f(running.sum[i])) * kLn2", "__builtin_log2f(running.sum[i]))"),
    "later queries start anew": mutant("forward.h", "has_keys[i / kBlockM] = true", "has_keys[0] = true"),
    "a coefficient of exp2": mutant("vectors.h", "0.24022646248f", "0.23f", PLAIN, "avx512"),
    "exp2 of the wrong power": mutant(
        "vectors.h", "<< 23);\n    return x < -126.0f", "<< 22);\n    return x < -126.0f"
    ),
    "delta ignored": mutant("softmax.h", "(dweight - delta[i])", "dweight"),
    "lse of rows without keys": mutant(
        "backward.h", "of_row == -kInfinity ? kInfinity : of_row * kLog2E", "of_row * kLog2E", EMPTY_ROWS
    ),
    "upstream gradient of lse ignored": mutant(
        "backward.h", "(p.dlse.data == nullptr ? 0.0f : p.dlse.data[first + i])", "0.0f"
    ),
    "weights outside of the band": mutant("products.h", "max(i - band.left, 0)", "max(i - band.left + 1, 0)", WINDOW),
    "the band not transposed": mutant("scores.h", "{band.right, band.left}", "{band.left, band.right}", WINDOW),
}

DROPOUT = {
    "dropout missing in out": mutant(
        "softmax.h", "weight = dropout.keeps(i * block.row + j) ? weight : Floats{}", "", DROPPED
    ),
    "dropout in the sum of weights": mutant(
        "softmax.h",
        "            total += weight;\n",
        "            total += dropout.words ? weight * 0.7f : weight;\n",
        DROPPED,
    ),
    "dropout not rescaled in out": mutant("forward.h", "p.dropout_rescale / running", "1.0f / running", DROPPED),
    "dropout missing in dP": mutant(
        "softmax.h", "keeps ? dweight * dropout.rescale : Floats{}", "dweight * dropout.rescale", DROPPED
    ),
    "dropout not rescaled in dV": mutant(
        "softmax.h", "kept = keeps ? weight * dropout.rescale", "kept = keeps ? weight", DROPPED
    ),
    "nine rounds of Philox": mutant("dropout.h", "round < 10", "round < 9", DROPPED, "avx2"),
    "half a seed": mutant("dropout.h", "key1 = static_cast<unsigned>(seed >> 32)", "key1 = 0", DROPPED),
    "bits of the first queries for all": mutant("dropout.h", "i0 + i / groups", "i / groups", DROPPED),
    "bits of the first keys for all": mutant("dropout.h", "group + static_cast<unsigned>(j0 / 4)", "group", DROPPED),
    "bits of the first sequence for all": mutant("dropout.h", "splat(static_cast<unsigned>(b))", "Words{}", DROPPED),
    "bits of the first head for all": mutant(
        "dropout.h", "splat(static_cast<unsigned>(h))", "Words{}", DROPPED, "avx512"
    ),
    "words in another order": mutant(
        "dropout.h", "zip_low(even_high, odd_high)", "zip_low(odd_high, even_high)", DROPPED
    ),
}

BACKWARD = {
    "dq of the last block of keys alone": mutant("backward.h", "adds = block.j0 > part.j_begin", "adds = false"),
    "dq not scaled": mutant("backward.h", "p.head_dim, p.scale, adds)", "p.head_dim, 1.0f, adds)", HALF),
    "dq summed up in the first row": mutant(
        "backward.h", "(row_index(p.dq_sum, s, h) + i)", "row_index(p.dq_sum, s, h)", HALF
    ),
    "dq not rounded": mutant("backward.h", "p.dq_sum.data != nullptr) round_dq();", "false) round_dq();", HALF),
    "dq without keys not cleared": mutant(
        "backward.h", "if (part.has_dq && part.j_begin >= j_end) clear_dq();", "", replace(PLAIN, seqlens=(5, 0))
    ),
    "dq of queries that see no key not cleared": mutant(
        "backward.h",
        "else if (part.has_dq && j0 == part.j_begin)",
        "else if (false)",
        replace(PLAIN, band="causal-bottom-right", seqlens=(150, 60)),
    ),
    "dk not in units of 1": mutant("backward.h", "p.head_dim, kLn2, false)", "p.head_dim, 1.0f, false)"),
    "dk and dv of the last queries alone": mutant("backward.h", "                    are_seen = true;\n", ""),
    "dk of keys that no query sees not cleared": mutant(
        "backward.h",
        "        if (!are_seen) clear_dkv",
        "        if (false) clear_dkv",
        replace(PLAIN, band="window"),
    ),
    "gradient of the bias in the first queries": mutant("backward.h", "? 0 : block.i0 + i)", "? 0 : i)", BIASED),
    "gradient of the bias in the first keys": mutant(
        "backward.h", "row[block.j0 + j] += from[j]", "row[j] += from[j]", BIASED
    ),
    "gradient of the bias in the first head": mutant("backward.h", "(to.heads == 1 ? 0 : h)", "0", BIASED),
    "gradient of the bias from the first copies' sequences": mutant(
        "work.h",
        "b < p.batch; b += sums",
        "b < p.batch; b += p.batch",
        replace(PLAIN, bias="per-head", seqlens=(9, 8), batch=9),
    ),
}

WORK = {
    "blocks of keys of the split are the first": mutant(
        "work.h", "j = task % blocks * kernels.block_n", "j = 0", FEW_HEADS, threads=3
    ),
    "queries of the split are the first": mutant(
        "work.h", "{h, h + 1, i, i + kernels.chunk, 0", "{h, h + 1, 0, kernels.chunk, 0", FEW_HEADS, threads=3
    ),
    "few heads of the split": mutant(
        "work.h",
        "batch * p.nheads * chunks, scratch",
        "batch * p.nheads_k * chunks, scratch",
        replace(FEW_HEADS, heads=(3, 1)),
        threads=4,
    ),
    "tokens of no sequence not cleared": mutant("work.h", "token < total; ++token", "token < end; ++token", PACKED),
    "lse of no sequence's tokens": mutant("work.h", "-HUGE_VALF", "0.0f", PACKED),
    "the queries' lengths for the keys": mutant(
        "rows.h", "clamp(p.cu_seqlens_k[b + 1],", "clamp(p.cu_seqlens_q[b + 1],", PACKED
    ),
}

ROWS = {
    "few queries see the first keys": mutant("few_queries.h", "min(j + lane, keys - 1)", "min(lane, keys - 1)", FEW),
    "few queries see the last keys alone": mutant(
        "few_queries.h", "adds ? load(to) + sums[r][x] : sums[r][x]", "sums[r][x]", FEW, "avx512"
    ),
    "few queries see the first dimensions": mutant(
        "few_queries.h", "load(q + i * q_row + d) *", "load(q + i * q_row) *", FEW
    ),
    "the last elements of a row missing": mutant(
        "elements.h", "(1 << count) - 1), p)", "(1 << count) - 2), p)", PLAIN, "avx512"
    ),
    "the last elements of a half row missing": mutant(
        "elements.h",
        "    Shorts x{};\n    __builtin_memcpy(&x, p, sizeof *p * count);",
        "    Shorts x{};\n    __builtin_memcpy(&x, p, sizeof *p * (count - 1));",
        HALF,
        "avx2",
    ),
    "half rounded up": mutant(
        "elements.h", "0x7fffu + (bits >> 16 & 1u)", "0x8000u", partial(check_rounding, torch.bfloat16)
    ),
    "half of float16 rounded up": mutant(
        "elements.h", "0xfffu + (magnitude >> 13 & 1u)", "0x1000u", partial(check_rounding, torch.float16), "avx512"
    ),
    "float16 overflows late": mutant(
        "elements.h", "magnitude < 0x477ff000u", "magnitude < 0x7f800000u", partial(check_rounding, torch.float16)
    ),
    "subnormal numbers of float16 halved": mutant(
        "elements.h", "0x1p-24f", "0x1p-25f", partial(check_rounding, torch.float16), "avx2"
    ),
}

GROWN = {
    "softcap ignored in out": mutant("forward.h", "p.softcap != 0.0f", "false", CAPPED),
    "softcap ignored by few queries": mutant("few_queries.h", "p.softcap != 0.0f", "false", CAPPED_FEW, "avx2"),
    "softcap ignored in the gradient's weights": mutant("backward.h", "p.softcap != 0.0f) cap", "false) cap", CAPPED),
    "softcap without a slope": mutant("backward.h", "p.softcap != 0.0f) multiply", "false) multiply", CAPPED),
    "softcap not in units of ln 2": mutant("softcap.h", "p.softcap * kLog2E", "p.softcap", CAPPED, "avx512"),
    "softcap after the bias": mutant(
        "forward.h", "if (p.softcap != 0.0f)", "if (p.bias.data == nullptr)", replace(CAPPED, bias="full")
    ),
    "slope in the gradient of the bias": mutant(
        "backward.h",
        "        if (p.dbias.partial != nullptr) add_to_dbias(block, h);\n"
        "        if (p.softcap != 0.0f) multiply_slopes(dweights, slopes, block);\n",
        "        if (p.softcap != 0.0f) multiply_slopes(dweights, slopes, block);\n"
        "        if (p.dbias.partial != nullptr) add_to_dbias(block, h);\n",
        replace(CAPPED, bias="full"),
    ),
    "small scores lost under a softcap": mutant("softcap.h", "magnitude < 0.625f", "magnitude < 0.0f", SLIGHTLY_CAPPED),
    "lengths of keys ignored": mutant("rows.h", "p.seqused_k != nullptr", "false", USED),
    "lengths of keys ignored by the band": mutant(
        "rows.h",
        "p.bottom_right ? seqlen_k - seqlen_q",
        "p.bottom_right ? p.seqlen_k - seqlen_q",
        replace(USED, band="window-bottom-right"),
    ),
}

GROUPS = (SCORES, UNSEEN, SOFTMAX, DROPOUT, BACKWARD, WORK, ROWS, GROWN)
