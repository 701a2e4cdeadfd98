"""The layouts of a batch of sentences in memory: padded, or packed one after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules import MultiHeadAttention


class PackedTokens(NamedTuple):
    """Sentences one after the other, without padding."""

    tokens: Tensor  # (total,) int64
    cu_seqlens: Tensor  # (batch + 1,) int32, where each sentence starts, and the end of the last
    max_seqlen: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        """The same sentences on another device."""
        tokens, cu_seqlens = (x.to(device, non_blocking=non_blocking) for x in (self.tokens, self.cu_seqlens))
        return PackedTokens(tokens, cu_seqlens, self.max_seqlen)


def pack(tokens: Tensor, pad_id: int = 0) -> PackedTokens:
    """Remove the padding of (batch, length) ids; waits for the device if they are not on the CPU."""
    kept = tokens != pad_id
    lengths = kept.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return PackedTokens(tokens[kept], cu_seqlens, max(lengths.tolist(), default=0))


class Padded:
    """Sentences (batch, length) with padding on the right."""

    def __init__(self, tokens: Tensor, pad_id: int) -> None:
        self.tokens = tokens
        self.batch_size = tokens.shape[0]
        self.max_seqlen = tokens.shape[1]
        self.positions = torch.arange(self.max_seqlen, device=tokens.device)
        self.key_padding_mask = tokens == pad_id

    def shift_right(self, bos_id: int) -> Tensor:
        """The decoder's input: every sentence one place to the right, after `bos_id`."""
        return F.pad(self.tokens, (1, 0), value=bos_id)[:, :-1]

    def attend(
        self, attention: MultiHeadAttention, query: Tensor, key: Tensor, keys: Any, is_causal: bool = False
    ) -> Tensor:
        """Attention from these sentences' `query` to the `key` of the sentences laid out as `keys`."""
        # Padding is on the right: under the causal mask no query but padding itself attends to it.
        padding = None if is_causal else keys.key_padding_mask
        return attention(query, key, key, key_padding_mask=padding, need_weights=False, is_causal=is_causal)[0]


class Packed:
    """Sentences (total,) end to end."""

    def __init__(self, packed: PackedTokens) -> None:
        self.tokens, self.cu_seqlens, self.max_seqlen = packed
        self.batch_size = self.cu_seqlens.shape[0] - 1
        index = torch.arange(self.tokens.shape[0], dtype=torch.int32, device=self.tokens.device)
        sentence = torch.searchsorted(self.cu_seqlens, index, right=True, out_int32=True) - 1
        self.positions = index - self.cu_seqlens[sentence]

    def shift_right(self, bos_id: int) -> Tensor:
        """The decoder's input: every sentence one place to the right, after `bos_id`."""
        return torch.where(self.positions == 0, bos_id, self.tokens.roll(1))

    def attend(
        self, attention: MultiHeadAttention, query: Tensor, key: Tensor, keys: Any, is_causal: bool = False
    ) -> Tensor:
        """Attention from these sentences' `query` to the `key` of the sentences laid out as `keys`."""
        lengths = self.cu_seqlens, keys.cu_seqlens, self.max_seqlen, keys.max_seqlen
        return attention.forward_packed(query, key, key, *lengths, is_causal=is_causal)


Layout = Padded | Packed


def layout_of(name: str, ids: Tensor | PackedTokens, vocab_size: int, pad_id: int) -> Layout:
    """The layout of the argument `name`, its ids checked: by value only on the CPU, uncompiled, where that is free."""
    tokens, dims, rule = (ids.tokens, 1, "(total,)") if isinstance(ids, PackedTokens) else (ids, 2, "(batch, length)")
    if tokens.dtype != torch.int64 or tokens.dim() != dims:
        raise ValueError(f"{name}: must be {rule} int64, got shape {tuple(tokens.shape)}, dtype {tokens.dtype}")
    is_readable = tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.compiler.is_compiling()
    if is_readable and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"{name}: ids {tokens.min()} ... {tokens.max()} must lie in [0, {vocab_size})")
    return Packed(ids) if isinstance(ids, PackedTokens) else Padded(ids, pad_id)
