"""The settings of the native build: architectures and other variables, and what it does where a tool is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.support.native_build import CPU, CPU_FILE, Settings, Tree, build_native, build_settings, lacking, needs_tools

# ---- variables of the environment ----


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", []),  # those of this machine
        ("all", ["sm_60", "sm_70", "sm_75", "sm_80", "sm_90", "compute_60", "compute_90"]),
        ("60", ["sm_60"]),
        ("60;sm_75; compute_90;", ["sm_60", "sm_75", "compute_90"]),
        ("sm_80;80", ["sm_80"]),
        ("120", ["sm_120"]),
    ],
)
def test_architectures(text, archs):
    assert list(map(str, Settings.read({"FASTATTN_CUDA_ARCHS": text}).archs)) == archs


@pytest.mark.parametrize(
    ("found", "archs"),
    [
        ((), ["sm_60"]),  # the card that this is made for
        ((75,), ["sm_75"]),
        ((60, 86), ["sm_60", "sm_86"]),
        ((50,), ["sm_60"]),  # too old for any kernel
        ((200,), ["compute_90"]),  # unknown to the compiler: what its driver can compile
    ],
    ids=str,
)
def test_architectures_of_a_machine(found, archs, monkeypatch, capsys):
    monkeypatch.setattr(build_settings.gpus, "capabilities", lambda: found)
    chosen = Settings.read({}).archs_of_this_machine([60, 70, 75, 80, 86, 90])
    assert list(map(str, chosen)) == archs
    said = capsys.readouterr().out
    assert f"building {', '.join(archs)};" in said and "FASTATTN_CUDA_ARCHS=all" in said


def test_gpus_are_those_of_the_driver(tmp_path):
    library = tmp_path / "libcuda.so"
    source = """
    extern "C" int cuInit(unsigned) { return 0; }
    extern "C" int cuDeviceGetCount(int* n) { *n = 3; return 0; }
    extern "C" int cuDeviceGet(int* device, int n) { *device = n + 40; return 0; }
    extern "C" int cuDeviceGetAttribute(int* x, int which, int device) {
        const int major[] = {8, 6, 8}, minor[] = {6, 0, 6};
        *x = which == 75 ? major[device - 40] : which == 76 ? minor[device - 40] : -1;
        return 0;
    }
    """
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    assert build_settings.gpus.capabilities(str(library)) == (60, 86)
    assert build_settings.gpus.capabilities(str(tmp_path / "none.so")) == ()


@pytest.mark.parametrize("text", ["50", "6", "6.0", "sm60", "compute_", "90a", "60,70", "All"])
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
    completed = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command) or completed)
    build_native._run_ninja(tmp_path, "", 3, "failed")
    assert commands[0][-2:] == ["-j", "3"]


# ---- without the tools ----


def test_no_cuda_kernels_on_request(tmp_path):
    tree = Tree(tmp_path / "tree")
    assert "installed without CUDA kernels: FASTATTN_BUILD_CUDA=0" in tree.build(FASTATTN_BUILD_CUDA="0")
    assert tree.manifest["reason"] == "FASTATTN_BUILD_CUDA=0"
    assert tree.built <= {"build.json", CPU_FILE}


@needs_tools
def test_what_is_not_built_any_more_is_taken_away(tree):
    tree.build(FASTATTN_BUILD_CUDA="0")
    assert (tree.built, tree.manifest) == ({"build.json", CPU_FILE}, {"reason": "FASTATTN_BUILD_CUDA=0", "cpu": CPU})
    tree.build(CXX="none")
    assert tree.built == {"build.json"}


MISSING = {
    "system": r"tested and built on Linux, and this is \w+",
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
        (tmp_path / "libnvrtc.so").write_text("not a library")
        monkeypatch.setenv("FASTATTN_NVRTC_LIB", str(tmp_path / "libnvrtc.so"))
    elif what != "compiler":
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == what else found(name))
    settings = Settings.read(environment)
    reason = build_native.why_no_cuda(settings)
    assert re.search(MISSING[what], reason)
    assert lacking or "; no" not in reason  # and it is the only one
    no_cpu = build_native.why_no_cpu(settings)
    assert lacking or no_cpu == (None if what == "nvrtc" else reason)


@needs_tools
def test_a_missing_tool_is_no_failure_unless_kernels_are_demanded(tree):
    said = tree.build(CXX="/nonexistent/c++")
    reason = "no C++ compiler (/nonexistent/c++)"
    assert f"installed without CUDA kernels: {reason}" in said and f"installed without CPU kernels: {reason}" in said
    assert tree.manifest == {"reason": reason, "cpu": {"reason": reason}}
    said = tree.failure(CXX="/nonexistent/c++", FASTATTN_BUILD_CUDA="1")
    assert "FASTATTN_BUILD_CUDA=1, but the CUDA kernels cannot be built: no C++ compiler" in said
