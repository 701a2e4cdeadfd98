"""The launches of CUDA kernels that a call makes, recorded instead of made, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import _launcher, reference
from fastattn.cuda_kernels import attention
from fastattn.params import AttentionParams, Backward, Buffers, Forward


@dataclass(frozen=True)
class Launch:
    """A launch: the kernel, its grid and blocks, its parameters and the memory that it may access."""

    kernel: str
    element: str
    grid: tuple[int, int, int]
    threads: int
    smem: int  # bytes
    params_bytes: bytes
    buffers: list[tuple[Tensor, str, bool]]  # what it may access, by name, and whether it may be written


KERNELS = {kernel.name: kernel for kernel in _launcher.KERNELS}


def launch_of(kernel: str, element: str, grid: tuple[int, int, int], p: AttentionParams, buffers: Buffers) -> Launch:
    """The launch that Device.launch is asked for."""
    k = KERNELS[kernel]
    read = [(x, field, False) for field, x in p._asdict().items() if isinstance(x, Tensor)]
    written = [(x, field, True) for field, x in buffers._asdict().items() if x is not None]
    return Launch(kernel, element, grid, k.threads, k.smem, _launcher.pack(element, p, buffers), read + written)


class Recorder(attention.Device):
    """A card that launches nothing and notes everything.

    Args:
        multiprocessors: their number on the card; on one that is not full, the backward takes other kernels.
        mma: the element types that its tensor cores multiply.
    """

    def __init__(self, multiprocessors: int, mma: tuple[str, ...] = ()) -> None:
        self.launches: list[Launch] = []
        self._multiprocessors, self._mma = multiprocessors, mma

    def multiprocessors(self, device: torch.device) -> int:
        return self._multiprocessors

    def has_mma(self, element: str, device: torch.device) -> bool:
        return element in self._mma

    def launch(self, kernel: str, element: str, grid: tuple[int, int, int], p: AttentionParams, b: Buffers) -> None:
        self.launches.append(launch_of(kernel, element, grid, p, b))


@contextmanager
def recording(multiprocessors: int, mma: tuple[str, ...] = ()) -> Iterator[list[Launch]]:
    """Record the launches of CUDA kernels in a list instead of making them; the arguments are those of `Recorder`."""
    recorder = Recorder(multiprocessors, mma)
    with attention.on(recorder):
        yield recorder.launches


def record(p: AttentionParams, backward: bool, multiprocessors: int = 56, mma: tuple[str, ...] = ()) -> list[Launch]:
    """The launches of a forward pass, or of a backward pass for a random gradient, that of a bias included.

    Args:
        p: the problem.
        backward: which pass.
        multiprocessors, mma: of the card.
    """
    with recording(multiprocessors, mma) as launches:
        if not backward:
            attention.attention_fwd(Forward(*empty_results(p)), p)
            return launches
        out, lse = (x.detach() for x in reference.attention(p))
        dq, dk, dv = map(torch.empty_like, (p.q, p.k, p.v))
        dbias = None if p.bias is None else torch.empty_like(p.bias)
        lse, dout = lse.float().contiguous(), torch.randn_like(out)
        attention.attention_bwd(Backward(out, lse, dout, None, dq, dk, dv, dbias), p)
    return launches


def empty_results(p: AttentionParams) -> tuple[Tensor, Tensor]:
    """Memory for out and lse."""
    out = p.q.new_empty(*p.q.shape[:-1], p.v.shape[-1])
    return out, p.q.new_empty(p.q.shape[:-1] if not p.is_packed() else p.q.shape[1::-1], dtype=torch.float32)
