"""The objects of the CPU kernels: instructions and symbols of one instruction set never stand in what others run.

The linker takes a function that several objects define weakly from any one of them: compiled for AVX-512, it would run
on CPUs that have none.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastattn.cpu_kernels import sources
from tests.simt.build import BuildError, cached, compiler, run, with_headers
from tests.support.native_build import Settings, build_native

CSRC = Path(__file__).parents[2] / "csrc" / "cpu"
# GCC's word on vectors that loops fill, of which clang does not know.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option")
IS_X86 = "avx2" in sources.isas()

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump and nm: not found (binutils)")
x86_only = pytest.mark.skipif(not IS_X86, reason="this machine has one instruction set")


def compiled(source: Path, *options: str, cxx: str | None = None) -> Path:
    """The object of a source without a warning, kept for the next time; skips the test where there is no compiler."""
    try:
        program = cxx or compiler()[0]
    except BuildError as error:
        pytest.skip(str(error))
    options = (*options, *WARNINGS)

    def make(target: Path) -> None:
        run([program, *options, "-c", str(source), "-o", str(target)])

    return cached("cpu_object.o", with_headers(source), [program, *options], make)


@functools.cache
def is_built() -> bool:
    """Whether the objects of this tree's own build are those of its sources."""
    folder = build_native.CPU_WORK
    if build_native.why_no_cpu(Settings.read(os.environ)) or not (folder / "build.ninja").exists():
        return False
    dry_run = [sys.executable, "-m", "ninja", "-C", str(folder), "-n"]
    is_current = (folder / "build.ninja").read_text() == build_native.cpu_graph(Settings.read(os.environ))
    return is_current and "no work to do" in run(dry_run)


def kernels(isa: str) -> Path:
    if is_built():
        return build_native.CPU_WORK / f"{isa}.o"
    return compiled(CSRC / "kernels.cpp", *sources.kernel_options(isa))


def module() -> Path:
    if is_built():
        return build_native.CPU_WORK / "module.o"
    pybind11 = pytest.importorskip("pybind11")
    folders = (pybind11.get_include(), sysconfig.get_path("include"))
    return compiled(CSRC / "module.cpp", *sources.OPTIONS, *(f"-isystem{folder}" for folder in folders))


# ---- what stands in an object ----


def instructions(file: Path) -> str:
    """Disassembly, a line for each instruction: its address, its name, its operands."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def widest(code: str) -> str:
    """The instruction set that a disassembly needs."""
    if re.search(r"%zmm\d|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])\b", code):
        return "avx512"
    if re.search(r"%ymm\d|^ +[0-9a-f]+:\tv", code, re.MULTILINE):
        return "avx2"
    return "baseline"


def symbols(file: Path) -> dict[str, list[str]]:
    """The symbols of an object by the letter that nm gives to their kind."""
    found: dict[str, list[str]] = {}
    for line in run(["nm", "--format=posix", str(file)]).splitlines():
        name, kind = line.split()[:2]
        found.setdefault(kind, []).append(name)
    return found


def shared(file: Path) -> set[str]:
    """The symbols by which objects can meet: what is defined for others, weak or unique in the process."""
    return {name for kind, names in symbols(file).items() if kind in "ABCDGRSTVWuvwi" for name in names}


# ---- the kernels ----


@pytest.mark.parametrize("isa", sources.isas())
def test_an_object_shares_one_function(isa):
    (name,) = shared(kernels(isa))
    assert re.search(rf"\d{isa}_kernelsEv$", name)


@x86_only
@pytest.mark.parametrize("isa", sources.isas())
def test_an_object_needs_its_instruction_set(isa):
    assert widest(instructions(kernels(isa))) == isa


@x86_only
def test_the_module_runs_on_every_cpu():
    assert widest(instructions(module())) == "baseline"


CLANG = pytest.param(
    "clang++", marks=pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++: not found"), id="clang"
)


@pytest.mark.slow
@pytest.mark.parametrize("cxx", [pytest.param(None, id="default"), CLANG])
@pytest.mark.parametrize("isa", sources.isas())
def test_compilers_have_nothing_to_say(isa, cxx):
    file = compiled(CSRC / "kernels.cpp", *sources.kernel_options(isa), cxx=cxx)
    assert len(shared(file)) == 1
    assert not IS_X86 or widest(instructions(file)) == isa


# ---- the checks themselves ----


def small(folder: Path, text: str, *options: str) -> Path:
    source = folder / "small.cpp"
    source.write_text(text)
    return compiled(source, *sources.OPTIONS, *options)


SUM = "float f(const float* x) { float y = 0; for (int i = 0; i < 64; ++i) y += x[i] * x[i]; return y; }\n"
INLINE = "#include <vector>\nvoid f(std::vector<float>& x) { x.push_back(1.0f); }\n"
UNIQUE = "template <class T> int& count() { static int n; return n; }\nint f() { return ++count<int>(); }\n"


@x86_only
@pytest.mark.parametrize(
    ("options", "isa"),
    [
        ((), "baseline"),
        (("-mavx",), "avx2"),  # one lane, but in the new encoding
        (("-mavx2", "-mfma", "-ffast-math"), "avx2"),
        (("-mavx512f", "-ffast-math", "-mprefer-vector-width=512"), "avx512"),
    ],
    ids=["none", "avx", "avx2", "avx512"],
)
def test_wrong_options_are_seen(tmp_path, options, isa):
    assert widest(instructions(small(tmp_path, SUM, *options))) == isa


@pytest.mark.parametrize(
    ("text", "is_alone"),
    [
        pytest.param(SUM, True, id="one function"),
        pytest.param(SUM + "int g() { return 1; }\n", False, id="two functions"),
        pytest.param("int n;\n" + SUM, False, id="a variable"),
        pytest.param(INLINE, False, id="of the library"),
        pytest.param(UNIQUE, False, id="static in a template"),
    ],
)
def test_other_symbols_are_seen(tmp_path, text, is_alone):
    assert (len(shared(small(tmp_path, text))) == 1) is is_alone
