"""The way to the driver: what libcuda is called with, in which context, how often, and what is said when it refuses."""

from __future__ import annotations

import ctypes
import faulthandler
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from attention_struct import Struct, as_dict
from fastattn.params import UNBOUNDED, AttentionParams
from stub_cuda import build, load

TILES = Path(__file__).parents[1] / "csrc" / "tiles.cuh"
KERNEL = "attention_fwd_d64_64x64"
CAPABILITY_MAJOR, CAPABILITY_MINOR, MULTIPROCESSORS, MAX_SMEM = 75, 76, 16, 97  # attributes of a device


def image(element: str, capability: tuple[int, int]) -> bytes:
    return f"image of {element} for {capability}".encode()


def problem(scale: float = 0.25) -> AttentionParams:
    q, k, v = torch.randn(3, 2, 4, 5, 64).unbind()
    return AttentionParams(q, k, v, None, None, None, None, None, 5, 5, scale, 0.0, UNBOUNDED, 0, False)


P = problem()
BUFFERS = (torch.empty(2, 4, 5, 64), torch.empty(2, 4, 5), *[None] * 9)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """(launcher, stub), as a new process has them."""
    launcher, stub = load(tmp_path, monkeypatch)
    stub.library.stub_set_params_bytes(ctypes.sizeof(Struct))
    return launcher, stub


@pytest.fixture
def launcher(loaded):
    launcher, _ = loaded
    launcher.set_image_source(image)
    return launcher


@pytest.fixture
def stub(loaded):
    return loaded[1]


def launch(launcher, kernel=KERNEL, element="float32", device=0, stream=0, grid=(3, 1, 1), p=P):
    launcher.launch(kernel, element, device, stream, grid, p, BUFFERS)


def fields(params: bytes) -> str:
    """The bytes without the padding, whose value means nothing."""
    return str(as_dict(Struct.from_buffer_copy(params)))


def in_thread(function):
    """Runs it in a thread of its own, where no context is current; what it raises is raised here."""
    raised = []

    def run():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


# ---- the table ----


def test_table_is_that_of_the_header(launcher):
    row = r"KERNEL\((\w+), (\w+), (\d+), (\d+), (\d+), (\d+), (\d+), (\d+)\)"
    expected = []
    for pass_, _, *numbers in re.findall(row, TILES.read_text()):
        head_dim, m, n, warps, *_ = map(int, numbers)
        expected.append((f"{pass_}_d{head_dim}_{m}x{n}", pass_, head_dim, m, n, 32 * warps))
    assert len(expected) > 10
    *tiled, last = launcher.KERNELS
    assert [kernel[:-1] for kernel in tiled] == expected
    assert all(0 < kernel.smem <= 48 * 1024 for kernel in tiled)
    assert last == ("attention_dbias_sum", "attention_dbias_sum", 0, 0, 0, 256, 0)
    assert len({kernel.name for kernel in launcher.KERNELS}) == len(launcher.KERNELS)


# ---- a launch ----


def test_what_cuda_gets(launcher, stub):
    table = {kernel.name: kernel for kernel in launcher.KERNELS}
    for i, kernel in enumerate(table.values()):
        launch(launcher, kernel.name, "bfloat16", stream=0x7F0000001000 + i, grid=(i + 2, 5, 7))
    launched = stub.launches()
    assert [x.kernel for x in launched] == list(table)
    for i, x in enumerate(launched):
        assert (x.grid, x.block) == ((i + 2, 5, 7), (table[x.kernel].threads, 1, 1))
        assert (x.smem, x.stream, x.device) == (table[x.kernel].smem, 0x7F0000001000 + i, 0)
        assert x.image == "image of bfloat16 for (8, 0)"
        assert fields(x.params) == fields(launcher.pack("float32", P, BUFFERS))


def test_importing_asks_nothing_of_the_machine(loaded):
    launcher, stub = loaded
    launcher.set_image_source(image)
    assert len(launcher.pack("float32", P, BUFFERS)) > 100 and launcher.KERNELS
    assert stub.names() == []


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_empty_grid_launches_nothing(launcher, stub, grid):
    launch(launcher, grid=grid)
    assert stub.names() == []


def test_largest_grid(launcher, stub):
    launch(launcher, grid=(2**31 - 1, 65535, 65535))
    assert stub.launches()[0].grid == (2**31 - 1, 65535, 65535)


