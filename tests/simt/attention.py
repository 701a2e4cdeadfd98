"""Runs the launches of fastattn.cuda on the CPU: the executor in the place of the driver.

with on_the_cpu(SourceKernels(checked=True)):
    fastattn.scaled_dot_product_attention(q, k, v)  # CPU tensors, the CUDA kernels
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from unittest import mock

import torch

from fastattn import _launcher, backends
from fastattn.cuda_kernels import attention as cuda
from fastattn.cuda_kernels import images
from fastattn.cuda_kernels.sources import ELEMENTS
from fastattn.params import AttentionParams
from tests.simt.build import CACHE, ROOT
from tests.simt.executor import Library, load
from tests.simt.ptx import PtxLibrary, load_ptx, load_ptx_text

ATTENTION = ROOT / "csrc" / "attention.cu"


class Kernels(Protocol):
    """Where a launch finds its kernel."""

    def library(self, kernel: str, element: str) -> Library | PtxLibrary: ...


@dataclasses.dataclass(frozen=True)
class SourceKernels:
    """The kernels as g++ compiles them; all of an element type are one library."""

    checked: bool = False

    def library(self, kernel: str, element: str) -> Library:
        return _source_library(element, self.checked)


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


@functools.cache
def _ptx_library(element: str, arch: str, checked: bool) -> PtxLibrary:
    if checked:  # compiled here, with the lines of the sources for the reports
        return load_ptx(ATTENTION, arch=arch, checked=True, defines=(f"FASTATTN_ELEMENT={ELEMENTS[element]}",))
    with mock.patch.dict(os.environ, FASTATTN_CUDA_IMAGE=arch, FASTATTN_CACHE_DIR=str(CACHE)):
        image = images.image(element, (9, 0))  # what a GPU gets
    return load_ptx_text(image.decode().rstrip("\0"), name=f"attention_{element}.{arch}.ptx")


@contextmanager
def on_the_cpu(
    kernels: Kernels, schedule: str | int = "in-order", multiprocessors: int = 4, poison: bool = True
) -> Iterator[None]:
    """Every attention call inside runs on the `cuda` backend, whose kernels run in the executor.

    Args:
        kernels: what is launched.
        schedule: the order of threads and blocks, as of Library.launch.
        multiprocessors: of the card that is imitated; on many, small problems take the split backward.
        poison: fill fresh memory with NaN, so that nobody reads a workspace before it is written.
    """
    table = {kernel.name: kernel for kernel in _launcher.KERNELS}

    def launch(name: str, element: str, grid: tuple[int, int, int], p: AttentionParams, buffers: cuda.Buffers) -> None:
        kernel = table[name]
        read = [(x, field, False) for field, x in p._asdict().items() if isinstance(x, torch.Tensor)]
        written = [(x, field, True) for field, x in buffers._asdict().items() if x is not None]
        kernels.library(name, element).launch(
            name,
            grid,
            (kernel.threads,),
            _launcher.pack(element, p, buffers),
            dynamic_smem=kernel.smem,
            buffers=read + written,
            schedule=schedule,
        )

    anywhere = [dataclasses.replace(b, min_capability=None) if b.name == "cuda" else b for b in backends.BACKENDS]
    with (
        mock.patch.object(backends, "BACKENDS", tuple(anywhere)),
        mock.patch.object(cuda, "launch", launch),
        mock.patch.object(cuda, "multiprocessors", lambda device: multiprocessors),
        _fresh_memory_is_nan(poison),
        backends.use_backend("cuda"),
    ):
        yield


@contextmanager
def _fresh_memory_is_nan(poison: bool) -> Iterator[None]:
    """What torch.empty returns; torch does that itself in its deterministic mode."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(poison or previous)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
