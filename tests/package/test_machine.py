"""The description that `detect` gives of this machine, and of others by their files and variables."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

import fastattn.cpu_kernels
from fastattn import info
from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.sources import Arch
from fastattn.machine import CpuKernels, VisibleGpu, detect


def test_detects_what_torch_says():
    system = detect()
    assert system.versions["torch"] == str(torch.__version__)
    assert system.torch_sees_gpus == torch.cuda.is_available()
    assert not torch.cuda.is_available() or len(system.gpus) == torch.cuda.device_count()


def test_detects_what_was_built(monkeypatch, tmp_path):
    (tmp_path / "attention.cu").write_text("// not this tree's")
    installation = images.Installation(kernels=tmp_path, csrc=tmp_path)
    sources = installation.sources().digest
    manifest = {"architectures": ["sm_60", "compute_90"], "nvrtc": "12.9", "sources": sources, "commit": None}
    (tmp_path / "build.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("FASTATTN_CACHE_DIR", "/cache")
    system = detect(installation)
    assert system.kernels.archs == (Arch("sm", 60), Arch("compute", 90))
    assert (system.kernels_problem, system.cache_dir) == (None, "/cache")
    (tmp_path / "build.json").write_text(json.dumps(manifest | {"sources": "others"}))
    assert "csrc has changed" in detect(installation).kernels_problem


def test_detects_the_compiler_for_run_time(monkeypatch):
    monkeypatch.setenv("FASTATTN_NVRTC_LIB", "/nonexistent")
    system = detect()
    assert system.nvrtc is None and "FASTATTN_NVRTC_LIB: must be a file" in system.nvrtc_problem


def test_detects_the_compiler_of_the_installation():
    def find(capability):
        raise nvrtc.NotFound("no compiler")

    system = detect(replace(images.HERE, find=find))
    assert (system.nvrtc, system.nvrtc_problem) == (None, "no compiler")


@pytest.mark.parametrize("launcher", [None, types.ModuleType("fastattn._launcher")])
def test_detects_the_launcher(monkeypatch, launcher):
    monkeypatch.setitem(sys.modules, "fastattn._launcher", launcher)
    assert (detect().launcher_problem is None) is (launcher is not None)


# ---- the CPU kernels ----


def cpu_module(monkeypatch, module: types.ModuleType | None) -> None:
    """Lets this module, or none, be fastattn._cpu."""
    monkeypatch.setitem(sys.modules, "fastattn._cpu", module)
    monkeypatch.setattr(fastattn, "_cpu", module, raising=False)
    # What is imported on top of it is forgotten afterwards, too.
    monkeypatch.setattr(fastattn.cpu_kernels, "attention", None, raising=False)
    monkeypatch.setitem(sys.modules, "fastattn.cpu_kernels.attention", None)
    del sys.modules["fastattn.cpu_kernels.attention"]


@pytest.fixture
def two_sets(monkeypatch) -> None:
    """A CPU with two instruction sets."""
    monkeypatch.delenv("FASTATTN_CPU_ISA", raising=False)
    module = types.ModuleType("fastattn._cpu")
    module.ISAS, module.threading = ("avx2", "baseline"), lambda: "pool"
    cpu_module(monkeypatch, module)


@pytest.mark.parametrize("wanted", ["avx2", "baseline"])
def test_detects_the_instruction_set_that_runs(monkeypatch, two_sets, wanted):
    assert detect().cpu_kernels == CpuKernels(("avx2", "baseline"), "avx2", "pool", None)
    monkeypatch.delitem(sys.modules, "fastattn.cpu_kernels.attention")
    monkeypatch.setenv("FASTATTN_CPU_ISA", wanted)
    assert detect().cpu_kernels.isa == wanted


def test_detects_a_wrong_instruction_set(monkeypatch, two_sets):
    monkeypatch.setenv("FASTATTN_CPU_ISA", "avx512")
    reason = "FASTATTN_CPU_ISA: must be one of those that this CPU has, avx2, baseline, got 'avx512'"
    assert detect().cpu_kernels == CpuKernels(("avx2", "baseline"), None, None, reason)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ({"cpu": {"reason": "no C++ compiler (c++)"}}, "no C++ compiler"),
        ({"reason": "no C++ compiler (c++)"}, "no C++ compiler"),  # of a version without CPU kernels
        ({"cpu": {"isas": ["avx2", "baseline"]}}, "_cpu"),  # built, but for another Python: the import's own words
        (None, "fastattn is not installed: this is a copy of its files"),
    ],
    ids=["not built", "older", "another Python", "a copy"],
)
def test_detects_why_there_are_no_cpu_kernels(monkeypatch, tmp_path, manifest, reason):
    cpu_module(monkeypatch, None)
    if manifest is not None:
        (tmp_path / "build.json").write_text(json.dumps(manifest))
    found = detect(images.Installation(kernels=tmp_path, csrc=tmp_path)).cpu_kernels
    assert (found.isas, found.isa, found.threads) == ((), None, None)
    assert reason in found.reason


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    report = info.gather(detect())
    assert report["compiler"] is None
    assert any("no C++ compiler" in problem["problem"] for problem in report["problems"])


@pytest.mark.parametrize("hidden", [False, True])
def test_gpus_that_torch_cannot_see_are_listed_unless_hidden(monkeypatch, tmp_path, hidden):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '535.104.05, 6.0, Tesla P100-PCIE-16GB'\necho '535.104.05, 7.0, Tesla V100, the second'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if hidden else "0,1")
    system = detect()
    gpus = (VisibleGpu("Tesla P100-PCIE-16GB", (6, 0)), VisibleGpu("Tesla V100, the second", (7, 0)))
    assert system.driver == "535.104.05"
    assert system.gpus == (() if hidden else gpus)
