"""The build of the CPU kernels: without NVRTC, what a change makes it do again, and what a wheel has of them."""

from __future__ import annotations

import platform
import re
import zipfile

import pytest

from tests.support.native_build import (
    CPU,
    CPU_EDGES,
    CPU_FILE,
    ISAS,
    LAUNCHER_FILE,
    MODULES,
    ROOT,
    Settings,
    Tree,
    build_native,
    edges,
)

lacking = build_native.why_no_cpu(Settings.read({}))
needs_tools = pytest.mark.skipif(lacking is not None, reason=f"the build of the CPU kernels: {lacking}")
sources = build_native.cpu_sources
NO_NVRTC = {"FASTATTN_NVRTC_LIB": str(ROOT / "LICENSE")}  # no library


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Tree:
    """A tree, built once where there is no NVRTC; only to be read and copied."""
    tree = Tree(tmp_path_factory.mktemp("finished") / "tree")
    tree.said = tree.build(**NO_NVRTC)
    return tree


@pytest.fixture
def tree(finished, tmp_path) -> Tree:
    """A tree to change: a copy of the finished one."""
    return finished.copy(tmp_path / "tree")


# ---- without NVRTC ----


@needs_tools
def test_they_are_built_without_nvrtc(finished):
    assert edges(finished.said) == {CPU_EDGES}
    assert finished.built == {"build.json", CPU_FILE}
    assert finished.manifest["reason"].startswith("no usable NVRTC") and finished.manifest["cpu"] == CPU
    assert "fastattn: installed without CUDA kernels: no usable NVRTC" in finished.said
    assert f"fastattn: installed with CPU kernels for {', '.join(ISAS)}\n" in finished.said


@needs_tools
def test_each_object_is_that_of_its_instruction_set(finished):
    for isa in ISAS:
        assert f"{isa}_kernels".encode() in (finished.folder / f"build/native/cpu/{isa}.o").read_bytes()


@needs_tools
def test_demanded_cuda_kernels_are_still_demanded(tree):
    said = tree.failure(**NO_NVRTC, FASTATTN_BUILD_CUDA="1")
    assert "FASTATTN_BUILD_CUDA=1, but the CUDA kernels cannot be built: no usable NVRTC" in said


@needs_tools
def test_a_missing_compiler_takes_them_away(tree):
    said = tree.build(**NO_NVRTC, CXX="none")
    assert "fastattn: installed without CPU kernels: no C++ compiler (none)" in said
    assert (tree.built, tree.manifest["cpu"]) == ({"build.json"}, {"reason": "no C++ compiler (none)"})


# ---- what is done again ----

KERNELS, MODULE = {f"{len(ISAS) + 1} CPU"}, {"2 CPU"}  # with the link


@needs_tools
@pytest.mark.parametrize(
    ("touched", "expected"),
    [
        ("csrc/cpu/kernels.cpp", KERNELS),
        ("csrc/cpu/vectors.h", KERNELS),
        ("csrc/cpu/module.cpp", MODULE),
        ("csrc/cpu/work.h", MODULE),
        ("csrc/attention.h", {CPU_EDGES}),
        ("csrc/attention.cu", set()),
        ("csrc/table.h", set()),
        ("csrc/driver.h", set()),
        ("csrc/launcher.cpp", set()),
    ],
)
def test_a_change_rebuilds_what_depends_on_it(tree, touched, expected):
    (tree.folder / touched).touch()
    assert edges(tree.build(**NO_NVRTC)) == expected
    assert edges(tree.build(**NO_NVRTC)) == set()


@needs_tools
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [('"-O3"', '"-O1"', {CPU_EDGES}), ('"baseline": ()', '"baseline": ("-O1",)', {"2 CPU"})],
    ids=["all", "baseline"],
)
def test_other_options_rebuild_what_has_them(tree, old, new, expected):
    file = tree.folder / "fastattn/cpu_kernels/sources.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert edges(tree.build(**NO_NVRTC)) == expected


@needs_tools
@pytest.mark.parametrize("file", ["vectors.h", "work.h"])
def test_what_does_not_compile_fails_and_leaves_the_package(tree, file):
    before = tree.built, tree.manifest
    with (tree.folder / "csrc/cpu" / file).open("a") as target:
        target.write("\nthis is no declaration\n")
    said = tree.failure(**NO_NVRTC)
    assert re.search(rf"{file}:\d+:\d+: error", said) and "CXX names another compiler, CXX=none does without" in said
    assert (tree.built, tree.manifest) == before


# ---- a wheel ----


@needs_tools
def test_a_wheel_of_them_alone_is_for_this_platform(tree):
    program = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    result = tree.run("-c", program, **NO_NVRTC)
    assert result.returncode == 0, result.stderr
    assert edges(result.stdout) == set()  # the tree's script did it before
    (wheel,) = (tree.folder / "dist").glob("*.whl")
    names = {name.removeprefix("fastattn/") for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert names == {CPU_FILE, "_kernels/build.json", "__init__.py", *(f"{name}.py" for name in MODULES)}
    assert "-none-any" not in wheel.name and LAUNCHER_FILE not in names


# ---- instruction sets ----


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_a_machine_gets_its_instruction_sets(monkeypatch, machine):
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    text = build_native.cpu_graph(Settings.read({})).replace("$\n   ", "")
    expected = ["avx512", "avx2", "baseline"] if machine == "x86_64" else ["baseline"]
    assert re.findall(r"-DFASTATTN_ISA=(\w+)", text) == expected
    assert re.search(r": link module\.o (.*)", text)[1].split() == [f"{isa}.o" for isa in expected]
    baseline = re.search(r"options = (.*-DFASTATTN_ISA=baseline)", text)[1]
    assert " -m" not in baseline and "-fopenmp" not in text


def test_the_module_asks_the_cpu_for_all_that_the_options_name():
    module = (ROOT / "csrc/cpu/module.cpp").read_text()
    asked = re.findall(r'__builtin_cpu_supports\("(\w+)"\)', module)
    sets = sources.isas("x86_64")
    named = {
        isa: {option.removeprefix("-m") for option in options if not option.startswith("-mprefer")}
        for isa, options in sets.items()
    }
    assert named["baseline"] == set() and named["avx2"] < named["avx512"]
    assert sorted(asked) == sorted(named["avx512"])  # once each
    assert set(re.findall(r'"(\w+)"', re.search(r"has_avx2 = (.*);", module)[1])) == named["avx2"]


def test_the_sources_know_the_instruction_sets_of_the_table():
    declared = re.findall(r"^const CpuKernels\* (\w+)_kernels\(\);", (ROOT / "csrc/cpu/kernels.h").read_text(), re.M)
    assert declared == list(sources.isas("x86_64"))
    assert all(list(sets)[-1] == "baseline" for sets in sources.ISAS.values())
