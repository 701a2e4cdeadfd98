"""Sabotage of the CUDA kernels for tensor cores: what is changed in csrc, and the case that must notice."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.support.cases import Case
from tests.support.contract import check
from tests.support.cuda_mutants import NUMBERS, Mutant

# Several tiles of queries and of keys, the last ones ragged, one beside the other.
PLAIN = Case(dtype=torch.float16, seqlens=(70, 75), dims=(32, 24), heads=(1, 1), batch=2)
ALIGNED = replace(PLAIN, dims=(32, 32))
PADDED = replace(ALIGNED, mask="padding")  # keys that no query sees, which hold NaN
PACKED = replace(ALIGNED, packed=True)
ODD = replace(PLAIN, layout="odd-rows")


def forward_alone(case: Case) -> None:
    check(case, gradients=False)


def mma(
    file: str, old: str, new: str, case: Case = ALIGNED, arch: str = "compute_75", caught_by: str = NUMBERS
) -> Mutant:
    return Mutant(f"{file}.cuh", old, new, case, caught_by, check=forward_alone, arch=arch)


LINES = {
    "rows of queries in the order of keys": mma(
        "mma_lines", "kKind == kQueries ? T::Unit::row_line", "false ? T::Unit::row_line"
    ),
    "rows of keys in the order of queries": mma(
        "mma_lines", "kKind == kQueries ? T::Unit::row_line", "true ? T::Unit::row_line"
    ),
    "dimensions of a line not in the unit's order": mma("mma_units", "make_uint2(x.x, x.z);", "make_uint2(x.x, x.y);"),
    "dimensions of a line on 7.0 not in the unit's order": mma(
        "mma_units", "make_uint4(x.x, x.z, x.y, x.w)", "x", arch="compute_70"
    ),
    "keys that no query sees are not cleared": mma(
        "attention_fwd_mma", "KeyCopy::clear_unseen(", "if (false) KeyCopy::clear_unseen(", PADDED
    ),
    "rows that are not aligned moved 16 bytes at a time": mma(
        "mma_lines", "&& (address | stride) % 16 == 0", "", replace(ODD, dims=(32, 32)), caught_by="misaligned"
    ),
    "rows narrower than the tile moved as wide ones": mma(
        "mma_lines", "kDims <= tile.aligned_dims", "tile.aligned_dims != 0", PLAIN, caught_by="out-of-bounds"
    ),
    "the next keys loaded from these": mma(
        "attention_fwd_mma", "k.advance(T::kBlockN), v.advance(T::kBlockN);", "v.advance(T::kBlockN);"
    ),
    "the gap between lines missing": mma(
        "mma_tiles", "return 2 * elements + 16;", "return 2 * elements + 8;", caught_by="misaligned"
    ),
}

PRODUCTS = {
    "the wrong half of k": mma(
        "mma_units", "mma(upper, lower, a[2], a[3], b[2]);", "mma(upper, lower, a[0], a[1], b[2]);"
    ),
    "the wrong half of k, 8.0": mma(
        "mma_units", "mma<E>(upper, lower, a, b[0], b[2]);", "mma<E>(upper, lower, a, b[2], b[0]);", arch="compute_80"
    ),
    "columns exchanged": mma(
        "mma_units", "mma(upper + 2, lower + 2, a[0], a[1], b[1]);", "mma(upper + 2, lower + 2, a[0], a[1], b[0]);"
    ),
    "weights as they lie, 7.0": mma("mma_units", "is_odd ? other : up", "up", arch="compute_70"),
    "weights of the quad pair beside, 7.0": mma("mma_units", "is_right ? beside : own[n]", "own[n]", arch="compute_70"),
    "weights exchanged with another lane, 7.0": mma("mma_units", "own[n], 8)", "own[n], 4)", arch="compute_70"),
    "weights of the lower rows twice": mma("mma_units", "a[1] = pack<E>(lower[0], lower[1]);", "a[1] = a[0];"),
    "the last unit of keys left out": mma("mma_lines", "if (16 * k >= keys) break;", "if (16 * k + 16 >= keys) break;"),
    "weights rounded to something else": mma(
        "mma_units", "__floats2half2_rn(low, high)", "__floats2half2_rn(low, 1.02f * high)"
    ),
    "queries of another warp": mma(
        "mma_lines", "lines + 16 * lane.warp * kLine", "lines + 16 * (lane.warp ^ 1) * kLine"
    ),
}

TENSOR_CORES = (LINES, PRODUCTS)
