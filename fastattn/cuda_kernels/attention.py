"""The CUDA C++ kernels of csrc: which of them run for a call, on what grid, with what workspace."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _launcher
from ..blocks import bias_tiles_and_copies, count
from ..params import AttentionParams
from . import images

ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# How much longer than the last tile of the table the others take for a score: it may compute as many more in vain.
SLOWER = {"attention_fwd": 1.15, "attention_bwd": 1.4}
# With fewer blocks than this per multiprocessor, five products on a part of the card lose to seven on all of it.
FULL = 2

# Of a grid in z; a kernel takes the further sequences in turn.
MOST_BLOCKS = 65535

_launcher.set_image_source(images.image)


class Buffers(NamedTuple):
    """What kernels fill or read besides the call's own tensors; a pass leaves out what it does not know."""

    out: Tensor  # (batch, nheads, seqlen_q, head_dim_v)    packed: (total_q, nheads, head_dim_v)
    lse: Tensor  # (batch, nheads, seqlen_q) float32        packed: (nheads, total_q)
    dout: Tensor | None = None
    dlse: Tensor | None = None
    delta: Tensor | None = None  # as lse
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dq_sum: Tensor | None = None  # (*lse.shape, head_dim) float32
    dbias_partial: Tensor | None = None  # (copies, *bias.shape) float32
    dbias: Tensor | None = None  # the bias's own shape


# ---- forward ----


def attention_fwd(out: Tensor, lse: Tensor, p: AttentionParams) -> None:
    """Fill out and lse."""
    shape = p.q.shape
    batch = shape[0] if p.cu_seqlens_q is None else p.batch_size()
    if batch == 0 or shape[1] == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    name, tiles = _forward(shape[-1], p.v.shape[-1], p.max_seqlen_q, p.max_seqlen_k, p.left, p.right, p.bottom_right)
    launch(name, ELEMENTS[p.q.dtype], (tiles, shape[1], min(batch, MOST_BLOCKS)), p, Buffers(out, lse))


@functools.lru_cache(4096)
def _forward(
    head_dim: int, head_dim_v: int, seqlen_q: int, seqlen_k: int, left: int, right: int, bottom_right: bool
) -> tuple[str, int]:
    """The name of the kernel, and how many tiles of queries it has."""
    kernel = _kernel("attention_fwd", head_dim, head_dim_v, seqlen_q, seqlen_k, left, right, bottom_right)
    return kernel.name, count(seqlen_q, kernel.block_m)


# ---- backward ----


def attention_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    p: AttentionParams,
) -> None:
    """Fill dq, dk, dv and, unless it is None, dbias, in the bias's own shape."""
    batch, nheads, nheads_k = p.batch_size(), p.q.shape[1], p.k.shape[1]
    if batch * nheads == 0:
        for grad in (dq, dk, dv, dbias):
            if grad is not None:
                grad.zero_()
        return
    element = ELEMENTS[p.q.dtype]
    buffers = Buffers(out, lse, dout, dlse, torch.empty_like(lse), dq, dk, dv)

    sizes = _sizes(p)
    kernel, kernel_dq = _kernel("attention_bwd", *sizes), _kernel("attention_bwd_dq", *sizes)
    key_tiles = count(p.max_seqlen_k, kernel.block_n)
    if key_tiles > 1 and batch * nheads_k < FULL * multiprocessors(p.q.device):
        query_tiles = count(p.max_seqlen_q, kernel_dq.block_m)
        launch(kernel_dq.name, element, (query_tiles, nheads, min(batch, MOST_BLOCKS)), p, buffers)
        launch(kernel.name, element, (key_tiles, nheads_k, min(batch, MOST_BLOCKS)), p, buffers)
    else:
        if key_tiles > 1 and dq.dtype != torch.float32:
            buffers = buffers._replace(dq_sum=lse.new_empty(*lse.shape, dq.shape[-1]))
        launch(kernel.name, element, (1, nheads_k, min(batch, MOST_BLOCKS)), p, buffers)
    if dbias is not None and dbias.numel():
        _bias_grad(dbias, buffers, p)


def _bias_grad(dbias: Tensor, buffers: Buffers, p: AttentionParams) -> None:
    """Fill dbias: partial sums in copies of the bias, as many as fill the card, then their sum."""
    kernel = _kernel("attention_bwd_dbias", *_sizes(p))
    busy = FULL * multiprocessors(p.q.device)
    bias_tiles, copies = bias_tiles_and_copies(p, dbias.shape, (kernel.block_m, kernel.block_n), busy)
    buffers = buffers._replace(dbias=dbias, dbias_partial=buffers.lse.new_empty(copies, *dbias.shape))
    launch(kernel.name, ELEMENTS[p.q.dtype], (bias_tiles, copies, 1), p, buffers)
    grid = (count(dbias.numel(), SUM_THREADS), 1, 1)
    launch("attention_dbias_sum", ELEMENTS[dbias.dtype], grid, p, buffers)


# ---- choice and launch ----

SUM_THREADS = next(k.threads for k in _launcher.KERNELS if k.name == "attention_dbias_sum")


def _sizes(p: AttentionParams) -> tuple[int, int, int, int, int, int, bool]:
    return p.q.shape[-1], p.v.shape[-1], p.max_seqlen_q, p.max_seqlen_k, p.left, p.right, p.bottom_right


@functools.lru_cache(4096)
def _kernel(
    pass_: str, head_dim: int, head_dim_v: int, seqlen_q: int, seqlen_k: int, left: int, right: int, bottom_right: bool
) -> _launcher.Kernel:
    """The pass's kernel for the head dimension and, where there is a choice, the lengths and the band."""
    fitting = [k for k in _launcher.KERNELS if k.pass_ == pass_ and k.head_dim >= max(head_dim, head_dim_v)]
    candidates = [k for k in fitting if k.head_dim == fitting[0].head_dim]
    shift = seqlen_k - seqlen_q if bottom_right else 0

    def cost(k: _launcher.Kernel) -> float:
        scores = _scores(k, seqlen_q, seqlen_k, left - shift, right + shift)
        return scores * (1 if k is candidates[-1] else SLOWER[pass_])

    return min(candidates, key=cost)


def _scores(k: _launcher.Kernel, seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """How many scores a kernel computes: those of all tiles that the band leaves something of."""
    tiles = 0
    for first in range(0, seqlen_q, k.block_m):
        last = min(first + k.block_m, seqlen_q) - 1
        begin, end = max(first - left, 0), min(last + right + 1, seqlen_k)
        if begin < end:
            tiles += count(end, k.block_n) - begin // k.block_n
    return tiles * k.block_m * k.block_n


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return _launcher.multiprocessors(device.index)


def launch(kernel: str, element: str, grid: tuple[int, int, int], p: AttentionParams, buffers: Buffers) -> None:
    """Run a kernel on the current stream of the call's device."""
    device = p.q.device.index
    _launcher.launch(kernel, element, device, torch._C._cuda_getCurrentRawStream(device), grid, p, buffers)
