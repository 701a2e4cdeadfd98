"""The tests of the CUDA kernels must turn red for every one of these sabotaged kernels."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cases import Case
from contract import check
from simt.attention import ATTENTION, on_the_cpu
from simt.executor import Library, SimtError, load

CSRC = ATTENTION.parent
ELEMENTS = {torch.float32: "float", torch.float16: "__half"}
NUMBERS = "numbers"  # caught by the comparison with the oracle, not by the executor

PLAIN = Case(seqlens=(70, 75), dims=(24, 32), heads=(1, 1), batch=2)
MASKED = replace(PLAIN, mask="random")
BIASED = replace(PLAIN, bias="full")
GROUPED = replace(PLAIN, heads=(4, 2), seqlens=(33, 40))
PACKED = replace(PLAIN, packed=True, mask="padding")
DROPPED = replace(PLAIN, dropout_p=0.3)
WINDOW = replace(PLAIN, band="window-bottom-right")
HALF = replace(PLAIN, dtype=torch.float16, band="window")


@dataclass(frozen=True)
class Mutant:
    """A text of the sources replaced by another, the cases that must notice, and what they must notice."""

    file: str
    old: str
    new: str
    case: Case = PLAIN
    caught_by: str = NUMBERS
    is_split: bool = False  # caught in the split backward


MUTANTS = {
    "scale ignored": Mutant("mask.cuh", "scores[i][j] *= p.scale;", ""),
    "scale of dq ignored": Mutant("attention_bwd.cuh", "fmaf(p.scale, sums[i][d], sum.x)", "sums[i][d] + sum.x"),
    "scale of dk ignored": Mutant("attention_bwd.cuh", "dk, p.scale, lane", "dk, 1.0f, lane"),
    "mask inverted": Mutant("mask.cuh", "is_score && !mask[", "is_score && mask[", MASKED),
    "mask of the first row for all": Mutant("mask.cuh", "query * p.mask.row + ", "", MASKED),
    "mask of the first batch for all": Mutant("mask.cuh", "s.b * p.mask.batch + ", "", MASKED),
    "mask read past its end": Mutant("mask.cuh", "is_score && !mask", "!mask", MASKED, "out-of-bounds"),
    "bias of the first head for all": Mutant("mask.cuh", "+ h * bias.head", "", replace(BIASED, heads=(2, 2))),
    "bias read past its end": Mutant(
        "mask.cuh", "if (query < s.seqlen_q && key < s.seqlen_k) scores", "scores", BIASED, "out-of-bounds"
    ),
    "keys past the end attended": Mutant("mask.cuh", "key >= s.seqlen_k || ", "", PLAIN),
    "causal off by one": Mutant("mask.cuh", "|| offset > p.right)", "|| offset >= p.right)", WINDOW),
    "window off by one": Mutant("mask.cuh", "offset < -static", "offset <= -static", WINDOW),
    "bottom-right ignored": Mutant("mask.cuh", "p.bottom_right ? seqlen_k - seqlen_q : 0", "0", WINDOW),
    "one key tile too few": Mutant("mask.cuh", "min(last + p.right + 1,", "min(last + p.right - 31,", WINDOW),
    "one query tile too few": Mutant("mask.cuh", "min(last + p.left + 1,", "min(last + p.left - 31,", HALF),
    "rows read past the end": Mutant(
        "tile_copy.cuh", "if (row >= rows || d >= dims) return x;", "if (d >= dims) return x;", PLAIN, "out-of-bounds"
    ),
    "dimensions read past the end": Mutant(
        "tile_copy.cuh", "if (row >= rows || d >= dims) return x;", "if (row >= rows) return x;", PLAIN, "out-of-bounds"
    ),
    "rows written past the end": Mutant(
        "tile_copy.cuh", "if (row >= rows || d >= dims) return;", "if (d >= dims) return;", PLAIN, "race"
    ),
    "tail of a row not written": Mutant(
        "tile_copy.cuh", "if (d + 2 < dims) to[2]", "if (d + 3 < dims) to[2]", replace(PLAIN, dims=(7, 7))
    ),
    "sum of weights not rescaled": Mutant("softmax.cuh", "fmaf(sum[i], rescale, tile_sum)", "sum[i] + tile_sum"),
    "out not rescaled": Mutant("softmax.cuh", "out[i][d] *= rescale;", ";"),
    "a row without keys is NaN": Mutant(
        "softmax.cuh", "largest == -INFINITY ? 0.0f : largest", "largest", replace(PLAIN, mask="empty-rows")
    ),
    "lse in base 2": Mutant("attention_fwd.cuh", "logf(sum)", "log2f(sum)"),
    "a row without keys in the backward": Mutant(
        "attention_bwd.cuh", "if (row[i] == -INFINITY) row[i] = INFINITY;", "", replace(PLAIN, mask="empty-rows")
    ),
    "dropout not rescaled": Mutant("philox.cuh", "? rescale : 0.0f", "? 1.0f : 0.0f", DROPPED),
    "dropout bits of the first head": Mutant(
        "philox.cuh", "i, head, batch)", "i, 0, batch)", replace(DROPPED, heads=(2, 2))
    ),
    "nine rounds of Philox": Mutant("philox.cuh", "round < 10", "round < 9", DROPPED),
    "dropout missing in dv": Mutant("attention_bwd.cuh", "weights[i][j + e] *= factor[e];", "", DROPPED),
    "dropout missing in dP": Mutant("attention_bwd.cuh", "dscores[i][j + e] * factor[e]", "dscores[i][j + e]", DROPPED),
    "delta ignored": Mutant("attention_bwd.cuh", "factor[e] - row[i])", "factor[e])"),
    "gradient of lse ignored": Mutant("attention_bwd.cuh", "delta[row] = sum - dlse", "delta[row] = sum"),
    "dk of the first head of a group": Mutant(
        "attention_bwd.cuh",
        "h < (h_k + 1) * group; ++h) {\n#pragma unroll 1\n",
        "h < h_k * group + 1; ++h) {\n#pragma unroll 1\n",
        GROUPED,
    ),
    "keys of another head": Mutant("attention_fwd.cuh", "h_k = h / (p.nheads / p.nheads_k)", "h_k = 0", GROUPED),
    "dq begins anew at every key tile": Mutant("attention_bwd.cuh", "if (!is_first) sum", "if (false) sum"),
    "dq never begins": Mutant("attention_bwd.cuh", "if (!is_first) sum", "if (true) sum"),
    "dq rounded between key tiles": Mutant("attention_bwd.cuh", "if (is_last)\n", "if (true)\n", HALF),
    "a key tile of dq lost in the split": Mutant(
        "attention_bwd.cuh",
        "int j0 = keys.begin; j0 < keys.end",
        "int j0 = keys.begin + 32; j0 < keys.end",
        is_split=True,
    ),
    "tokens of no sequence not cleared": Mutant("mask.cuh", "row[d] = from_float<E>(0.0f);", ";", PACKED),
    "the neighbour's tokens": Mutant(
        "mask.cuh", "first_k = clamp(p.cu_seqlens_k[b],", "first_k = clamp(p.cu_seqlens_k[b] + 1,", PACKED
    ),
    "the first copy of the bias gradient lost": Mutant(
        "attention_bwd.cuh", "int copy = 0; copy < dbias", "int copy = 1; copy < dbias", BIASED
    ),
    "bias gradient of one tile for all": Mutant(
        "attention_bwd.cuh", "+ n % all.keys * T::kBlockN", "", replace(BIASED, bias="per-head")
    ),
    "bias gradient not summed over keys": Mutant(
        "attention_bwd.cuh",
        "if (keys_broadcast && threadIdx",
        "if (false && threadIdx",
        replace(BIASED, bias="per-head"),
    ),
    "bias gradient not summed over rows": Mutant(
        "attention_bwd.cuh",
        "if (rows_broadcast && threadIdx",
        "if (false && threadIdx",
        replace(BIASED, bias="per-key"),
    ),
    "too narrow shared memory": Mutant(
        "tile_mma.cuh",
        "own + (j * T::kLanesX + lane.x) * T::kWarpRows",
        "own + (j * T::kLanesX + lane.x) * 4",
        PLAIN,
        "race",
    ),
}
BARRIER = "__syncthreads();"
BARRIERS = [(f.name, n) for f in sorted(CSRC.glob("*.cuh")) for n in range(f.read_text().count(BARRIER))]


def sources(folder: Path) -> None:
    """A copy of csrc with the kernels for head_dim <= 32 only, which compiles quickly."""
    for file in (*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), *CSRC.glob("*.h")):
        (folder / file.name).write_text(file.read_text())
    table = folder / "tiles.cuh"
    others = re.compile(r"    KERNEL\(\w+, +\w+, +(?!32,)\d+.*\n")
    small = others.sub("", table.read_text())
    table.write_text(re.sub(r"\\\n(?=\n)", "\n", small))  # the last row continues no more


def machine_code(library: Library, folder: Path) -> bytes:
    code = folder / f"{library.path.name}.text"
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.text", library.path, code], check=True)
    return code.read_bytes()


class MutantKernels:
    """The kernels of a folder's sources."""

    def __init__(self, folder: Path, dtype: torch.dtype, checked: bool) -> None:
        defines = (f"FASTATTN_ELEMENT={ELEMENTS[dtype]}",)
        self.loaded = load(folder / "attention.cu", checked=checked, defines=defines)

    def library(self, kernel: str, element: str) -> Library:
        return self.loaded


