"""The Triton kernels: which of them run for a call, on how many programs, with which tiles and what workspace."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from torch import Tensor

from ..blocks import bias_tiles_and_copies, count
from ..params import AttentionParams, Backward, Forward
from ..seam import Seam
from . import tiles
from .arguments import IS_INTERPRETED, inputs, per_row, rows
from .bias_gradient import attention_bwd_dbias_kernel
from .kernels import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    attention_bwd_kernel,
    attention_fwd_kernel,
)
from .launches import Launches
from .tiles import block

KERNELS = {
    "fwd": attention_fwd_kernel,
    "bwd": attention_bwd_kernel,
    "dq": attention_bwd_dq_kernel,
    "dkdv": attention_bwd_dkdv_kernel,
    "dbias": attention_bwd_dbias_kernel,
}


def why_unusable() -> str | None:
    """Why Triton cannot launch on this machine's GPU, or None; it compiles the part that does on its first use."""
    if IS_INTERPRETED or not torch.cuda.is_available():
        return None
    try:
        triton.runtime.driver.active.utils  # noqa: B018, asking for it compiles it
    except Exception as error:  # whatever its compiler, the loader or CUDA say
        said = " ".join(str(error).split())
        return f"cannot launch: Triton needs gcc and Python.h when it runs ({type(error).__name__}: {said})"
    return None


# ---- where kernels run ----


class Device:
    """The GPU that the tensors of a call are on, or the interpreter. Recorders are subclasses."""

    def gpu(self, device: torch.device) -> tiles.Gpu:
        """The facts about a device that the choice of tiles depends on."""
        return tiles.gpu(device)

    def launch(
        self, kernel: Any, programs: int, tile: tiles.Tile, p: AttentionParams, arguments: dict[str, Any]
    ) -> Any:
        """Run a kernel on the current stream of the call's device; returns what was compiled for it."""
        arguments = {**arguments, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        if IS_INTERPRETED:
            return kernel[(programs,)](**arguments)
        with torch.cuda.device_of(p.q):
            return _launches.launch(kernel, programs, arguments, p.q.get_device(), tile.num_warps, tile.num_stages)


_launches = Launches()
_device = Seam(Device())


def on(device: Device) -> AbstractContextManager[None]:
    """Kernels of calls inside, and of their backward passes in whatever thread, run on this device."""
    return _device.replaced(device)


def _tile(kernel: str, p: AttentionParams) -> Any:
    head_dims = block(p.q.size(-1)), block(p.v.size(-1))
    seqlens = block(p.max_seqlen_q), block(p.max_seqlen_k)
    return tiles.chosen(kernel, _device.value.gpu(p.q.device), p.q.dtype, head_dims, seqlens)


# ---- forward ----


def attention_fwd(forward: Forward, p: AttentionParams) -> None:
    """Fill out and lse."""
    out, lse = forward
    heads = p.batch_size() * p.q.size(1)
    if heads == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    tile = _tile("fwd", p)
    pairs = _device.value.gpu(p.q.device).share(heads, tile)
    programs = heads // pairs * count(p.max_seqlen_q, tile.block_m)
    own = {"out": rows(out, p), "lse": per_row(lse, p), "pairs": pairs}
    _device.value.launch(KERNELS["fwd"], programs, tile, p, inputs(p) | own)


# ---- backward ----


def attention_bwd(backward: Backward, p: AttentionParams) -> None:
    """Fill dq, dk, dv and, unless it is None, dbias."""
    out, lse, dout, dlse, dq, dk, dv, dbias = backward
    heads, group = p.batch_size() * p.q.size(1), p.q.size(1) // max(p.k.size(1), 1)
    if heads == 0:
        backward.fill_zero()
        return
    has_bias = dbias is not None and dbias.numel() > 0
    gpu, short = _device.value.gpu(p.q.device), _tile("bwd", p)
    # Query heads that share a key head go one after the other there, which must not leave the GPU idle.
    is_short = short is not None and (group == 1 or heads // group >= gpu.multiprocessors)
    delta = per_row(torch.empty_like(lse) if has_bias or not is_short else None, p)
    known = inputs(p) | {"lse": per_row(lse, p), "dout": rows(dout, p), "delta": delta}
    grads = {"dq": rows(dq, p), "dk": rows(dk, p), "dv": rows(dv, p), "dlse": per_row(dlse, p)}
    if is_short:
        pairs = gpu.share(heads // group, short)
        own = grads | {"scale": p.scale, "pairs": pairs}
        _device.value.launch(KERNELS["bwd"], heads // group // pairs, short, p, known | own)
    else:
        _bwd_in_two(known | grads | {"scale": p.scale, "out": rows(out, p)}, heads, group, p)
    if dbias is not None and has_bias:
        _bias_grad(dbias, known, p)


def _bwd_in_two(known: dict[str, Any], heads: int, group: int, p: AttentionParams) -> None:
    """dQ and delta, which dK and dV then read."""
    tile = _tile("dq", p)
    own = {name: known[name] for name in known if name not in ("dk", "dv")}
    _device.value.launch(KERNELS["dq"], heads * count(p.max_seqlen_q, tile.block_m), tile, p, own)
    tile = _tile("dkdv", p)
    own = {name: known[name] for name in known if name not in ("dq", "out", "dlse")}
    _device.value.launch(KERNELS["dkdv"], heads // group * count(p.max_seqlen_k, tile.block_n), tile, p, own)


def _bias_grad(dbias: Tensor, known: dict[str, Any], p: AttentionParams) -> None:
    """Fill dbias: partial sums in copies of the bias, as many as fill the GPU, then their sum."""
    tile, sizes = _tile("dbias", p), dbias.shape
    busy = _device.value.gpu(p.q.device).programs(tile)
    bias_tiles, copies = bias_tiles_and_copies(p, sizes, (tile.block_m, tile.block_n), busy)
    partial = dbias.new_empty(copies, *sizes, dtype=torch.float32)
    names = ("bias_batch", "bias_heads", "bias_rows", "bias_keys")
    own = dict(zip(names, sizes, strict=True)) | {"partial_ptr": partial, "copies": copies}
    broadcast = {"ROWS_BROADCAST": sizes[2] == 1, "KEYS_BROADCAST": sizes[3] == 1}
    _device.value.launch(KERNELS["dbias"], bias_tiles * copies, tile, p, known | own | broadcast)
    dbias.copy_(partial.sum(0))