def test_largest_stream_and_device(launcher, stub):
    stub.library.stub_set_device_count(4)
    launch(launcher, device=3, stream=2**64 - 1)
    assert (stub.launches()[0].device, stub.launches()[0].stream) == (3, 2**64 - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "attention_fwd"}, "kernel: must be one of KERNELS, got attention_fwd"),
        ({"element": "float64"}, "element: must be float32, float16 or bfloat16, got float64"),
        ({"grid": (2**31, 1, 1)}, "grid: must be within .*, got attention_fwd_d64_64x64 .*grid \\(2147483648, 1, 1\\)"),
        ({"grid": (1, 65536, 1)}, "grid: must be within .* \\(1, 65536, 1\\)"),
        ({"grid": (1, 1, 65536)}, "grid: must be within .* \\(1, 1, 65536\\)"),
        ({"grid": (-1, 1, 1)}, "grid: must be within .* \\(-1, 1, 1\\)"),
        ({"grid": (0, -1, 1)}, "grid: must be within .* \\(0, -1, 1\\)"),
        ({"p": P[:-1]}, "p: must have 15 fields, got 14"),
    ],
)
def test_refused_before_the_driver_is_asked(launcher, stub, changes, message):
    with pytest.raises(ValueError, match=message):
        launch(launcher, **changes)
    assert stub.names() == []


def test_repeated_launch_asks_for_the_context_and_launches(launcher, stub):
    stub.make_current(0)
    launch(launcher)
    stub.clear()
    launch(launcher)
    assert stub.names() == ["cuCtxGetCurrent", "cuLaunchKernel"]


# ---- modules ----


def test_one_module_per_device_and_element(launcher, stub):
    stub.library.stub_set_device_count(2)
    for attribute, value in ((CAPABILITY_MAJOR, 6), (CAPABILITY_MINOR, 1)):
        stub.library.stub_set_attribute(1, attribute, value)
    asked = []
    launcher.set_image_source(lambda *question: asked.append(question) or image(*question))
    kernels = [kernel.name for kernel in launcher.KERNELS]
    for _ in range(2):
        for device in (0, 1):
            for element in launcher.ELEMENTS:
                for kernel in kernels:
                    launch(launcher, kernel, element, device)
    assert asked == [(element, capability) for capability in ((8, 0), (6, 1)) for element in launcher.ELEMENTS]
    assert [call.data.decode() for call in stub.calls("cuModuleLoadDataEx")] == [
        f"image of {element} for {capability}" for element, capability in asked
    ]
    assert len(stub.calls("cuModuleGetFunction")) == len(asked) * len(kernels)
    expected = [
        (kernel, f"image of {element} for {capability}", 0 if capability == (8, 0) else 1)
        for element, capability in asked
        for kernel in kernels
    ]
    assert Counter((x.kernel, x.image, x.device) for x in stub.launches()) == Counter(2 * expected)


def test_another_image_source_loads_anew(launcher, stub):
    launch(launcher)
    launcher.set_image_source(lambda element, capability: "text of PTX")
    launch(launcher)
    assert [x.image for x in stub.launches()] == ["image of float32 for (8, 0)", "text of PTX"]


def test_shared_memory_is_asked_for_once_per_kernel(launcher, stub):
    launch(launcher)
    launch(launcher)
    (call,) = stub.calls("cuFuncSetAttribute")
    smem = {kernel.name: kernel.smem for kernel in launcher.KERNELS}[KERNEL]
    assert (call.data.decode(), call.numbers[1:3]) == (KERNEL, (8, smem))


def test_shared_memory_beyond_the_device(launcher, stub):
    smem = {kernel.name: kernel.smem for kernel in launcher.KERNELS}[KERNEL]
    stub.library.stub_set_attribute(0, MAX_SMEM, smem - 1)
    with pytest.raises(RuntimeError, match=f"{KERNEL} .*{smem} bytes .*a block of this device may have {smem - 1} "):
        launch(launcher)
    assert stub.launches() == [] and stub.current_device() == -1
    launch(launcher, "attention_dbias_sum")


def test_image_source_that_raises_is_asked_again(launcher, stub):
    def source(element, capability):
        raise LookupError(f"nothing for {capability}")

    launcher.set_image_source(source)
    for _ in range(2):
        with pytest.raises(LookupError, match=r"nothing for \(8, 0\)"):
            launch(launcher)
    assert stub.current_device() == -1
    launcher.set_image_source(image)
    launch(launcher)
    assert stub.names().count("cuModuleLoadDataEx") == 1


def test_image_source_must_give_an_image(launcher, loaded, stub):
    launcher.set_image_source(lambda element, capability: None)
    with pytest.raises(RuntimeError, match="NoneType"):
        launch(launcher)
    with pytest.raises(TypeError):
        launcher.set_image_source(None)
    assert stub.calls("cuModuleLoadDataEx") == []


