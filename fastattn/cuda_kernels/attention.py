"""The CUDA C++ kernels of csrc: which of them run for a call, on what grid, with what workspace."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import _launcher, compat
from ..blocks import bias_tiles_and_copies, count
from ..params import AttentionParams, Backward, Buffers, Forward
from ..seam import Seam
from . import images

ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Cost of a score in every kernel but the table's last, relative to the last. So the last one may compute 15 % (3 %,
# 40 %) more scores that nobody wants and still be chosen.
SCORE_COST = {"attention_fwd": 1.15, "attention_fwd_mma": 1.03, "attention_bwd": 1.4}
# Blocks per multiprocessor that fill a GPU. With fewer, the backward split in two (seven products, a block per tile)
# beats the one in one piece (five products, a block per key head).
BLOCKS_TO_FILL = 2

_launcher.set_image_source(images.image)


# ---- where kernels run ----


class Device:
    """The GPU that the tensors of a call are on. Executors and recorders are subclasses."""

    max_grid_y = max_grid_z = 65535  # a block takes the heads and the sequences beyond them in turn

    def multiprocessors(self, device: torch.device) -> int:
        """The number of the device's multiprocessors."""
        return _launcher.multiprocessors(device.index)

    def has_mma(self, element: str, device: torch.device) -> bool:
        """Whether the device's kernels for this element type are those that multiply by tensor cores."""
        return _has_mma(element, device.index)

    def launch(self, kernel: str, element: str, grid: tuple[int, int, int], p: AttentionParams, b: Buffers) -> None:
        """Run a kernel on the current stream of the call's device."""
        device = p.q.device.index
        _launcher.launch(kernel, element, device, compat.current_stream(device), grid, p, b)


@functools.cache
def _has_mma(element: str, device: int) -> bool:
    return images.has_mma(element, _launcher.capability(device))


_device = Seam(Device())


def on(device: Device) -> AbstractContextManager[None]:
    """Kernels of calls inside, and of their backward passes in whatever thread, run on this device."""
    return _device.replaced(device)


# ---- forward ----


def attention_fwd(forward: Forward, p: AttentionParams) -> None:
    """Fill out and lse."""
    shape = p.q.shape
    batch = shape[0] if p.cu_seqlens_q is None else p.batch_size()
    if batch == 0 or shape[1] == 0:
        forward.out.zero_()
        forward.lse.fill_(-torch.inf)
        return
    element = ELEMENTS[p.q.dtype]
    name, tiles = _forward(_device.value.has_mma(element, p.q.device), *sizes(p))
    _device.value.launch(name, element, _grid(tiles, shape[1], batch), p, Buffers(*forward))


def _grid(tiles: int, nheads: int, batch: int) -> tuple[int, int, int]:
    return tiles, min(nheads, _device.value.max_grid_y), min(batch, _device.value.max_grid_z)


@functools.lru_cache(4096)
def _forward(has_mma: bool, *sizes: Any) -> tuple[str, int]:
    """The name of the kernel, and how many tiles of queries it has."""
    kernel = choose_kernel("attention_fwd_mma" if has_mma else "attention_fwd", *sizes)
    return kernel.name, count(sizes[2], kernel.block_m)


# ---- backward ----


def attention_bwd(backward: Backward, p: AttentionParams) -> None:
    """Fill dq, dk, dv and, unless it is None, dbias."""
    batch, nheads, nheads_k = p.batch_size(), p.q.shape[1], p.k.shape[1]
    if batch * nheads == 0:
        backward.fill_zero()
        return
    element = ELEMENTS[p.q.dtype]
    out, lse, dout, dlse, dq, dk, dv, dbias = backward
    buffers = Buffers(out, lse, dout, dlse, torch.empty_like(lse), dq, dk, dv)

    kernel, kernel_dq = choose_kernel("attention_bwd", *sizes(p)), choose_kernel("attention_bwd_dq", *sizes(p))
    key_tiles = count(p.max_seqlen_k, kernel.block_n)
    if key_tiles > 1 and batch * nheads_k < BLOCKS_TO_FILL * _device.value.multiprocessors(p.q.device):
        query_tiles = count(p.max_seqlen_q, kernel_dq.block_m)
        _device.value.launch(kernel_dq.name, element, _grid(query_tiles, nheads, batch), p, buffers)
        _device.value.launch(kernel.name, element, _grid(key_tiles, nheads_k, batch), p, buffers)
    else:
        if key_tiles > 1 and dq.dtype != torch.float32:
            buffers = buffers._replace(dq_sum=lse.new_empty(*lse.shape, dq.shape[-1]))
        _device.value.launch(kernel.name, element, _grid(1, nheads_k, batch), p, buffers)
    if dbias is not None and dbias.numel():
        _bias_grad(dbias, buffers, p)


def _bias_grad(dbias: Tensor, buffers: Buffers, p: AttentionParams) -> None:
    """Fill dbias: partial sums in copies of the bias, as many as fill the GPU, then their sum."""
    kernel = choose_kernel("attention_bwd_dbias", *sizes(p))
    busy = BLOCKS_TO_FILL * _device.value.multiprocessors(p.q.device)
    bias_tiles, copies = bias_tiles_and_copies(p, dbias.shape, (kernel.block_m, kernel.block_n), busy)
    buffers = buffers._replace(dbias=dbias, dbias_partial=buffers.lse.new_empty(copies, *dbias.shape))
    _device.value.launch(kernel.name, ELEMENTS[p.q.dtype], (bias_tiles, copies, 1), p, buffers)
    grid = (count(dbias.numel(), SUM_THREADS), 1, 1)
    _device.value.launch("attention_dbias_sum", ELEMENTS[dbias.dtype], grid, p, buffers)


# ---- choice ----

SUM_THREADS = next(k.threads for k in _launcher.KERNELS if k.name == "attention_dbias_sum")


def sizes(p: AttentionParams) -> tuple[int, int, int, int, int, int, bool]:
    """The sizes and the band of a problem, on which the choice of a kernel depends."""
    return p.q.shape[-1], p.v.shape[-1], p.max_seqlen_q, p.max_seqlen_k, p.left, p.right, p.bottom_right


@functools.lru_cache(4096)
def choose_kernel(
    pass_: str, head_dim: int, head_dim_v: int, seqlen_q: int, seqlen_k: int, left: int, right: int, bottom_right: bool
) -> _launcher.Kernel:
    """The pass's kernel for the head dimension and, where there is a choice, the lengths and the band."""
    fitting = [k for k in _launcher.KERNELS if k.pass_ == pass_ and k.head_dim >= max(head_dim, head_dim_v)]
    candidates = [k for k in fitting if k.head_dim == fitting[0].head_dim]
    shift = seqlen_k - seqlen_q if bottom_right else 0

    def cost(k: _launcher.Kernel) -> float:
        scores = computed_scores(k, seqlen_q, seqlen_k, left - shift, right + shift)
        return scores * (1 if k is candidates[-1] else SCORE_COST[pass_])

    return min(candidates, key=cost)


def computed_scores(k: _launcher.Kernel, seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """The number of scores that a kernel computes: those of all tiles that the band leaves something of."""
    tiles = 0
    for first in range(0, seqlen_q, k.block_m):
        last = min(first + k.block_m, seqlen_q) - 1
        begin, end = max(first - left, 0), min(last + right + 1, seqlen_k)
        if begin < end:
            tiles += count(end, k.block_n) - begin // k.block_n
    return tiles * k.block_m * k.block_n
