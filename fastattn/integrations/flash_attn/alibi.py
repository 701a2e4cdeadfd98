"""ALiBi as flash-attn defines it: -slope * |i + seqlen_k - seqlen_q - j| is added to the score of query i and key j.

Where no query looks ahead, that is slope * j less slope * (i + seqlen_k - seqlen_q), which a row has in common and
softmax does not see: a bias for each key is enough, and the log-sum-exp is corrected. Both count from the last key, so
that they are small where weights are large. Otherwise the bias has an element for each pair.

Source: Press, Smith and Lewis 2022, "Train Short, Test Long", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import tensors


def checked(slopes: Tensor, q: Tensor, batch: int, nheads: int) -> Tensor:
    """Slopes, (nheads,) or (batch, nheads) float32 on q's device, in the precision of the computation.

    Raises:
        ValueError: they are not.
    """
    tensors.check("alibi_slopes", slopes)
    tensors.check_device("alibi_slopes", slopes, q)
    if slopes.dtype != torch.float32 or tuple(slopes.shape) not in ((nheads,), (batch, nheads)):
        shapes = f"({nheads},) or ({batch}, {nheads})"
        got = f"{slopes.dtype}, {tuple(slopes.shape)}"
        raise ValueError(f"alibi_slopes: must be float32, (nheads,) or (batch, nheads) = {shapes}, got {got}")
    return slopes.double() if q.dtype == torch.float64 else slopes


def bias(slopes: Tensor, seqlen_q: int, seqlen_k: int, shift: int | Tensor, looks_ahead: bool) -> Tensor:
    """What is added to the scores.

    Args:
        slopes: (nheads,) or (batch, nheads).
        shift: seqlen_k - seqlen_q of all sequences, or of each, (batch,); the lengths may be padded ones.
        looks_ahead: a query may see keys j > i + shift.

    Returns:
        (nheads, 1, seqlen_k) or (batch, nheads, 1, seqlen_k) unless looks_ahead, else with seqlen_q rows, and with a
        batch dimension if slopes or shift have one.
    """
    keys = torch.arange(seqlen_k, device=slopes.device)
    if not looks_ahead:
        return slopes[..., None, None] * (keys - (seqlen_k - 1))
    rows = torch.arange(seqlen_q, device=slopes.device)[:, None]
    rows = rows + (shift[:, None, None, None] if isinstance(shift, Tensor) else shift)
    return -slopes[..., None, None] * (rows - keys).abs()


def corrected_lse(lse: Tensor, slopes: Tensor, seqlen_k: int, shift: int | Tensor) -> Tensor:
    """lse of dense rows, (batch, nheads, seqlen_q), with the part of the bias that a row has in common.

    Args:
        slopes, seqlen_k, shift: as `bias` was called with, and looks_ahead=False.
    """
    rows = torch.arange(lse.size(-1), device=lse.device)
    rows = rows + (shift[:, None, None] if isinstance(shift, Tensor) else shift)
    return lse - slopes[..., None] * (rows - (seqlen_k - 1))


def corrected_packed_lse(lse: Tensor, slopes: Tensor, seqlen_k: int, shift: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The same of packed rows, (nheads, total_q); tokens of no sequence stay -inf.

    Args:
        seqlen_k: as `bias` was called with.
        shift: of each sequence, (batch,).
        cu_seqlens_q: (batch + 1,).
    """
    if shift.numel() == 0:
        return lse
    tokens = torch.arange(lse.size(-1), device=lse.device)
    sequence = torch.bucketize(tokens, cu_seqlens_q[1:].long(), right=True).clamp(max=shift.size(0) - 1)
    rows = tokens - cu_seqlens_q[sequence] + shift[sequence]
    of_tokens = slopes[:, None] if slopes.dim() == 1 else slopes[sequence].T
    return lse - of_tokens * (rows - (seqlen_k - 1))
