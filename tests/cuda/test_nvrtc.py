"""NVRTC through ctypes: the search for it, compilation, and the reading of its log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastattn.cuda_kernels import nvrtc

SOURCE = """
#include "factor.h"
extern "C" __global__ void scale(float* x) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = FACTOR * tile[31 - threadIdx.x];
}
extern "C" __global__ void nothing() {}
"""
FACTOR_2 = {"factor.h": "#define FACTOR 2.0f"}
SPILLING = """
extern "C" __global__ void wide(float* x, int rounds) {
    float values[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i] = x[i * 32 + threadIdx.x];
    for (int round = 0; round < rounds; ++round)
#pragma unroll
        for (int i = 0; i < 64; ++i) values[i] += round * values[(5 * i + 1) % 64];
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = values[i];
}
"""
VERBOSE = ("--ptxas-options=-v",)


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Nvrtc:
    try:
        return nvrtc.find()
    except nvrtc.NotFound as error:
        pytest.skip(str(error))


# ---- compiling ----


def test_version_and_architectures(compiler):
    major, minor = map(int, compiler.version.split("."))
    assert (major, minor) >= (12, 0)
    assert list(compiler.architectures) == sorted(compiler.architectures)
    assert {60, 70, 75, 80, 90} <= set(compiler.architectures)


def test_machine_code_and_ptx(compiler):
    machine_code = compiler.compile(SOURCE, "sm_80", headers=FACTOR_2)
    assert machine_code.image.startswith(b"\x7fELF") and machine_code.log == ""
    assert int.from_bytes(machine_code.image[48:52], "little") & 0xFF == 80  # the architecture in ELF's e_flags
    ptx = compiler.compile(SOURCE, "compute_60", headers=FACTOR_2).image
    assert b".target sm_60" in ptx and b".entry scale(" in ptx and not ptx.endswith(b"\0")


def test_headers_defines_and_folders_reach_the_source(compiler, tmp_path):
    def with_factor(**how) -> bytes:
        return compiler.compile(SOURCE, "compute_80", **how).image

    two = with_factor(headers=FACTOR_2)
    assert two != with_factor(headers={"factor.h": "#define FACTOR 3.0f"})
    assert two == with_factor(headers={"factor.h": ""}, defines={"FACTOR": "2.0f"})
    (tmp_path / "factor.h").write_text(FACTOR_2["factor.h"])
    assert two == with_factor(include_dirs=[tmp_path])


def test_headers_of_cuda_are_found(compiler):
    source = (
        '#include <cuda_fp16.h>\n#include <cuda_bf16.h>\nextern "C" __global__ void f(__half* x) { *x = __half(1); }'
    )
    assert compiler.compile(source, "sm_60").image.startswith(b"\x7fELF")


def test_an_error_shows_the_log(compiler):
    with pytest.raises(
        nvrtc.CompileError, match=r"(?s)^wrong.cu for sm_80, NVRTC_ERROR_COMPILATION.*wrong.cu\(1\): err"
    ):
        compiler.compile("int f( {", "sm_80", name="wrong.cu")
    with pytest.raises(nvrtc.CompileError, match="invalid value for --gpu-architecture"):
        compiler.compile("", "sm_999")


def test_only_known_deprecations_are_left_out(compiler):
    log = compiler.compile('extern "C" __global__ void f() { int unused; }', "sm_60").log
    assert "unused" in log and "deprecated" not in log
    assert nvrtc._without_deprecations("a\nnvrtc: warning: Architectures prior to '75' are deprecated and\nb") == "a\nb"


# ---- resources ----


def test_resources_of_compiled_kernels(compiler):
    log = compiler.compile(SOURCE, "sm_60", headers=FACTOR_2, options=VERBOSE).log
    found = nvrtc.resources(log)
    assert set(found) == {"scale", "nothing"}
    assert found["scale"].shared_bytes == 128 and found["nothing"].shared_bytes == 0
    assert found["scale"].registers > found["nothing"].registers
    assert found["scale"].spill_bytes == found["scale"].stack_bytes == 0


def test_spills_are_seen(compiler):
    roomy = nvrtc.resources(compiler.compile(SPILLING, "sm_60", options=VERBOSE).log)["wide"]
    tight = nvrtc.resources(compiler.compile(SPILLING, "sm_60", options=[*VERBOSE, "--maxrregcount=24"]).log)["wide"]
    assert roomy.registers > 64 and roomy.spill_bytes == 0
    assert tight.registers <= 24 and tight.spill_bytes > 0 and tight.stack_bytes > 0


def test_resources_in_a_log():
    log = """ptxas info    : 4 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'first' for 'sm_60'
ptxas info    : Function properties for first
ptxas         .     16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 952 bytes cmem[0]
ptxas info    : Compile time = 5.434 ms
ptxas info    : Compiling entry function 'second' for 'sm_60'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    assert nvrtc.resources(log) == {
        "first": nvrtc.Resources(registers=255, stack_bytes=16, spill_bytes=32, shared_bytes=2048),
        "second": nvrtc.Resources(registers=8, stack_bytes=0, spill_bytes=0, shared_bytes=0),
    }
    assert nvrtc.resources("") == {}


# ---- finding ----


NO_TOOLKIT = nvrtc.Toolkit((), ())


