"""The driver under the launcher: which library it is, what it says of devices, and every way in which it refuses."""

from __future__ import annotations

import re

import pytest

from tests.support.launcher_calls import KERNEL, launch
from tests.support.stub_cuda import CAPABILITY_MAJOR, MAX_SMEM, MULTIPROCESSORS, build


def test_driver_and_devices(loaded):
    launcher, stub = loaded
    stub.library.stub_set_device_count(2)
    for attribute, value in ((CAPABILITY_MAJOR, 6), (MULTIPROCESSORS, 56), (MAX_SMEM, 49152)):
        stub.library.stub_set_attribute(1, attribute, value)
    assert launcher.driver() == (None, (12, 9), 2)
    questions = (launcher.capability, launcher.multiprocessors, launcher.max_smem)
    assert [[ask(device) for ask in questions] for device in (0, 1)] == [[(8, 0), 80, 166912], [(6, 0), 56, 49152]]
    for ask in questions:
        for device in (2, -1):
            with pytest.raises(RuntimeError, match=f"device: must be below 2, got {device}"):
                ask(device)
    assert set(stub.names()) == {
        *("cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute")
    }


def test_no_device(loaded):
    launcher, stub = loaded
    stub.fail("cuInit", 100)
    assert launcher.driver() == ("cuInit: CUDA_ERROR_NO_DEVICE (stub text 100)", None, 0)
    assert launcher.driver().problem is None  # asked anew


def test_no_library_until_there_is_one(launcher, stub, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_LIBCUDA", "/nowhere/libcuda.so")
    expected = "cannot load the CUDA driver: /nowhere/libcuda.so: cannot open shared object file"
    assert launcher.driver().problem.startswith(expected)
    with pytest.raises(RuntimeError, match=f"{KERNEL} of float32 on device 0, .*: {expected}"):
        launch(launcher)
    monkeypatch.setenv("FASTATTN_LIBCUDA", str(tmp_path / "libcuda.so"))
    launch(launcher)
    assert len(stub.launches()) == 1


def test_library_too_old(launcher, monkeypatch):
    library = str(build("-DcuFuncSetAttribute=renamed"))
    monkeypatch.setenv("FASTATTN_LIBCUDA", library)
    with pytest.raises(RuntimeError, match=f"{library} has no cuFuncSetAttribute: the driver is too old"):
        launch(launcher)


@pytest.mark.parametrize("named", [None, ""])
def test_default_library(launcher, stub, monkeypatch, named):
    monkeypatch.delenv("FASTATTN_LIBCUDA") if named is None else monkeypatch.setenv("FASTATTN_LIBCUDA", named)
    problem = launcher.driver().problem
    assert problem is None or "libcuda.so.1" in problem or "cuInit" in problem
    assert stub.names() == []


CALLS = [
    *("cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute"),
    *("cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuModuleLoadDataEx"),
    *("cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"),
]


@pytest.mark.parametrize("function", CALLS)
def test_failure_of_any_call(launcher, stub, function):
    stub.fail(function, 999)
    smem = {kernel.name: kernel.smem for kernel in launcher.KERNELS}[KERNEL]
    with pytest.raises(RuntimeError) as caught:
        launch(launcher, element="float16", grid=(7, 2, 3))
    assert str(caught.value) == (
        f"{KERNEL} of float16 on device 0, grid (7, 2, 3), block 128, {smem} bytes of shared memory: "
        f"{function.removesuffix('_v2')}: CUDA error 999"
    )
    assert stub.current_device() == -1
    launch(launcher, element="float16")  # nothing half done is left behind
    assert stub.launches()[-1].image == "image of float16 for (8, 0)"
    assert stub.current_device() == -1


def test_no_call_is_left_out(launcher, stub):
    launch(launcher)
    assert set(stub.names()) == {*CALLS, "cuCtxPopCurrent_v2"}


ADVICE = {
    1: "CUDA_ERROR_INVALID_VALUE (stub text 1); a grid, block or shared memory beyond",
    209: "CUDA_ERROR_NO_BINARY_FOR_GPU (stub text 209); the kernels are built for other GPUs",
    222: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION (stub text 222); the driver is older than the compiler",
    500: "CUDA_ERROR_NOT_FOUND (stub text 500)",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS (stub text 700); an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1",
    900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (stub text 900); the first call of a kernel loads it",
}


@pytest.mark.parametrize("error", ADVICE)
def test_cuda_is_quoted_and_advice_added(launcher, stub, error):
    stub.fail("cuLaunchKernel", error)
    with pytest.raises(RuntimeError, match=f": cuLaunchKernel: {re.escape(ADVICE[error])}"):
        launch(launcher)


def test_device_that_is_not_there(launcher, stub):
    with pytest.raises(RuntimeError, match=f"{KERNEL} .* on device 1, .*: device: must be below 1, got 1"):
        launch(launcher, device=1)
    assert stub.launches() == []
