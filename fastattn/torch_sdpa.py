"""torch's own attention function, and plain torch operations for the calls of which it does not say the same."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compat, reference
from .params import UNBOUNDED, AttentionParams
from .reference import attention_bwd, attention_fwd

__all__ = ["attention", "attention_bwd", "attention_fwd"]


def _has_band(p: AttentionParams) -> bool:
    return p.left < UNBOUNDED or p.right < UNBOUNDED


def _is_causal(p: AttentionParams) -> bool:
    """Whether the call's mask, band and bias are torch's is_causal."""
    is_plain_causal = p.left == UNBOUNDED and p.right == 0 and p.mask is None and p.bias is None
    # With a scale of 0 or less torch's causal kernels return NaN: they mask by -inf before they scale.
    return is_plain_causal and p.scale > 0 and (not p.bottom_right or _is_square(p))


def needs_band(p: AttentionParams) -> bool:
    """Whether torch's function is given the call's band as a mask, which has the lengths of the call."""
    return _has_band(p) and (p.bottom_right or not _is_causal(p))


def attention(p: AttentionParams) -> tuple[Tensor, None]:
    """out of F.scaled_dot_product_attention, for a call for which it says the same, and no lse."""
    mask, options = p.mask, {}
    if _is_causal(p):
        options["is_causal"] = True
    elif _has_band(p):
        mask = reference.band(p) if mask is None else reference.band(p) & mask
    if p.bias is not None:
        mask = p.bias if mask is None else torch.where(mask, p.bias, -torch.inf)
    if p.q.size(1) != p.k.size(1):
        options["enable_gqa"] = True
    if p.q.device.type == "cpu" and p.q.dtype in (torch.float16, torch.bfloat16):
        # In half precision torch's gradient is ten times slower than in float32 on the CPU.
        q, k, v = (x.float() for x in (p.q, p.k, p.v))
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.autocast("cpu", enabled=False):
            return compat.sdpa(q, k, v, mask, scale=p.scale, **options).to(p.q.dtype), None
    return compat.sdpa(p.q, p.k, p.v, mask, scale=p.scale, **options), None


def _is_square(p: AttentionParams) -> bool:
    """Whether both alignments are the same band; a traced graph does not ask, lest it hold for such lengths alone."""
    return not torch.compiler.is_compiling() and p.max_seqlen_q == p.max_seqlen_k
