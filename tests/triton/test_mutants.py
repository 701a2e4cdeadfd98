"""The tests of the Triton kernels must turn red for every one of these sabotaged kernels."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fastattn import triton_kernels
from tests.support.cases import Case
from tests.support.triton_attention import DEVICE, check_once, on_triton

pytestmark = [pytest.mark.triton] if DEVICE == "cpu" else [pytest.mark.triton, pytest.mark.gpu]
KERNELS = Path(triton_kernels.__file__).parent
IN_TWO, IN_ONE = (16, 16), (16, 64)  # tiles of the backward in two kernels, and in one

PLAIN = Case(seqlens=(18, 37), dims=(24, 32), heads=(1, 1), batch=1)
MASKED = replace(PLAIN, mask="random", batch=2)
EMPTY_ROWS = replace(PLAIN, mask="empty-rows")
BIASED = replace(PLAIN, bias="full", heads=(2, 2))
PER_HEAD = replace(PLAIN, bias="per-head")
PER_KEY = replace(PLAIN, bias="per-key")
GROUPED = replace(PLAIN, heads=(4, 2))
PACKED = replace(PLAIN, packed=True, batch=2)
PADDED = replace(PLAIN, mask="padding", bias="per-key", batch=2)  # keys that no query sees, which hold NaN
EARLY = replace(PLAIN, band="causal")  # so are those after the last query
EARLY_BIASED = replace(EARLY, bias="per-key")
DROPPED = replace(PLAIN, dropout_p=0.3, heads=(2, 2))
WINDOW = replace(PLAIN, band="window-bottom-right", seqlens=(37, 41))
LEFT = replace(PLAIN, band="window", seqlens=(41, 37))
PAIRS = replace(PLAIN, batch=2, heads=(2, 2))
WIDE = replace(PLAIN, dims=(64, 64))
ONE_QUERY = replace(PLAIN, seqlens=(1, 37), heads=(4, 2), mask="random")  # a mask of each head that no query changes
CAPPED = replace(PLAIN, softcap=3.0)
WIDELY = replace(PLAIN, softcap=3000.0)  # scores are small beside it
CAPPED_BIASED = replace(CAPPED, bias="per-key")
CAPPED_EARLY = replace(EARLY, softcap=3.0)
USED = replace(PACKED, used=True, batch=3)
USED_BIASED = replace(USED, bias="per-key", band="window-bottom-right", packed=False)
VALUES = "HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)"
MIN_USED = "tl.minimum(seqlen, tl.maximum(tl.load(seqused_k_ptr + b), 0))"
DBIAS = """_ = tile_gradients(
                q_tile, k_tile, v_tile, dout_tile, row_lse[:, None], b, h, i0, j0, seqlen_q, seqlen_k, shift,
                mask, bias, dropout, band, scale_log2, softcap, BLOCK_M, BLOCK_N, False, PRECISION
            )  # fmt: skip
            sums += weights * (dp - row_delta[:, None])"""


@dataclass(frozen=True)
class Mutant:
    """A text of the sources replaced by another, everywhere in the file; the case and the tile that must notice."""

    file: str
    old: str
    new: str
    case: Case = PLAIN
    tile: tuple[int, int] = IN_TWO


MUTANTS = {
    "scale ignored": Mutant("scores.py", "qk * scale_log2", "qk * LOG2_E"),
    "scale of dq ignored": Mutant("kernels.py", "dq_tile * scale,", "dq_tile,"),
    "scale of dk ignored": Mutant("kernels.py", "dk_tile * scale,", "dk_tile,"),
    "mask inverted": Mutant(
        "scores.py", "b, h) + offsets, inside, 0), scores", "b, h) + offsets, inside, 0) == 0, scores", MASKED
    ),
    "keys that the mask excludes not cleared": Mutant(
        "scores.py", "is_same_for_all = mask.stride_m == 0", "is_same_for_all = False", PADDED
    ),
    "keys of a mask that the first query does not see cleared": Mutant(
        "scores.py", "is_same_for_all = mask.stride_m == 0", "is_same_for_all = True", MASKED
    ),
    "keys before the band not cleared": Mutant("scores.py", "(keys >= begin) & ", "", WINDOW),
    "keys after the band not cleared": Mutant("scores.py", "(keys < end)", "(keys < (end + 15) // 16 * 16)", EARLY),
    "values that no query sees not cleared": Mutant(
        "kernels.py",
        f"keys, seen, {VALUES}\n                sums",
        f"keys, keys < seqlen_k, {VALUES}\n                sums",
        PADDED,
    ),
    "keys that no query sees not cleared in dq": Mutant(
        "kernels.py", "head_k, keys, seen,", "head_k, keys, keys < seqlen_k,", PADDED
    ),
    "dP of keys that no query sees": Mutant("scores.py", "dp = tl.where(weights == 0.0, 0.0, dp)", "pass", PADDED),
    "dP of keys that the band excludes": Mutant(
        "scores.py",
        "(mask.ptr is not None) or ((band.left is not None) or (band.right is not None))",
        "mask.ptr is not None",
        EARLY,
    ),
    "queries past the end see keys": Mutant("scores.py", "rows = tl.minimum(rows, seqlen_q - 1)", "pass", EARLY),
    "mask of the first batch for all": Mutant(
        "scores.py",
        "x.ptr + tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h\n\n\n@triton.jit\ndef seen",
        "x.ptr + tl.cast(h, tl.int64) * x.stride_h\n\n\n@triton.jit\ndef seen",
        MASKED,
    ),
    "bias of the first head for all": Mutant(
        "scores.py",
        " + tl.cast(h, tl.int64) * x.stride_h\n\n\n@triton.jit\ndef seen",
        "\n\n\n@triton.jit\ndef seen",
        BIASED,
    ),
    "mask of the first row for all": Mutant("scores.py", "rows_64 * mask.stride_m + ", "", MASKED),
    "lse of the first batch for all": Mutant("scores.py", "(x.stride_b_16 >> 4)", "0", replace(PLAIN, batch=2)),
    "bias in the wrong base": Mutant("scores.py", ".to(tl.float32) * LOG2_E", ".to(tl.float32)", BIASED),
    "keys past the end attended": Mutant(
        "scores.py", "return tl.where(keys < seqlen_k, scores, -INF)", "return scores"
    ),
    "causal off by one": Mutant(
        "scores.py", "keys - rows <= shift + band.right", "keys - rows < shift + band.right", WINDOW
    ),
    "window off by one": Mutant(
        "scores.py", "keys - rows >= shift - band.left", "keys - rows > shift - band.left", LEFT
    ),
    "bottom-right ignored": Mutant("kernels.py", "(seqlen_k - seqlen_q) * band.bottom_right", "0", WINDOW),
    "one key tile too few": Mutant(
        "scores.py", "seqlen_q) + shift + band.right,", "seqlen_q) + shift + band.right - 16,", WINDOW
    ),
    "one query tile too few": Mutant(
        "scores.py", "seqlen_k) - shift + band.left,", "seqlen_k) - shift + band.left - 16,", LEFT
    ),
    "a key tile too late": Mutant("scores.py", "i0 + shift - band.left, 0)", "i0 + shift - band.left + 16, 0)", LEFT),
    "a query tile too late": Mutant(
        "scores.py", "j0 - shift - band.right, 0)", "j0 - shift - band.right + 16, 0)", WINDOW
    ),
    "sum of weights not rescaled": Mutant("kernels.py", "row_sum * rescale +", "row_sum +"),
    "out not rescaled": Mutant("kernels.py", "sums * rescale[:, None]", "sums"),
    "a row without keys is NaN": Mutant("kernels.py", "tl.where(new_max == -INF, 0.0, new_max)", "new_max", EMPTY_ROWS),
    "a row without keys in the backward": Mutant("scores.py", "tl.where(lse == -INF, INF, lse)", "lse", EMPTY_ROWS),
    "lse in base 2": Mutant("kernels.py", "tl.log2(row_sum)) * LN_2", "tl.log2(row_sum))"),
    "dropout not rescaled": Mutant("kernels.py", "dropout.rescale / row_sum", "1.0 / row_sum", DROPPED),
    "dropout not rescaled in dv": Mutant("kernels.py", "dv_tile * dropout.rescale", "dv_tile", DROPPED),
    "dropout not rescaled in dP": Mutant("scores.py", "dp * dropout.rescale", "dp", DROPPED),
    "dropout missing in dv": Mutant("scores.py", "kept_weights = tl.where(keeps, weights, 0.0)", "pass", DROPPED),
    "dropout missing in dP": Mutant("scores.py", "dp = tl.where(keeps, dp * dropout.rescale, 0.0)", "pass", DROPPED),
    "dropout bits of the first head": Mutant("scores.py", "rows[:, None], h, b)", "rows[:, None], h * 0, b)", DROPPED),
    "dropout words in another order": Mutant("scores.py", "(word_0, word_2)", "(word_2, word_0)", DROPPED),
    "dropout words in another order in dK": Mutant("scores.py", "word_1[:, None, :]", "word_2[:, None, :]", DROPPED),
    "delta ignored": Mutant("kernels.py", "weights * (dp - row_delta[None, :])", "weights * dp"),
    "delta ignored in dq": Mutant("kernels.py", "weights * (dp - row_delta[:, None])", "weights * dp", PLAIN),
    "gradient of lse ignored": Mutant("kernels.py", "row_delta -= load_per_row", "load_per_row"),
    "dk of the first head of a group": Mutant("kernels.py", "h = h_k * group + member", "h = h_k * group", GROUPED),
    "keys of another head": Mutant("kernels.py", "h // group", "h * 0", GROUPED),
    "tokens of no sequence not cleared": Mutant(
        "scores.py", "row in range(seqlen + tile", "row in range(end + tile", PACKED
    ),
    "the neighbour's tokens": Mutant(
        "scores.py", "first = token(cu_seqlens_ptr, b,", "first = 1 + token(cu_seqlens_ptr, b,", PACKED
    ),
    "the first copy of the bias gradient lost": Mutant("attention.py", "partial.sum(0)", "partial[1:].sum(0)", PER_KEY),
    "bias gradient of one tile for all": Mutant(
        "bias_gradient.py", "own_j0 + n % sum_keys * BLOCK_N", "own_j0", PER_HEAD
    ),
    "bias gradient not summed over keys": Mutant("bias_gradient.py", "if KEYS_BROADCAST:", "if False:", PER_HEAD),
    "bias gradient not summed over rows": Mutant("bias_gradient.py", "if ROWS_BROADCAST:", "if False:", PER_KEY),
    "softcap ignored": Mutant("scores.py", "y * softcap.bound_log2", "qk * scale_log2", CAPPED),
    "factor of the softcap ignored": Mutant("scores.py", "tanh(qk * softcap.factor)", "tanh(qk * scale_log2)", CAPPED),
    "tanh of small numbers by the exponential": Mutant("scores.py", "magnitude < 0.625", "magnitude < 0", WIDELY),
    "tanh of large numbers by the polynomial": Mutant("scores.py", "magnitude < 0.625", "magnitude < 1.5", CAPPED),
    "tanh of negative numbers is positive": Mutant("scores.py", "-large, large", "large, large", CAPPED),
    "slope of the softcap missing in dq": Mutant(
        "kernels.py", "(dp - row_delta[:, None]) * slope", "(dp - row_delta[:, None])", CAPPED
    ),
    "slope of the softcap missing in dk": Mutant(
        "kernels.py", "(dp - row_delta[None, :]) * slope", "(dp - row_delta[None, :])", CAPPED
    ),
    "slope of the softcap in the gradient of the bias": Mutant(
        "bias_gradient.py", DBIAS, DBIAS.replace("_ = tile", "slope = tile") + " * slope", CAPPED_BIASED
    ),
    "slope at keys that no query sees": Mutant(
        "scores.py", "slope = tl.where(weights == 0.0, 0.0, slope)", "pass", CAPPED_EARLY
    ),
    "keys that are not there attended": Mutant("scores.py", MIN_USED, "seqlen", USED),
    "as many keys as the first sequence has": Mutant("scores.py", "seqused_k_ptr + b", "seqused_k_ptr", USED),
    "bottom-right of the places for keys": Mutant(
        "kernels.py", "(seqlen_k - seqlen_q) * band", "(max_seqlen_k - seqlen_q) * band", USED_BIASED
    ),
    "bottom-right of the places for keys in the gradient of the bias": Mutant(
        "bias_gradient.py", "(seqlen_k - seqlen_q) * band", "(max_seqlen_k - seqlen_q) * band", USED_BIASED
    ),
    "every program takes its first head only": Mutant(
        "kernels.py", "tile_count * pairs + n", "tile_count * pairs", PAIRS
    ),
    "in one: keys that no query sees not cleared": Mutant(
        "kernels.py",
        "head(k, b, h_k, first_k), keys, seen,",
        "head(k, b, h_k, first_k), keys, keys < seqlen_k,",
        PADDED,
        IN_ONE,
    ),
    "in one: keys that another head sees cleared": Mutant(
        "kernels.py", "for member in range(1, group):", "for member in range(0):", ONE_QUERY, IN_ONE
    ),
    "in one: the first head only": Mutant(
        "kernels.py", "bh = tl.program_id(0) * pairs + n", "bh = tl.program_id(0) * pairs", PAIRS, IN_ONE
    ),
    "in one: the first query tile only": Mutant(
        "kernels.py", "range(0, seqlen_q, BLOCK_M)", "range(0, BLOCK_M, BLOCK_M)", PLAIN, IN_ONE
    ),
    "in one: scale of dq ignored": Mutant("kernels.py", "dq_tile * scale,", "dq_tile,", PLAIN, IN_ONE),
    "in one: scale of dk ignored": Mutant("kernels.py", "dk_tile * scale,", "dk_tile,", PLAIN, IN_ONE),
    "in one: dq of wide heads": Mutant(
        "kernels.py", "tl.trans(dscores), k_tile,", "tl.trans(dscores), -k_tile,", WIDE, IN_ONE
    ),
    "in one: dq of narrow heads": Mutant(
        "kernels.py", "tl.trans(k_tile), dscores,", "tl.trans(-k_tile), dscores,", PLAIN, IN_ONE
    ),
    "in one: delta ignored": Mutant("kernels.py", "(dp - row_delta[None, :])", "dp", PLAIN, IN_ONE),
    "in one: delta without dropout": Mutant(
        "kernels.py", "tl.sum(weights * dp, 0) /", "0.7 * tl.sum(kept_weights * dp, 0) /", DROPPED, IN_ONE
    ),
    "in one: gradient of lse ignored": Mutant("kernels.py", "row_delta -= load_per_row", "load_per_row", PLAIN, IN_ONE),
    "in one: no delta for the bias gradient": Mutant(
        "kernels.py", "if delta.ptr is not None:", "if False:", BIASED, IN_ONE
    ),
    "in one: dk of the first head of a group": Mutant(
        "kernels.py", "h = h_k * group + member", "h = h_k * group", GROUPED, IN_ONE
    ),
    "in one: dropout not rescaled in dv": Mutant("kernels.py", "dv_tile * dropout.rescale", "dv_tile", DROPPED, IN_ONE),
    "in one: tokens of no sequence not cleared": Mutant(
        "scores.py", "row in range(seqlen + tile", "row in range(end + tile", PACKED, IN_ONE
    ),
    "in one: slope of the softcap missing": Mutant(
        "kernels.py", "(dp - row_delta[None, :]) * slope", "(dp - row_delta[None, :])", CAPPED, IN_ONE
    ),
    "in one: keys that are not there attended": Mutant("scores.py", MIN_USED, "seqlen", USED, IN_ONE),
    "in one: bottom-right of the places for keys": Mutant(
        "kernels.py", "(seqlen_k - seqlen_q) * band", "(max_seqlen_k - seqlen_q) * band", USED_BIASED, IN_ONE
    ),
    "in one: bottom-right ignored": Mutant(
        "kernels.py", "(seqlen_k - seqlen_q) * band.bottom_right", "0", WINDOW, IN_ONE
    ),
}


@contextmanager
def sabotaged(mutant: Mutant, folder: Path) -> Iterator[str]:
    """A copy of the kernels with the mutation, as a package of fastattn; its name as seen from there."""
    name = f"mutant_{folder.parent.name}_{folder.name}"
    copy = folder / name
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / mutant.file
    file.write_text(file.read_text().replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(f"fastattn.{name}", copy / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        yield f".{name}"
    finally:
        for module in [m for m in sys.modules if m == spec.name or m.startswith(f"{spec.name}.")]:
            del sys.modules[module]


# One of each kind in make test, by the case and the tile that notice it.
SOME = {(mutant.case, mutant.tile): name for name, mutant in MUTANTS.items()}.values()


def test_what_is_replaced_is_there() -> None:
    for mutant in MUTANTS.values():
        assert mutant.old in (KERNELS / mutant.file).read_text(), f"{mutant.file} has no {mutant.old!r} any more"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in MUTANTS])
def test_sabotaged_kernels_are_caught(name: str, tmp_path: Path, poisoned: None) -> None:
    mutant = MUTANTS[name]
    caught = pytest.raises(AssertionError)
    with sabotaged(mutant, tmp_path) as kernels, on_triton(*mutant.tile, kernels=kernels), caught:
        check_once(mutant.case)


@pytest.mark.parametrize(("case", "tile"), dict.fromkeys((m.case, m.tile) for m in MUTANTS.values()), ids=str)
def test_sound_kernels_pass(case: Case, tile: tuple[int, int], poisoned: None) -> None:
    with on_triton(*tile):
        check_once(case)
