"""The launcher's calls of libcuda: their arguments, their number, and the launches that it refuses by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.launcher_calls import BUFFERS, KERNEL, P, fields, image, launch
from tests.support.stub_cuda import CAPABILITY_MAJOR, CAPABILITY_MINOR, MAX_SMEM

CSRC = Path(__file__).parents[2] / "csrc"


# ---- the table ----


def test_table_is_that_of_the_headers(launcher):
    text = "".join((CSRC / name).read_text() for name in ("tiles.cuh", "mma_tiles.cuh"))
    expected = []
    for pass_, numbers in re.findall(r"KERNEL\((\w+), \w+, ([\d, ]+)\)", text):
        head_dim, m, n, warps, *_ = map(int, numbers.split(", "))
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
        ({"p": P[:-1]}, "p: must have 17 fields, got 16"),
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


# ---- the module ----


def test_module_knows_no_torch(loaded):
    """The launcher, loaded by itself in a new process, loads neither torch nor numpy."""
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
