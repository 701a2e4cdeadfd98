"""Triton's own launcher on a libcuda without a GPU: kernels are compiled, loaded and launched, but none runs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from benchmarks import stub_cuda
from fastattn.triton_kernels import attention, tiles

STREAM = 77


class Driver(CudaDriver):
    """Triton's driver of CUDA, told which GPU there is instead of asking torch."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        super().__init__()
        # Set by the parent in itself, not in its class.
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda *device: capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class StubDevice(attention.Device):
    """The GPU that the stub stands for, whatever device the tensors are on."""

    def __init__(self, capability: tuple[int, int]) -> None:
        properties = triton.runtime.driver.active.utils.get_device_properties(0)
        self._gpu = tiles.Gpu(capability, properties["multiprocessor_count"], properties["max_shared_mem"])

    def gpu(self, device: torch.device) -> tiles.Gpu:
        return self._gpu


def start(folder: Path, capability: tuple[int, int]) -> tuple[StubDevice, Any]:
    """Makes Triton of this process run on the stub, compiled into that folder; its device, and the stub's own side.

    Raises:
        BuildError: the stub cannot be compiled.
    """
    library = folder / "libcuda.so.1"
    stub_cuda.build(library, ["-Wl,-soname,libcuda.so.1"])
    link = folder / "libcuda.so"  # by which older Tritons find it
    if not link.exists():
        link.symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # In the names that all libraries share: Triton's are linked to this one by its soname.
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_set_first_handle(0)
    stub.cuInit(0)
    stub.stub_make_current(0)
    triton.runtime.driver.set_active(Driver(capability))
    return StubDevice(capability), stub
