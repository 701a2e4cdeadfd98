"""The native build, on a small tree of its own: one kernel, two architectures, a launcher without pybind11."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = "60;compute_80"
IMAGES = {f"attention_{e}.{a}" for e in ("float32", "float16", "bfloat16") for a in ("sm_60.cubin", "compute_80.ptx")}

KERNELS = """
#include "table.h"
extern "C" __global__ void first(FASTATTN_ELEMENT* x) { x[0] = FASTATTN_ELEMENT(kFactor); }
extern "C" __global__ void second() {}
"""
TABLE = """
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "elsewhere.h"
#endif
constexpr float kFactor = 3.0f;
"""
LAUNCHER = '#include "driver.h"\nextern "C" int answer() { return kAnswer; }\n'


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "scripts" / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


build_native = load()
LAUNCHER_FILE = build_native.LAUNCHER
Settings = build_native.Settings
lacking = build_native.why_pure_python(Settings.read({}))
needs_tools = pytest.mark.skipif(lacking is not None, reason=f"the native build: {lacking}")


class Tree:
    """A copy of the build's own files with small sources."""

    said = ""  # by the first build

    def __init__(self, folder: Path):
        self.folder, self.package = folder, folder / "fastattn"
        files = [
            "scripts/build_native.py",
            *(f"fastattn/cuda_kernels/{name}.py" for name in ("__init__", "nvrtc", "sources")),
        ]
        for name in [*files, "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (self.package / "__init__.py").write_text("")
        sources = {"attention.cu": KERNELS, "table.h": TABLE, "launcher.cpp": LAUNCHER}
        for name, text in (sources | {"driver.h": "constexpr int kAnswer = 42;\n"}).items():
            self.write(f"csrc/{name}", text)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
        environment = inherited | {"FASTATTN_CUDA_ARCHS": ARCHS} | environment
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)

    def build(self, **environment: str) -> str:
        """What the build says; it has to succeed."""
        result = self.run("scripts/build_native.py", **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def failure(self, **environment: str) -> str:
        """What the build says; it has to fail."""
        result = self.run("scripts/build_native.py", **environment)
        assert result.returncode != 0, result.stdout
        return result.stdout + result.stderr

    @property
    def manifest(self) -> dict:
        return json.loads((self.package / "_kernels/build.json").read_text())

    @property
    def built(self) -> set[str]:
        """The files of the native part in the package."""
        names = {str(file.relative_to(self.package)) for file in self.package.rglob("*") if file.is_file()}
        return {name.removeprefix("_kernels/") for name in names if "_kernels/" in name or name == LAUNCHER_FILE}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Tree:
    """A tree, built; only to be read and copied."""
    tree = Tree(tmp_path_factory.mktemp("finished") / "tree")
    tree.said = tree.build()
    return tree


@pytest.fixture
def tree(finished, tmp_path) -> Tree:
    """A copy of the finished one."""
    shutil.copytree(finished.folder, tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    copy = Tree.__new__(Tree)
    copy.folder, copy.package = tmp_path / "tree", tmp_path / "tree" / "fastattn"
    return copy


def edges(output: str) -> set[str]:
    """What ninja ran: "image" or "launcher", with the number of them."""
    ran = re.findall(r"^\[\d+/\d+\] (NVRTC|C\+\+)", output, re.MULTILINE)
    assert bool(ran) is ("no work to do" not in output)
    return {f"{ran.count(kind)} {kind}" for kind in set(ran)}


# ---- the result ----


@needs_tools
def test_everything_is_built(finished):
    assert edges(finished.said) == {"6 NVRTC", "1 C++"}
    assert finished.built == IMAGES | {"build.json", LAUNCHER_FILE}
    kernels = finished.package / "_kernels"
    assert all((kernels / name).read_bytes().startswith(b"\x7fELF") for name in IMAGES if name.endswith("cubin"))
    assert all(b".target sm_80" in (kernels / name).read_bytes() for name in IMAGES if name.endswith("ptx"))
    assert len({(kernels / name).read_bytes() for name in IMAGES}) == 6  # the element types differ


@needs_tools
def test_build_json_describes_it(finished):
    manifest = finished.manifest
    assert manifest["architectures"] == ["sm_60", "compute_80"]
    assert manifest["nvrtc"] == build_native.nvrtc.find().version
    options = {"sm_60": "--std=c++17 -default-device --ptxas-options=-v", "compute_80": "--std=c++17 -default-device"}
    assert manifest["options"] == options
    assert manifest["commit"] is None  # the tree is no repository
    sources = build_native.kernel_sources.KernelSources.read(finished.folder / "csrc")
    assert (set(sources.files), manifest["sources"]) == ({"attention.cu", "table.h"}, sources.digest)
    assert set(manifest["images"]) == IMAGES
    machine_code = manifest["images"]["attention_float32.sm_60.cubin"]["kernels"]
    assert set(machine_code) == {"first", "second"}
    assert machine_code["first"]["registers"] > 0 and machine_code["first"]["spill_bytes"] == 0
    assert manifest["images"]["attention_float32.compute_80.ptx"]["kernels"] == {"first": None, "second": None}


@needs_tools
def test_the_output_counts_the_kernels(finished):
    assert re.search(
        r"^  sm_60 +2 \+ 2 \+ 2 = 6 kernels, .* at most \d+ registers, 0 kernels spill$", finished.said, re.M
    )
    assert re.search(r"^  compute_80 +2 \+ 2 \+ 2 = 6 kernels, [\d.]+ MB$", finished.said, re.M)
    assert re.search(r"^fastattn: 12 kernels in 6 images, .* NVRTC \d+\.\d+, \d+ s$", finished.said, re.M)


# ---- what is done again ----


@needs_tools
def test_nothing_changed_means_no_work(tree):
    before = {name: (tree.package / "_kernels" / name).stat() for name in IMAGES}
    assert edges(tree.build()) == set()
    assert {name: (tree.package / "_kernels" / name).stat().st_mtime_ns for name in IMAGES} == {
        name: stat.st_mtime_ns for name, stat in before.items()
    }


@needs_tools
@pytest.mark.parametrize(
    ("touched", "expected"),
    [
        ("csrc/attention.cu", {"6 NVRTC"}),
        ("csrc/table.h", {"6 NVRTC"}),
        ("fastattn/cuda_kernels/nvrtc.py", {"6 NVRTC"}),
        ("fastattn/cuda_kernels/sources.py", {"6 NVRTC"}),
        ("csrc/launcher.cpp", {"1 C++"}),
        ("csrc/driver.h", {"1 C++"}),
        ("fastattn/__init__.py", set()),
    ],
)
def test_a_change_rebuilds_what_depends_on_it(tree, touched, expected):
    (tree.folder / touched).touch()
    assert edges(tree.build()) == expected
    assert edges(tree.build()) == set()


@needs_tools
def test_another_compiler_means_another_launcher(tree, tmp_path):
    compiler = tmp_path / "another c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert edges(tree.build(CXX=f"'{compiler}'")) == {"1 C++"}


def test_the_graph_names_no_place():
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    sources = build_native.kernel_sources.KernelSources({"attention.cu": "", "mask.cuh": ""})
    text = build_native.graph(Settings.read({}), sources, "12.9")
    assert "../../csrc/mask.cuh" in text
    # Isolated builds have their tools in another folder each time, and have to find their work done all the same.
    assert not [place for place in (str(ROOT), sys.prefix, "site-packages", " /") if place in text]
    assert text.count("build attention_") == 21 and text.count("build _launcher") == 1


@needs_tools
def test_other_architectures_replace_the_images(tree):
    assert edges(tree.build(FASTATTN_CUDA_ARCHS="75")) == {"3 NVRTC"}
    assert tree.manifest["architectures"] == ["sm_75"]
    images = {f"attention_{element}.sm_75.cubin" for element in ("float32", "float16", "bfloat16")}
    assert tree.built == images | {"build.json", LAUNCHER_FILE}
    assert edges(tree.build()) == set()  # the others are still in build/
    assert tree.built == IMAGES | {"build.json", LAUNCHER_FILE}


# ---- errors ----


@needs_tools
@pytest.mark.parametrize(
    ("file", "message"),
    [("csrc/table.h", r"table\.h\(\d+\): error"), ("csrc/driver.h", r"driver\.h:\d+:\d+: error")],
)
def test_what_does_not_compile_fails_and_leaves_the_package(tree, file, message):
    before = tree.built, tree.manifest
    with (tree.folder / file).open("a") as target:
        target.write("\nthis is no declaration\n")
    said = tree.failure()
    assert re.search(message, said) and "FASTATTN_BUILD_CUDA=0 does without them" in said
    assert (tree.built, tree.manifest) == before


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", ["sm_60", "sm_70", "sm_75", "sm_80", "sm_90", "compute_60", "compute_90"]),
        ("60", ["sm_60"]),
        ("60;sm_75; compute_90;", ["sm_60", "sm_75", "compute_90"]),
        ("sm_80;80", ["sm_80"]),
        ("120", ["sm_120"]),
    ],
)
def test_architectures(text, archs):
    assert list(map(str, Settings.read({"FASTATTN_CUDA_ARCHS": text}).archs)) == archs


