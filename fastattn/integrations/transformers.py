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

# What a mask stands for, as an attribute of the mask: whoever loses it computes the same from the mask itself.
_BAND, _IS_PACKED = "_fastattn_band", "_fastattn_is_packed"


def register() -> None:
    """Let transformers' models take attn_implementation="fastattn"::

        fastattn.integrations.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
        model.set_attn_implementation("fastattn")  # or a model that is there

    Models that ask transformers for their attention function are reached: all that take "sdpa" or "flex_attention".
    Softcaps, attention sinks, grouped heads, chosen keys (indices), and relative-position biases with their exact
    gradients are computed.
    A mask of a causal window is computed as a band, packed sequences that come with their bounds (cu_seq_lens_q, as for
    flash attention) as such, all else by the mask that transformers makes for "sdpa". Queries that may attend to
    nothing, as at left padding, get 0, where eager gives a mean of all values. Twice is once.

    A call raises ValueError, with the argument's name, if it asks for the weights (output_attentions), has the paged
    cache of continuous batching, another kind of sinks than GPT-OSS's or sparse blocks; or if it is causal, without
    a mask, and has another number of keys than of queries, which leaves open where the first query stands.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask that transformers makes for "sdpa"; if it is nothing but a causal window, marked as one."""
    kwargs["local_size"] = local_size
    if q_length not in (1, kv_length):
        # Nothing would be made for an empty static cache, and models that go on with their last tokens only, as
        # Gemma 4 does, would let these see all of it.
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)
    if mask is None or local_size is None or torch.compiler.is_compiling():
        return mask
    distance = torch.arange(kv_length, device=mask.device) - torch.arange(q_length, device=mask.device)[:, None]
    distance = distance - (kv_length - q_length)
    # Compared, and not taken from local_size: the chunks of Llama 4 have one, too.
    if torch.equal(mask, ((distance <= 0) & (distance > -local_size)).expand_as(mask)):
        setattr(mask, _BAND, (local_size - 1, 0))
    return mask


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
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, called as transformers calls it: (batch, heads, length, head_dim) to (batch, length, ...).

    Raises:
        ValueError: transformers asks for what is not computed.
    """
    _refuse(kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    same: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "enable_gqa": True}
    further: list[Tensor] = []  # masks beside transformers' own
    if indices is not None:
        further.append(_chosen(indices, query, key))
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        bounds = _bounds(cu_seq_lens_q, cu_seq_lens_k, query)
        together = _same_sequence(*bounds, query, key)
        if position_bias is None and not further and _is_that_mask(attention_mask, together, is_causal):
            return _packed(query, key, value, bounds, is_causal, dropout, same), None
        further.append(together)
    band = None if further else _band(attention_mask, query, key)
    if band is not None:
        return _windowed(query, key, value, band, position_bias, dropout, same), None
    # A mask of transformers' holds the order of the tokens already. Without one the queries are the keys, or one alone.
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    if is_causal and query.shape[2] != key.shape[2]:
        rule = "must be given where a causal layer has another number of keys than of queries"
        raise ValueError(f"attention_mask: {rule}, got None, {key.shape[2]} keys and {query.shape[2]} queries")
    for more in further:
        attention_mask = _and(attention_mask, more)
    mask, bias = _mask_and_bias(attention_mask, position_bias, key.shape[2])
    out = functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, attn_bias=bias, **same)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _band(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[int, int] | None:
    if mask is None or mask.shape[2:] != (query.shape[2], key.shape[2]):
        return None
    band: tuple[int, int] | None = getattr(mask, _BAND, None)
    return band


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], bias: Tensor | None, dropout: float, same: Any
) -> Tensor:
    out = functional.scaled_dot_product_attention(
        query, key, value, None, dropout, attn_bias=bias, window=window, causal_align="bottom-right", **same
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous()


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


def _chosen(indices: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which keys a sparse model's indexer chose: (batch, 1, seqlen_q, seqlen_k), of (batch, seqlen_q, chosen) keys."""
    if indices.ndim != 3 or indices.shape[:2] != (query.shape[0], query.shape[2]):
        rule = f"must have shape ({query.shape[0]}, {query.shape[2]}, chosen keys)"
        raise ValueError(f"indices: {rule}, got {described(indices)}; use attn_implementation='eager'")
    shape = (*indices.shape[:2], key.shape[2])
    return torch.zeros(shape, dtype=torch.bool, device=query.device).scatter(-1, indices.long(), True)[:, None]


def _and(attention_mask: Tensor | None, mask: Tensor) -> Tensor:
    if attention_mask is None:
        return mask
    attention_mask = attention_mask[..., : mask.shape[-1]]
    return attention_mask & mask if attention_mask.dtype == torch.bool else attention_mask.where(mask, -torch.inf)


# ---- packed sequences: a batch of 1, and where each begins ----


def _bounds(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seq_lens_q" if cu_seqlens_q is None else "cu_seq_lens_k"
        raise ValueError(f"{missing}: must be given with its twin, got None")
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: must come with a batch of 1, which is packed, got {query.shape[0]}")
    return cu_seqlens_q.int(), cu_seqlens_k.int()


def _same_sequence(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which queries and keys of a packed batch belong together: (seqlen_q, seqlen_k)."""
    sequence_q = torch.bucketize(torch.arange(query.shape[2], device=query.device), cu_seqlens_q[1:], right=True)
    sequence_k = torch.bucketize(torch.arange(key.shape[2], device=key.device), cu_seqlens_k[1:], right=True)
    return sequence_q[:, None] == sequence_k[None, :]


def _is_that_mask(mask: Tensor | None, together: Tensor, is_causal: bool) -> bool:
    """Whether a mask leaves nothing out but other sequences and, if the layer is causal, later tokens.

    It is compared by its first layer, and remembers the answer for the others.
    """
    if mask is None:
        return True
    if torch.compiler.is_compiling() or mask.dtype != torch.bool or mask.shape[2:] != together.shape:
        return False
    if not hasattr(mask, _IS_PACKED):
        # Made of the positions it leaves out other sequences, made of a padding mask it does not.
        setattr(mask, _IS_PACKED, torch.equal((mask & together)[0, 0], together.tril() if is_causal else together))
    return bool(getattr(mask, _IS_PACKED)) and mask.shape[:2] == (1, 1)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], is_causal: bool, dropout: float, same: Any
) -> Tensor:
    longest = [int(x.diff().max()) for x in bounds]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = functional.varlen_attention(q, k, v, *bounds, *longest, dropout_p=dropout, is_causal=is_causal, **same)
    assert isinstance(out, Tensor)
    return out[None]
