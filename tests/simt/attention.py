"""Runs the launches of CUDA kernels on the CPU: the executor in the place of the driver.

with on_the_cpu(SourceKernels(checked=True)):
    fastattn.scaled_dot_product_attention(q, k, v)  # CPU tensors, the CUDA kernels
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch

from benchmarks.p100.launches import launch_of
from fastattn import backends
from fastattn.cuda_kernels import attention, images
from fastattn.cuda_kernels.sources import ELEMENTS, Arch, defines, unit
from fastattn.params import AttentionParams, Buffers
from tests.simt.build import CACHE, ROOT
from tests.simt.executor import Library, load
from tests.simt.ptx import PtxLibrary, load_ptx, load_ptx_text
from tests.support.poison import fresh_memory_is_nan

ATTENTION = ROOT / "csrc" / "attention.cu"


class Kernels(Protocol):
    """Where a launch finds its kernel."""

    def library(self, kernel: str, element: str) -> Library | PtxLibrary: ...

    def has_mma(self, element: str) -> bool: ...


@dataclasses.dataclass(frozen=True)
class SourceKernels:
    """The kernels as g++ compiles them; all of an element type are one library."""

    checked: bool = False

    def library(self, kernel: str, element: str) -> Library:
        return _source_library(element, self.checked)

    def has_mma(self, element: str) -> bool:
        return False


@functools.cache
def _source_library(element: str, checked: bool) -> Library:
    return load(ATTENTION, checked=checked, defines=(f"FASTATTN_ELEMENT={ELEMENTS[element]}",))


@dataclasses.dataclass(frozen=True)
class PtxKernels:
    """The kernels as NVRTC compiles them, run from the PTX; each is built at its first launch."""

    arch: str = "compute_60"
    checked: bool = False

    def library(self, kernel: str, element: str) -> PtxLibrary:
        return _ptx_library(element, self.arch, self.checked)

    def has_mma(self, element: str) -> bool:
        return unit(element, Arch.parse(self.arch)) is not None


@functools.cache
def _ptx_library(element: str, arch: str, checked: bool) -> PtxLibrary:
    if checked:  # compiled here, with the lines of the sources for the reports
        macros = defines(element, Arch.parse(arch))
        return load_ptx(ATTENTION, arch=arch, checked=True, defines=tuple(f"{name}={x}" for name, x in macros.items()))
    with mock.patch.dict(os.environ, FASTATTN_CUDA_IMAGE=arch, FASTATTN_CACHE_DIR=str(CACHE)):
        image = images.image(element, (9, 0))  # what a GPU gets
    return load_ptx_text(image.decode().rstrip("\0"), name=f"attention_{element}.{arch}.ptx")


class Executor(attention.Device):
    """A card whose kernels run on the CPU.

    Args:
        kernels: what is launched.
        schedule: the order of threads and blocks, as of Library.launch.
        multiprocessors: of the card that is imitated; on many, small problems take the split backward.
        max_grid_y, max_grid_z: of the card; blocks take the heads and the sequences beyond them in turn.
    """

    def __init__(
        self,
        kernels: Kernels,
        schedule: str | int = "in-order",
        multiprocessors: int = 4,
        max_grid_y: int = 65535,
        max_grid_z: int = 65535,
    ) -> None:
        self.kernels, self.schedule = kernels, schedule
        self.max_grid_y, self.max_grid_z = max_grid_y, max_grid_z
        self._multiprocessors = multiprocessors

    def multiprocessors(self, device: torch.device) -> int:
        return self._multiprocessors

    def has_mma(self, element: str, device: torch.device) -> bool:
        return self.kernels.has_mma(element)

    def launch(self, kernel: str, element: str, grid: tuple[int, int, int], p: AttentionParams, b: Buffers) -> None:
        launch = launch_of(kernel, element, grid, p, b)
        self.kernels.library(kernel, element).launch(
            kernel,
            grid,
            (launch.threads,),
            launch.params_bytes,
            dynamic_smem=launch.smem,
            buffers=launch.buffers,
            schedule=self.schedule,
        )


@contextmanager
def on_the_cpu(kernels: Kernels, poison: bool = True, **card: Any) -> Iterator[None]:
    """Every attention call inside runs on the `cuda` backend, whose kernels run in the executor.

    Args:
        kernels: what is launched.
        poison: fill fresh memory with NaN, so that nobody reads a workspace before it is written.
        card: further arguments of Executor.
    """
    executor = Executor(kernels, **card)
    with backends.anywhere("cuda"), attention.on(executor), fresh_memory_is_nan(poison), backends.use_backend("cuda"):
        yield