@pytest.mark.parametrize("text", ["50", "6", "6.0", "sm60", "compute_", "90a", "60,70", "all"])
def test_a_wrong_architecture_is_named_with_the_possible_ones(text):
    with pytest.raises(ValueError, match=f"^FASTATTN_CUDA_ARCHS: .* got '{text}'") as raised:
        Settings.read({"FASTATTN_CUDA_ARCHS": f"75;{text}"})
    assert lacking or re.search(r"; NVRTC \d+\.\d+ compiles for .*\b75, 80\b", str(raised.value))


@needs_tools
def test_an_architecture_that_nvrtc_lacks_is_named_with_the_possible_ones(tree):
    said = tree.failure(FASTATTN_CUDA_ARCHS="80;compute_95")
    assert re.search(r"FASTATTN_CUDA_ARCHS: compute_95 cannot be built; NVRTC \d+\.\d+ compiles for .*\b75, 80\b", said)


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("FASTATTN_BUILD_CUDA", "no", "must be 0 or 1"),
        ("MAX_JOBS", "many", "must be a number of at least 1"),
        ("MAX_JOBS", "0", "must be a number of at least 1"),
    ],
)
def test_other_wrong_values(variable, value, rule):
    with pytest.raises(ValueError, match=f"^{variable}: {rule}, got '{value}'$"):
        Settings.read({variable: value})


