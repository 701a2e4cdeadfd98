"""Decoders that read one position at a time, as a search drives them: `DecoderCache` caches keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import Tensor

from .. import arguments, functional
from ..modules import MultiHeadAttention
from .transformer import DecoderLayer, Transformer


class StepwiseDecoder(Protocol):
    """A decoder that reads one position at a time, for several hypotheses of every source sentence."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (sentences, beam, vocab_size) of what follows the newest decoder inputs (sentences, beam)."""
        ...

    def select(self, hypotheses: Tensor, sentences: Tensor | None = None) -> None:
        """Keep some of the hypotheses and of the sentences, in a new order.

        Args:
            hypotheses: (kept sentences * beam,) int64, which of the sentences * beam hypotheses each new one extends.
            sentences: (kept sentences,) int64, which of the sentences; None for all.
        """
        ...


class _LayerCache:
    """Projected keys and values of one decoder layer.

    The source's are stored once per sentence: its hypotheses are the queries of one attention.
    """

    def __init__(self, cross_attention: MultiHeadAttention, memory: Tensor, source_mask: Tensor) -> None:
        self.memory_keys = cross_attention.project_key(memory).transpose(1, 2)  # (sentences, heads, source, head_dim)
        self.memory_values = cross_attention.project_value(memory).transpose(1, 2)
        self.source_mask = source_mask  # (sentences, 1, 1, source), True = may attend
        self.past: tuple[Tensor, Tensor] | None = None  # keys, values: (sentences * beam, heads, positions, head_dim)

    def attend_self(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        """Attention of the newest position `x` (sentences, beam, d_model) to itself and all before."""
        query, key, value = (
            project(x).flatten(0, 1).unsqueeze(2)
            for project in (attention.project_query, attention.project_key, attention.project_value)
        )
        if self.past is not None:
            key, value = torch.cat([self.past[0], key], dim=2), torch.cat([self.past[1], value], dim=2)
        self.past = key, value
        out, _ = functional.attend(arguments.attention_params(query, key, value))
        return attention.project_output(out.squeeze(2).unflatten(0, x.shape[:2]))

    def attend_memory(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        """Attention of the newest position `x` (sentences, beam, d_model) to the source."""
        query = attention.project_query(x).transpose(1, 2)
        params = arguments.attention_params(query, self.memory_keys, self.memory_values, self.source_mask)
        out, _ = functional.attend(params)
        return attention.project_output(out.transpose(1, 2))

    def select(self, hypotheses: Tensor, sentences: Tensor | None) -> None:
        """Keep some rows, as `StepwiseDecoder.select` describes."""
        if self.past is not None:
            self.past = self.past[0][hypotheses], self.past[1][hypotheses]
        if sentences is not None:
            self.memory_keys, self.memory_values = self.memory_keys[sentences], self.memory_values[sentences]
            self.source_mask = self.source_mask[sentences]


class DecoderCache:
    """A `StepwiseDecoder` that computes the newest position only: the keys and values of all others are cached.

    Args:
        model: in evaluation mode, or dropout applies.
        source: (batch, length) int64 ids, padding on the right.
        target_space: as in `Transformer.hidden`.
    """

    def __init__(self, model: Transformer, source: Tensor, target_space: int = 0) -> None:
        self.model = model
        self.length = 0
        memory = model.encode(source, target_space)
        mask = (source != model.config.pad_id)[:, None, None]
        decoder = cast(Iterable[DecoderLayer], model.decoder)
        self.layers = [_LayerCache(layer.cross_attention, memory, mask) for layer in decoder]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (sentences, beam, vocab_size) of what follows the newest decoder inputs (sentences, beam)."""
        position = torch.tensor(self.length, device=tokens.device)
        self.length += 1
        return self.model.logits(self.model.decode(tokens, position, self.length, self.layers))

    def select(self, hypotheses: Tensor, sentences: Tensor | None = None) -> None:
        """Keep some of the hypotheses and of the sentences, as `StepwiseDecoder.select` describes."""
        for layer in self.layers:
            layer.select(hypotheses, sentences)