@pytest.fixture
def nowhere(monkeypatch):
    """A machine where no folder of sys.path has NVRTC."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delenv("FASTATTN_NVRTC_LIB", raising=False)


def packages(folder: Path, compiler: nvrtc.Nvrtc, library: str, include: str | None) -> Path:
    """A folder of packages in which NVRTC lies at `library` and its headers in `include`."""
    for place, what in ((Path(library).parent, compiler.library.parent), (include, compiler.include)):
        if place is not None:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).symlink_to(what)
    return folder


@pytest.mark.parametrize(
    ("library", "include"),
    [
        ("nvidia/cuda_nvrtc/lib/", "nvidia/cuda_runtime/include"),  # packages for CUDA 12
        ("nvidia/cu13/lib/", "nvidia/cu13/include"),  # packages for CUDA 13
        ("torch/lib/", "nvidia/cuda_runtime/include"),  # a torch that includes it
    ],
)
def test_found_where_packages_put_it(nowhere, monkeypatch, compiler, tmp_path, library, include):
    monkeypatch.setattr(sys, "path", ["/nonexistent", str(packages(tmp_path, compiler, library + "x", include))])
    found = nvrtc.find(toolkit=NO_TOOLKIT)
    assert found.library.parent == tmp_path / library.rstrip("/")
    assert found.include == tmp_path / include
    assert found.version == compiler.version


def test_found_in_a_toolkit(nowhere, compiler, tmp_path):
    packages(tmp_path, compiler, "cuda/lib64/x", "cuda/include")
    toolkit = nvrtc.Toolkit((str(tmp_path / "cuda/lib64"),), ())
    assert nvrtc.find(toolkit=toolkit).include == tmp_path / "cuda/include"


def test_headers_of_a_toolkit_for_a_library_elsewhere(nowhere, monkeypatch, compiler, tmp_path):
    monkeypatch.setattr(sys, "path", [str(packages(tmp_path, compiler, "torch/lib/x", "headers"))])
    toolkit = nvrtc.Toolkit((), (str(tmp_path / "none"), str(tmp_path / "headers")))
    assert nvrtc.find(toolkit=toolkit).include == tmp_path / "headers"


def test_the_variable_comes_first(nowhere, monkeypatch, compiler, tmp_path):
    packages(tmp_path, compiler, "named/lib/x", "named/include")
    monkeypatch.setattr(sys, "path", [str(compiler.library.parents[3])])
    assert nvrtc.find(toolkit=NO_TOOLKIT).library == compiler.library
    monkeypatch.setenv("FASTATTN_NVRTC_LIB", str(tmp_path / "named/lib" / compiler.library.name))
    assert nvrtc.find(toolkit=NO_TOOLKIT).library.parent == tmp_path / "named/lib"
    monkeypatch.setenv("FASTATTN_NVRTC_LIB", "/nonexistent/libnvrtc.so")
    with pytest.raises(ValueError, match="FASTATTN_NVRTC_LIB: must be a file, got '/nonexistent/libnvrtc.so'"):
        nvrtc.find(toolkit=NO_TOOLKIT)


def test_not_found_says_how_to_get_it(nowhere):
    with pytest.raises(nvrtc.NotFound, match=f"no folder of sys.path and not in the system.*{nvrtc.INSTALL}"):
        nvrtc.find(toolkit=NO_TOOLKIT)


def test_incomplete_copies_are_named(nowhere, monkeypatch, compiler, tmp_path):
    packages(tmp_path, compiler, "torch/lib/x", None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(nvrtc.NotFound, match=r"torch/lib/libnvrtc\S* has no cuda_fp16.h and cuda_bf16.h"):
        nvrtc.find(toolkit=NO_TOOLKIT)


def test_a_file_that_is_no_library_is_named(nowhere, monkeypatch, compiler, tmp_path):
    packages(tmp_path, compiler, "torch/x", "nvidia/cuda_runtime/include")
    (tmp_path / "nvidia/cuda_nvrtc/lib").mkdir(parents=True)
    (tmp_path / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12").write_text("not a library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(nvrtc.NotFound, match=r"nvidia/cuda_nvrtc/lib/libnvrtc.so.12: "):
        nvrtc.find(toolkit=NO_TOOLKIT)


def test_a_capability_that_it_does_not_know_is_named(nowhere, monkeypatch, compiler):
    monkeypatch.setattr(sys, "path", [str(compiler.library.parents[3])])
    assert nvrtc.find(60, NO_TOOLKIT).library == compiler.library
    with pytest.raises(nvrtc.NotFound, match=r"libnvrtc\S* does not compile for 99.9"):
        nvrtc.find(999, NO_TOOLKIT)


def test_nothing_replaces_the_one_that_the_variable_names(nowhere, monkeypatch, compiler, tmp_path):
    monkeypatch.setattr(sys, "path", [str(compiler.library.parents[3])])
    (tmp_path / "libnvrtc.so").write_text("not a library")
    monkeypatch.setenv("FASTATTN_NVRTC_LIB", str(tmp_path / "libnvrtc.so"))
    with pytest.raises(nvrtc.NotFound, match=str(tmp_path)):
        nvrtc.find(toolkit=NO_TOOLKIT)


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("libnvrtc.so", True),
        ("libnvrtc.so.12", True),
        ("libnvrtc-b51b459d.so.12", True),
        ("libnvrtc.alt.so.12", False),
        ("libnvrtc-builtins.so.12.9", False),
        ("libnvrtc-builtins-2f4b3d1c.so.12.6", False),
    ],
)
def test_which_file_is_the_library(name, is_it):
    assert bool(nvrtc._LIBRARY.fullmatch(name)) is is_it