def test_number_of_jobs(monkeypatch, tmp_path):
    assert (Settings.read({}).jobs, Settings.read({"MAX_JOBS": "3"}).jobs) == (os.cpu_count(), 3)
    commands = []
    monkeypatch.setattr(build_native, "WORK", tmp_path)
    completed = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command) or completed)
    build_native._run_ninja("", 3)
    assert commands[0][-2:] == ["-j", "3"]


# ---- without the tools ----


def test_pure_python_on_request(tmp_path):
    tree = Tree(tmp_path / "tree")
    assert "installed without CUDA kernels: FASTATTN_BUILD_CUDA=0" in tree.build(FASTATTN_BUILD_CUDA="0")
    assert (tree.built, tree.manifest) == ({"build.json"}, {"reason": "FASTATTN_BUILD_CUDA=0"})


@needs_tools
def test_pure_python_takes_earlier_kernels_away(tree):
    tree.build(FASTATTN_BUILD_CUDA="0")
    assert tree.built == {"build.json"}


MISSING = {
    "system": r"built on Linux, and this is \w+",
    "compiler": r"no C\+\+ compiler \(/nonexistent/c\+\+\)",
    "headers": r"no headers of Python \(python3-dev\)",
    "pybind11": r"no package pybind11",
    "ninja": r"no package ninja",
    "nvrtc": r"no usable NVRTC: .*pip install nvidia-cuda-nvrtc-cu12",
}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_tool_is_the_reason(monkeypatch, tmp_path, what):
    environment = {"CXX": "/nonexistent/c++"} if what == "compiler" else {}
    if what == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif what == "headers":
        monkeypatch.setattr(build_native.sysconfig, "get_path", lambda name: str(tmp_path))
    elif what == "nvrtc":
        monkeypatch.setattr(build_native.nvrtc, "_libraries", lambda: iter(()))
    elif what != "compiler":
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == what else found(name))
    reason = build_native.why_pure_python(Settings.read(environment))
    assert re.search(MISSING[what], reason)
    assert lacking or "; no" not in reason  # and it is the only one


@needs_tools
def test_a_missing_tool_is_no_failure_unless_kernels_are_demanded(tree):
    said = tree.build(CXX="/nonexistent/c++")
    assert "installed without CUDA kernels: no C++ compiler (/nonexistent/c++)" in said
    assert tree.manifest == {"reason": "no C++ compiler (/nonexistent/c++)"}
    said = tree.failure(CXX="/nonexistent/c++", FASTATTN_BUILD_CUDA="1")
    assert "FASTATTN_BUILD_CUDA=1, but the CUDA kernels cannot be built: no C++ compiler" in said


# ---- images from elsewhere ----


