"""Attention over keys in parts: each part's weights sum to 1, and its log-sum-exp says what share of all it has.

    lse = log(sum over parts of exp(lse_i))          out = sum over parts of exp(lse_i - lse) out_i

A sink is a part whose log-sum-exp is one number per head, and whose values are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, tensors
from .values import described, flag


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor], *, packed: bool = False) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from that over parts of them.

    Exact: what `scaled_dot_product_attention(..., return_lse=True)` or `varlen_attention` give for disjoint parts of
    the keys is put together to what they give for all, as in ring attention or over the pages of a cache. Parts may be
    seen by some queries only (band, mask, lengths); a query that sees no key of any part gets 0 and -inf.
    Differentiable, in outs and lses, and so through the parts in q, k, v and biases.

    Args:
        outs: at least one, each (..., nheads, seqlen_q, head_dim_v), packed (total_q, nheads, head_dim_v), of one dtype
            and device.
        lses: as many, each (..., nheads, seqlen_q), packed (nheads, total_q), natural log, of one dtype.
        packed: the tensors are those of `varlen_attention`.

    Returns:
        out: as each of outs.
        lse: as each of lses.

    Raises:
        ValueError: there is no part, there are not as many lses as outs, or shapes, dtypes or devices differ.

    Source: Dao et al. 2022, section 3.1; Liu et al. 2023, "Ring Attention".
    """
    packed = flag("packed", packed)
    outs, lses = _checked("outs", outs), _checked("lses", lses)
    if len(outs) != len(lses):
        raise ValueError(f"lses: must be as many as outs, {len(outs)}, got {len(lses)}")
    rows = outs[0].shape[1::-1] if packed else outs[0].shape[:-1]
    if lses[0].shape != rows:
        shapes = f"{tuple(rows)}, as outs of {tuple(outs[0].shape)}, got {tuple(lses[0].shape)}"
        raise ValueError(f"lses: must be of shape {shapes}")
    shares, lse = reference.softmax(torch.stack(lses, -1))
    parts = [out * _of_rows(share, packed) for out, share in zip(outs, shares.unbind(-1), strict=True)]
    return sum(parts[1:], parts[0]).to(outs[0].dtype), lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """out and lse of rows in which each head's sink takes its share of the weights.

    Args:
        out, lse: 4-D or packed, without sinks.
        sinks: (nheads,) float, logits, checked.
    """
    logits = sinks.to(lse.dtype)[:, None].expand_as(lse)
    shares, total = reference.softmax(torch.stack([lse, logits], -1))
    return (out * _of_rows(shares[..., 0], packed)).to(out.dtype), total


def check_sinks(sinks: Tensor, query: Tensor) -> None:
    """One logit for each head of query, 4-D or packed.

    Raises:
        ValueError: sinks have another shape, dtype or device.
    """
    tensors.check("sinks", sinks)
    tensors.check_device("sinks", sinks, query)
    nheads = query.shape[1]
    if not sinks.is_floating_point() or tuple(sinks.shape) != (nheads,):
        got = f"{sinks.dtype}, {tuple(sinks.shape)}"
        raise ValueError(f"sinks: must be floats of shape (nheads,) = ({nheads},), got {got}")


def _of_rows(share: Tensor, packed: bool) -> Tensor:
    """A factor for each row of out, from one for each row of lse."""
    return (share.T if packed else share)[..., None]


def _checked(name: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors alike."""
    if isinstance(parts, Tensor) or not isinstance(parts, Sequence) or not parts:
        raise ValueError(f"{name}: must be a list of at least one tensor, got {described(parts)}")
    first = parts[0]
    for x in parts:
        tensors.check(name, x)
        tensors.check_device(name, x, first)
        if x.shape != first.shape or x.dtype != first.dtype:
            kinds = f"{tuple(first.shape)}, {first.dtype} and {tuple(x.shape)}, {x.dtype}"
            raise ValueError(f"{name}: must be of one shape and dtype, got {kinds}")
    return list(parts)
