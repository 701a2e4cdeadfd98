"""The launches that fastattn.cuda makes for a call, recorded instead of made, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastattn import _launcher, reference
from fastattn.cuda_kernels import attention as cuda
from fastattn.params import AttentionParams


@dataclass(frozen=True)
class Launch:
    """What a kernel is launched with."""

    kernel: str
    element: str
    grid: tuple[int, int, int]
    threads: int
    smem: int  # bytes
    params_bytes: bytes
    buffers: list[tuple[Tensor, str, bool]]  # what it may access, by name, and whether it may be written


KERNELS = {kernel.name: kernel for kernel in _launcher.KERNELS}


def launch_of(name: str, element: str, grid: tuple[int, int, int], p: AttentionParams, buffers: cuda.Buffers) -> Launch:
    """What a call of fastattn.cuda.launch stands for."""
    kernel = KERNELS[name]
    read = [(x, field, False) for field, x in p._asdict().items() if isinstance(x, Tensor)]
    written = [(x, field, True) for field, x in buffers._asdict().items() if x is not None]
    params = _launcher.pack(element, p, buffers)
    return Launch(name, element, grid, kernel.threads, kernel.smem, params, read + written)


@contextmanager
def recording(multiprocessors: int) -> Iterator[list[Launch]]:
    """Inside, fastattn.cuda launches nothing and adds to the list.

    Args:
        multiprocessors: of the card; on one that is not full, the backward takes other kernels.
    """
    launches: list[Launch] = []

    def note(*arguments: Any) -> None:
        launches.append(launch_of(*arguments))

    with mock.patch.object(cuda, "launch", note), mock.patch.object(cuda, "multiprocessors", lambda _: multiprocessors):
        yield launches


def record(p: AttentionParams, backward: bool, multiprocessors: int = 56) -> list[Launch]:
    """The launches of a forward pass, or of a backward pass for a random gradient, that of a bias included.

    Args:
        p: the problem.
        backward: which pass.
        multiprocessors: of the card.
    """
    with recording(multiprocessors) as launches:
        if not backward:
            cuda.attention_fwd(*empty_results(p), p)
            return launches
        out, lse = (x.detach() for x in reference.attention(p))
        dq, dk, dv = map(torch.empty_like, (p.q, p.k, p.v))
        dbias = None if p.bias is None else torch.empty_like(p.bias)
        cuda.attention_bwd(dq, dk, dv, dbias, out, lse.float().contiguous(), torch.randn_like(out), None, p)
    return launches


def empty_results(p: AttentionParams) -> tuple[Tensor, Tensor]:
    """Memory for out and lse."""
    out = p.q.new_empty(*p.q.shape[:-1], p.v.shape[-1])
    return out, p.q.new_empty(p.q.shape[:-1] if not p.is_packed() else p.q.shape[1::-1], dtype=torch.float32)
