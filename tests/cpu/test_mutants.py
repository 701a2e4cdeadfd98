"""The tests of the CPU kernels must turn red for every one of these sabotaged kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastattn.cpu_kernels import attention
from tests.support.cpu_library import CSRC, Library, build, changed, on_library
from tests.support.cpu_mutants import GROUPS, Mutant
from tests.support.cpu_runs import in_threads

MUTANTS = {name: mutant for group in GROUPS for name, mutant in group.items()}
# A mutant is compiled: make test has one of each kind.
SOME = [next(iter(group)) for group in GROUPS]
QUICK = ("-O0",)


def machine_code(library: Path, folder: Path) -> bytes:
    """Its instructions and constants."""
    code = folder / f"{library.name}.code"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "-j", ".rodata", library, code], check=True)
    return code.read_bytes()


def run(library: Path, mutant: Mutant) -> None:
    with on_library(Library(library)), in_threads(mutant.threads):
        mutant.check()


def test_what_is_replaced_is_there() -> None:
    for name, mutant in MUTANTS.items():
        assert mutant.old in (CSRC / "cpu" / mutant.file).read_text(), f"{name}: {mutant.file} has no {mutant.old!r}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in MUTANTS])
def test_sabotaged_kernels_are_caught(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    if mutant.isa not in attention.ISAS:
        pytest.skip(f"this CPU has no {mutant.isa}")
    original = build(mutant.isa, QUICK)
    run(original, mutant)

    csrc = changed(tmp_path, mutant.file, mutant.old, mutant.new)
    sabotaged = build(mutant.isa, QUICK, csrc, cache=tmp_path)
    with pytest.raises(AssertionError):
        run(sabotaged, mutant)
    assert machine_code(original, tmp_path) != machine_code(sabotaged, tmp_path), "the mutant is the same kernel"
