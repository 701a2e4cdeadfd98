"""The tests of the CUDA kernels must turn red for every one of these sabotaged kernels."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn.cuda_kernels.sources import Arch, defines, unit
from tests.simt.attention import ATTENTION, on_the_cpu
from tests.simt.build import CHECKED, build_library
from tests.simt.executor import Library, SimtError
from tests.simt.ptx.library import PtxLibrary, load_ptx
from tests.support import cuda_mutants_mma
from tests.support.cuda_mutants import NUMBERS, PLAIN, SHARED_AND_FORWARD, Mutant
from tests.support.cuda_mutants_backward import BACKWARD_ALONE

CSRC = ATTENTION.parent
GROUPS = SHARED_AND_FORWARD + BACKWARD_ALONE + cuda_mutants_mma.TENSOR_CORES
MUTANTS = {name: mutant for group in GROUPS for name, mutant in group.items()}
ELEMENTS = {torch.float32: "float", torch.float16: "__half"}
HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
BARRIER = "__syncthreads();"
BARRIERS = [(f.name, n) for f in sorted(CSRC.glob("*.cuh")) for n in range(f.read_text().count(BARRIER))]
# A mutant is compiled, which takes seconds: make test has one of each kind, by what is broken and what catches it, and
# one barrier of each file.
SOME = {(n, mutant.caught_by): name for n, group in enumerate(GROUPS) for name, mutant in group.items()}.values()
SOME_BARRIERS = dict(BARRIERS).items()
ROW_OF_TABLE = re.compile(r"    KERNEL\((\w+), +\w+, +(\d+),.*\n")


def sources(folder: Path, head_dim: int) -> None:
    """A copy of csrc with the kernels of one head_dim only, and the bias gradient's, which compiles quickly."""
    folder.mkdir()
    for file in (*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), *CSRC.glob("*.h")):
        (folder / file.name).write_text(file.read_text())

    def kept(row: re.Match[str]) -> str:
        return row[0] if row[1] == "attention_bwd_dbias" or int(row[2]) == head_dim else ""

    for table in (folder / "tiles.cuh", folder / "mma_tiles.cuh"):
        some = ROW_OF_TABLE.sub(kept, table.read_text())
        table.write_text(re.sub(r"\\\n(?=\n|#)", "\n", some))  # the last row continues no more


class MutantKernels:
    """The kernels of a folder's sources, compiled without optimisation, which is quick, unless accesses are checked."""

    def __init__(self, folder: Path, dtype: torch.dtype, checked: bool) -> None:
        flags = (*(CHECKED if checked else ("-O0",)), f"-DFASTATTN_ELEMENT={ELEMENTS[dtype]}")
        self.loaded = Library(build_library(folder / "attention.cu", flags), checked)

    def has_mma(self, element: str) -> bool:
        return False

    def library(self, kernel: str, element: str) -> Library:
        return self.loaded

    def code(self, folder: Path) -> bytes:
        """The machine code."""
        code = folder / f"{self.loaded.path.name}.text"
        subprocess.run(["objcopy", "-O", "binary", "--only-section=.text", self.loaded.path, code], check=True)
        return code.read_bytes()


class MutantPtx:
    """The same from the PTX of an architecture with tensor cores."""

    def __init__(self, folder: Path, dtype: torch.dtype, checked: bool, arch: str) -> None:
        self.arch = Arch.parse(arch)
        macros = tuple(f"{name}={value}" for name, value in defines(HALF[dtype], self.arch).items())
        self.loaded = load_ptx(folder / "attention.cu", arch=arch, checked=checked, defines=macros)

    def has_mma(self, element: str) -> bool:
        return unit(element, self.arch) is not None

    def library(self, kernel: str, element: str) -> PtxLibrary:
        return self.loaded

    def code(self, folder: Path) -> bytes:
        """The PTX, without the places in the sources."""
        lines = self.loaded.ptx.read_text().splitlines()
        return "\n".join(line for line in lines if not line.lstrip().startswith((".loc", ".file"))).encode()


def kernels_of(folder: Path, mutant: Mutant) -> MutantKernels | MutantPtx:
    checked = mutant.caught_by != NUMBERS
    if mutant.arch is None:
        return MutantKernels(folder, mutant.case.dtype, checked)
    return MutantPtx(folder, mutant.case.dtype, checked, mutant.arch)


def run(folder: Path, mutant: Mutant) -> MutantKernels | MutantPtx:
    kernels = kernels_of(folder, mutant)
    multiprocessors = 1000 if mutant.is_split else 1
    # More than two heads or sequences: then a block has several of them.
    with on_the_cpu(kernels, multiprocessors=multiprocessors, max_grid_y=2, max_grid_z=2):
        mutant.check(mutant.case)
    return kernels


def is_caught(tmp_path: Path, mutant: Mutant, change: Callable[[str], str]) -> bool:
    """True if the mutant's case notices the change in the expected way; it must find no defect in the sources."""
    folder, original = tmp_path / "mutant", tmp_path / "original"
    for copied in (folder, original):
        sources(copied, mutant.head_dim)
    file = folder / mutant.file
    file.write_text(change(file.read_text()))

    before = run(original, mutant)
    with pytest.raises(AssertionError) as caught:
        run(folder, mutant)
    after = kernels_of(folder, mutant)
    assert before.code(original) != after.code(folder), "the mutant is the same kernel"
    kinds = caught.value.kinds if isinstance(caught.value, SimtError) else {NUMBERS}
    return any(mutant.caught_by in kind for kind in kinds)


def test_what_is_replaced_is_there() -> None:
    for mutant in MUTANTS.values():
        assert mutant.old in (CSRC / mutant.file).read_text(), f"{mutant.file} has no {mutant.old!r} any more"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in MUTANTS])
def test_sabotaged_kernels_are_caught(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    assert is_caught(tmp_path, mutant, lambda text: text.replace(mutant.old, mutant.new))


@pytest.mark.parametrize(
    ("name", "n"), [pytest.param(*x, marks=() if x in SOME_BARRIERS else pytest.mark.slow) for x in BARRIERS]
)
def test_every_barrier_is_needed(name: str, n: int, tmp_path: Path) -> None:
    def without(text: str) -> str:
        parts = text.split(BARRIER)
        return BARRIER.join(parts[: n + 1]) + ";" + BARRIER.join(parts[n + 1 :])

    softcap = 3.0 if name == "softcap.cuh" else None
    case = replace(PLAIN, bias="per-head", seqlens=(40, 70), batch=1, softcap=softcap)
    mutant = Mutant(name, BARRIER, "", case, "race")
    if name == "attention_fwd_mma.cuh":
        # Two sequences for a block, one behind the other.
        case = replace(case, dtype=torch.float16, dims=(32, 32), batch=4)
        mutant = replace(mutant, case=case, arch="compute_75", check=cuda_mutants_mma.forward_alone)
    assert is_caught(tmp_path, mutant, without)
