"""The C++ kernels of csrc/cpu: which instruction set runs them, with what workspace."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .. import _cpu
from ..params import AttentionParams, Backward, Buffers, Forward
from ..seam import Seam

ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
ISAS = _cpu.ISAS  # the instruction sets that this CPU has and the build knows, the best first
MAX_BIAS_COPIES = 8  # partial sums of the gradient of a bias that all sequences share: tasks that can run at once


def _wanted_isa() -> str:
    name = os.environ.get("FASTATTN_CPU_ISA") or ISAS[0]
    if name not in ISAS:
        raise ValueError(f"FASTATTN_CPU_ISA: must be one of those that this CPU has, {', '.join(ISAS)}, got {name!r}")
    return name


_isa = Seam(_wanted_isa())


def isa() -> str:
    """The instruction set that runs: FASTATTN_CPU_ISA, else the best of ISAS."""
    return _isa.value


def on(isa: str) -> AbstractContextManager[None]:
    """Kernels of calls inside, and of their backward passes in whatever thread, run on this one of ISAS."""
    return _isa.replaced(isa)


# ---- forward ----


def attention_fwd(forward: Forward, p: AttentionParams) -> None:
    """Fill out and lse."""
    _cpu.attention_fwd(_isa.value, ELEMENTS[p.q.dtype], torch.get_num_threads(), p, Buffers(*forward))


# ---- backward ----


def attention_bwd(backward: Backward, p: AttentionParams) -> None:
    """Fill dq, dk, dv and, unless it is None, dbias."""
    if p.batch_size() * p.q.shape[1] == 0:
        backward.fill_zero()
        return
    out, lse, dout, dlse, dq, dk, dv, dbias = backward
    # Sums over blocks of keys are kept where they are rounded once.
    dq_sum = None if dq.dtype == torch.float32 else lse.new_empty(*lse.shape, dq.shape[-1])
    partial = None if dbias is None or dbias.numel() == 0 else _partial_sums(dbias, p)
    buffers = Buffers(out, lse, dout, dlse, None, dq, dk, dv, dq_sum, partial, dbias)
    _cpu.attention_bwd(_isa.value, ELEMENTS[p.q.dtype], torch.get_num_threads(), p, buffers)
    if dbias is not None and partial is not None:
        dbias.copy_(partial.sum(0))


def _partial_sums(dbias: Tensor, p: AttentionParams) -> Tensor:
    """Zeros, (copies, *dbias.shape) float32."""
    copies = min(MAX_BIAS_COPIES, p.batch_size()) if dbias.shape[0] == 1 else 1
    return dbias.new_zeros(copies, *dbias.shape, dtype=torch.float32)