def run(folder: Path, case: Case, checked: bool, is_split: bool) -> MutantKernels:
    kernels = MutantKernels(folder, case.dtype, checked)
    with on_the_cpu(kernels, multiprocessors=1000 if is_split else 1):
        check(case)
    return kernels


def assert_caught(folder: Path, original: Path, mutant: Mutant) -> None:
    checked = mutant.caught_by != NUMBERS
    before = run(original, mutant.case, checked, mutant.is_split)
    with pytest.raises(AssertionError) as caught:
        run(folder, mutant.case, checked, mutant.is_split)
    after = MutantKernels(folder, mutant.case.dtype, checked)
    assert machine_code(before.loaded, original) != machine_code(after.loaded, folder), "the mutant is the same kernel"
    kinds = caught.value.kinds if isinstance(caught.value, SimtError) else {NUMBERS}
    assert any(mutant.caught_by in kind for kind in kinds), (kinds, str(caught.value)[:500])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of the sources: to be sabotaged, and as they are."""
    both = tmp_path / "mutant", tmp_path / "original"
    for folder in both:
        folder.mkdir()
        sources(folder)
    return both


@pytest.mark.parametrize("name", MUTANTS)
def test_sabotaged_kernels_are_caught(name: str, folders: tuple[Path, Path]) -> None:
    mutant, (folder, original) = MUTANTS[name], folders
    file = folder / mutant.file
    assert mutant.old in file.read_text(), f"{mutant.file} has no {mutant.old!r} any more"
    file.write_text(file.read_text().replace(mutant.old, mutant.new))
    assert_caught(folder, original, mutant)


@pytest.mark.parametrize(("name", "n"), BARRIERS)
def test_every_barrier_is_needed(name: str, n: int, folders: tuple[Path, Path]) -> None:
    folder, original = folders
    file = folder / name
    parts = file.read_text().split(BARRIER)
    file.write_text(BARRIER.join(parts[: n + 1]) + ";" + BARRIER.join(parts[n + 1 :]))
    case = replace(PLAIN, bias="per-head", seqlens=(40, 40), batch=1)
    assert_caught(folder, original, Mutant(name, BARRIER, "", case, "race"))