def test_without_an_image_source(loaded):
    with pytest.raises(RuntimeError, match=f"{KERNEL} .*: no image source: call set_image_source first"):
        launch(loaded[0])


def test_what_the_compiler_in_the_driver_says(launcher, stub):
    stub.library.stub_set_compiler_log(b"ptxas application ptx input, line 9; fatal: no .version")
    stub.fail("cuModuleLoadDataEx", 218)
    with pytest.raises(RuntimeError) as caught:
        launch(launcher)
    assert str(caught.value).endswith(
        "cuModuleLoadDataEx: CUDA_ERROR_INVALID_PTX (stub text 218)\n"
        "ptxas application ptx input, line 9; fatal: no .version"
    )


def test_long_compiler_log_is_cut(launcher, stub):
    stub.library.stub_set_compiler_log(b"x" * 20000)
    stub.fail("cuModuleLoadDataEx", 218)
    with pytest.raises(RuntimeError) as caught:
        launch(launcher)
    assert str(caught.value).count("x") > 8000


# ---- contexts ----


def test_thread_without_a_context(launcher, stub):
    in_thread(lambda: launch(launcher))
    assert stub.launches()[0].device == 0
    stub.clear()
    in_thread(lambda: launch(launcher))
    assert stub.names() == ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert len({call.thread for call in stub.calls()}) == 1
    assert stub.launches()[0].device == 0


def test_context_of_another_device(launcher, stub):
    stub.library.stub_set_device_count(2)
    stub.make_current(0)
    for device in (1, 0, 1):
        launch(launcher, device=device)
        assert stub.current_device() == 0
    assert [x.device for x in stub.launches()] == [1, 0, 1]
    assert len(stub.calls("cuCtxPushCurrent_v2")) == 2


def test_primary_context_is_retained_once(launcher, stub):
    stub.library.stub_set_device_count(2)
    for _ in range(2):
        in_thread(lambda: launch(launcher, device=1))
        in_thread(lambda: launch(launcher, "attention_dbias_sum", "float16", device=1))
    assert [call.numbers[0] for call in stub.calls("cuDevicePrimaryCtxRetain")] == [101]


def test_autograd_thread(launcher, stub):
    class Launching(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            launch(launcher)
            return grad

    x = torch.ones(1, requires_grad=True)
    in_thread(Launching.apply(x).backward)
    assert [x.device for x in stub.launches()] == [0]


# ---- threads ----


@pytest.fixture
def watchdog():
    """Ends the process after a minute: where a thread waits with the GIL, nothing else can end the test."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def test_threads_share_modules_and_keep_their_arguments_apart(launcher, stub, watchdog):
    stub.library.stub_set_device_count(2)
    asked = []

    def slow_image(element, capability):
        asked.append(element)
        time.sleep(0.01)
        return image(element, capability)

    launcher.set_image_source(slow_image)
    kernels = [kernel.name for kernel in launcher.KERNELS]
    expected, start = Counter(), threading.Barrier(6)
    threads = []
    for i in range(6):
        p = problem(scale=float(i + 1))
        calls = [(kernels[(i + j) % len(kernels)], launcher.ELEMENTS[j % 3], j % 2) for j in range(60)]
        params = fields(launcher.pack("float32", p, BUFFERS))
        expected.update((kernel, f"image of {element} for (8, 0)", d, params) for kernel, element, d in calls)

        def run(p=p, calls=calls):
            start.wait()
            for kernel, element, device in calls:
                launch(launcher, kernel, element, device, p=p)

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter((x.kernel, x.image, x.device, fields(x.params)) for x in stub.launches()) == expected
    assert Counter(asked) == dict.fromkeys(launcher.ELEMENTS, 2)
    assert len(stub.calls("cuDevicePrimaryCtxRetain")) == 2
    loads = Counter((call.data, call.numbers[0]) for call in stub.calls("cuModuleLoadDataEx"))
    assert set(loads.values()) == {1} and len(loads) == 6


@pytest.mark.parametrize("is_loaded", [False, True], ids=["loading", "launching"])
def test_other_threads_run_while_the_driver_waits(launcher, stub, is_loaded):
    if is_loaded:
        launch(launcher)
    stub.library.stub_hold(1)
    thread = threading.Thread(target=launch, args=(launcher,))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    assert launcher.multiprocessors(0) == 80
    stub.library.stub_hold(0)
    thread.join()
    assert len(stub.launches()) == 1 + is_loaded


# ---- the driver ----


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


# ---- the module ----


def test_module_knows_no_torch(loaded):
    """Loaded by itself in a new process, it brings nothing with it."""
    launcher, _ = loaded
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_launcher', {launcher.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.driver().devices, 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("1 False False\n", "")
