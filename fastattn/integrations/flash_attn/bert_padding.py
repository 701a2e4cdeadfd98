"""Between padded batches and packed sequences, as in flash_attn.bert_padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tensors, values


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor, differentiable.

    Args:
        x: (rows, ...).
        indices: (total,) int64.

    Returns:
        (total, ...).
    """
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one behind the other, and what `flash_attn_varlen_func` needs of them.

    Reads the number of tokens, and so waits for a GPU.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int; 1 or True: a token, else padding.
        unused_mask: (batch, seqlen), bool or int; 1 or True: a place that is kept without being a token.

    Returns:
        tokens: (total, ...), those of both masks, differentiable.
        indices: (total,) int64, where they were in (batch * seqlen, ...); for `pad_input`.
        cu_seqlens: (batch + 1,) int32.
        max_seqlen: int, the longest length.
        seqused: (batch,) int32, the tokens of attention_mask alone.

    Raises:
        ValueError: a mask is not (batch, seqlen).
    """
    tensors.check("hidden_states", hidden_states)
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and (hidden_states.dim() < 2 or mask.shape != hidden_states.shape[:2]):
            shapes = f"{tuple(mask.shape)}, hidden_states {tuple(hidden_states.shape)}"
            raise ValueError(f"{name}: must be (batch, seqlen), those of hidden_states, got {shapes}")
    is_kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = is_kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = is_kept.flatten().nonzero().flatten()
    edges = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, edges, max_seqlen, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: tokens put back into a padded batch, 0 elsewhere; differentiable.

    Args:
        hidden_states: (total, ...).
        indices: (total,) int64, from `unpad_input`.
        batch, seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...).

    Raises:
        ValueError: there are not as many indices as tokens, or batch or seqlen is no length.
    """
    tensors.check("hidden_states", hidden_states)
    if indices.dim() != 1 or indices.shape[0] != hidden_states.shape[0]:
        rule = f"must be (total,) = ({hidden_states.shape[0]},), one for each token"
        raise ValueError(f"indices: {rule}, got {tuple(indices.shape)}")
    batch, seqlen = values.length("batch", batch), values.length("seqlen", seqlen)
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
