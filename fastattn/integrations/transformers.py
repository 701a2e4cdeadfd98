"""fastattn as an attention implementation of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import functional
from ..values import described

NAME = "fastattn"


def register() -> None:
    """Let transformers' models take attn_implementation="fastattn"::

        fastattn.integrations.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
        model.set_attn_implementation("fastattn")  # or a model that is there

    Models that ask transformers for their attention function are reached: all that take "sdpa" or "flex_attention".
    Softcaps, attention sinks, grouped heads, and relative-position biases with their exact gradients are computed.
    Windows, packed sequences and padding come as the masks that transformers makes for "sdpa". Queries that may attend
    to nothing, as at left padding, get 0, where eager gives a mean of all values. Twice is once.

    A call raises ValueError, with the argument's name, if it asks for the weights (output_attentions), has the paged
    cache of continuous batching, or another kind of sinks or sparse blocks than GPT-OSS's.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, called as transformers calls it: (batch, heads, length, head_dim) to (batch, length, ...).

    Raises:
        ValueError: transformers asks for what is not computed.
    """
    _refuse(kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # A mask of transformers' holds the order of the tokens already. Without one, query 0 is at key 0, or it is alone.
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    mask, bias = _mask_and_bias(attention_mask, position_bias, key.shape[2])
    same = _same_sequence(cu_seq_lens_q, cu_seq_lens_k, query, key)
    if same is not None:
        mask = same if mask is None else mask & same
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        is_causal,
        scaling,
        enable_gqa=True,
        attn_bias=bias,
        softcap=softcap,
        sinks=s_aux,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: must be False, got True; attn_implementation='eager' returns the weights")
    if kwargs.get("cache") is not None:
        rule = "must be None, as paged caches are transformers' own kernels'"
        raise ValueError(
            f"cache: {rule}, got {described(kwargs['cache'])}; use generate with a dynamic or static cache"
        )
    for name in ("sinks", "block_indices"):
        if kwargs.get(name) is not None:
            rule = "must be None, as this model's own kind of it is not computed"
            raise ValueError(f"{name}: {rule}, got {described(kwargs[name])}; use attn_implementation='eager'")


def _mask_and_bias(
    attention_mask: Tensor | None, position_bias: Tensor | None, seqlen_k: int
) -> tuple[Tensor | None, Tensor | None]:
    """The bool mask and the bias of the scores; a caller's own mask may be a float one, and longer than the keys."""
    mask = None if attention_mask is None else attention_mask[..., :seqlen_k]
    if mask is None or mask.dtype == torch.bool:
        return mask, position_bias
    return None, mask if position_bias is None else mask + position_bias


def _same_sequence(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Which queries and keys of a packed batch belong together: (seqlen_q, seqlen_k).

    A mask may have been made of the positions, and then it says so too; made of a padding mask it does not.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seq_lens_q" if cu_seqlens_q is None else "cu_seq_lens_k"
        raise ValueError(f"{missing}: must be given with its twin, got None")
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: must come with a batch of 1, which is packed, got {query.shape[0]}")
    sequence_q = torch.bucketize(torch.arange(query.shape[2], device=query.device), cu_seqlens_q[1:], right=True)
    sequence_k = torch.bucketize(torch.arange(key.shape[2], device=key.device), cu_seqlens_k[1:], right=True)
    return sequence_q[:, None] == sequence_k[None, :]