@pytest.fixture
def prebuilt(tree, tmp_path) -> Path:
    """The images of a tree that no longer has them."""
    (tree.package / "_kernels").rename(tmp_path / "prebuilt")
    shutil.rmtree(tree.folder / "build")
    return tmp_path / "prebuilt"


@needs_tools
def test_prebuilt_images_are_taken(tree, prebuilt):
    said = tree.build(FASTATTN_PREBUILT_KERNELS=str(prebuilt), FASTATTN_NVRTC_LIB="/nonexistent")
    assert edges(said) == {"1 C++"}
    assert tree.built == IMAGES | {"build.json", LAUNCHER_FILE}
    assert tree.manifest == json.loads((prebuilt / "build.json").read_text())


@needs_tools
def test_a_part_of_the_prebuilt_images(tree, prebuilt):
    tree.build(FASTATTN_PREBUILT_KERNELS=str(prebuilt), FASTATTN_CUDA_ARCHS="60")
    assert tree.manifest["architectures"] == ["sm_60"]
    assert {name for name in tree.built if name.startswith("attention")} == {i for i in IMAGES if "sm_60" in i}
    assert set(tree.manifest["images"]) == {i for i in IMAGES if "sm_60" in i}


@needs_tools
def test_lacking_prebuilt_images_are_named(tree, prebuilt):
    (prebuilt / "attention_float16.sm_60.cubin").unlink()
    said = tree.failure(FASTATTN_PREBUILT_KERNELS=str(prebuilt))
    assert f"FASTATTN_PREBUILT_KERNELS: {prebuilt} lacks attention_float16.sm_60.cubin\n" in said
    said = tree.failure(FASTATTN_PREBUILT_KERNELS="/nonexistent", FASTATTN_CUDA_ARCHS="60")
    assert "/nonexistent lacks build.json, attention_float32.sm_60.cubin, attention_float16.sm_60.cubin" in said


@needs_tools
def test_prebuilt_images_of_other_sources_are_refused(tree, prebuilt):
    with (tree.folder / "csrc/table.h").open("a") as file:
        file.write("// changed\n")
    assert "is built from other sources than csrc" in tree.failure(FASTATTN_PREBUILT_KERNELS=str(prebuilt))


# ---- through setuptools ----


def through_setuptools(tree: Tree, hook: str, **environment: str) -> subprocess.CompletedProcess:
    return tree.run("-c", f"from setuptools import build_meta; build_meta.{hook}('dist')", **environment)


@needs_tools
def test_an_editable_installation_builds_in_the_tree(tree):
    shutil.rmtree(tree.package / "_kernels")
    result = through_setuptools(tree, "build_editable")
    assert result.returncode == 0, result.stderr
    assert edges(result.stdout) == set()  # the tree's script did it before
    assert tree.built == IMAGES | {"build.json", LAUNCHER_FILE}


@needs_tools
@pytest.mark.parametrize("hook", ["build_editable", "build_wheel"])
def test_an_installation_fails_if_the_kernels_do_not_compile(tree, hook):
    tree.write("csrc/table.h", "no declaration")
    result = through_setuptools(tree, hook)
    assert result.returncode != 0
    assert "table.h(1): error" in result.stdout and "do not compile" in result.stderr


@needs_tools
def test_a_wheel_has_images_launcher_and_sources(tree):
    shutil.rmtree(tree.package / "_kernels")
    assert through_setuptools(tree, "build_wheel").returncode == 0
    (wheel,) = (tree.folder / "dist").glob("*.whl")
    names = {name.removeprefix("fastattn/") for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    sources = {"src/attention.cu", "src/table.h"}
    in_kernels = {f"_kernels/{name}" for name in IMAGES | sources | {"build.json"}}
    assert names == in_kernels | {
        LAUNCHER_FILE,
        "__init__.py",
        *(f"cuda_kernels/{name}.py" for name in ("__init__", "nvrtc", "sources")),
    }
    assert "-none-any" not in wheel.name and tree.built == {LAUNCHER_FILE}


def test_a_wheel_without_kernels_is_for_every_machine(tmp_path):
    tree = Tree(tmp_path / "tree")
    result = through_setuptools(tree, "build_wheel", FASTATTN_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree.folder / "dist").glob("*-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    assert json.loads(archive.read("fastattn/_kernels/build.json")) == {"reason": "FASTATTN_BUILD_CUDA=0"}
    assert not [name for name in archive.namelist() if "_launcher" in name]
