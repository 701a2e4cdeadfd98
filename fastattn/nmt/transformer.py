"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017).

The paper's text decides. Where it is silent, its authors' first released code does: Glorot-uniform projections with
biases, q, k, v (of cross-attention: k, v) initialised as one matrix, no bias at the output, LayerNorm eps 1e-6, the end
of sentence as first decoder input, and a learned vector for the target language added to the encoder's input. With that
vector's table of 32 rows and 41,000 ids the numbers of parameters are those of the paper's Table 3.

A batch is padded, (batch, length) ids, or packed, `PackedTokens`, without padding. The layers are the same:
only the way in which a layout finds positions and attends differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modules import MultiHeadAttention
from .config import TransformerConfig
from .layout import Layout, PackedTokens, layout_of


class Attends(Protocol):
    """One decoder layer's attention, over all earlier positions at once (training) or through a cache (generation)."""

    def attend_self(self, attention: MultiHeadAttention, x: Tensor) -> Tensor: ...

    def attend_memory(self, attention: MultiHeadAttention, x: Tensor) -> Tensor: ...


@dataclass
class TeacherForcing:
    """Attention of all target positions at once, each to those before it and to the encoder's output `memory`."""

    target: Layout
    source: Layout
    memory: Tensor

    def attend_self(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        return self.target.attend(attention, x, x, self.target, is_causal=True)

    def attend_memory(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        return self.target.attend(attention, x, self.memory, self.source)


# ---- layers ----


class Residual(nn.Module):
    """The connection around a sub-layer: residual sum, dropout of the sub-layer's output, LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.is_pre = config.norm == "pre"

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.is_pre:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


def _attention(config: TransformerConfig, is_cross: bool = False) -> MultiHeadAttention:
    """Attention, drawn Glorot-uniform; projections of the same input count as one matrix, with all their fan-out."""
    default = config.d_model // config.num_heads
    head_dim, v_head_dim = config.head_dim or default, config.v_head_dim or default
    attention = MultiHeadAttention(
        config.d_model, config.num_heads, batch_first=True, head_dim=head_dim, v_head_dim=v_head_dim
    )
    rows = attention.in_proj_weight.shape[0]
    q_rows = attention.num_heads * attention.head_dim
    for matrix in attention.in_proj_weight.detach().split([q_rows, rows - q_rows] if is_cross else [rows]):
        nn.init.xavier_uniform_(matrix)
    nn.init.xavier_uniform_(attention.out_proj.weight)
    return attention


def _feed_forward(config: TransformerConfig) -> nn.Sequential:
    inner, outer = nn.Linear(config.d_model, config.d_ff), nn.Linear(config.d_ff, config.d_model)
    for linear in (inner, outer):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(inner, nn.ReLU(), outer)


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = _attention(config)
        self.feed_forward = _feed_forward(config)
        self.residuals = nn.ModuleList(Residual(config) for _ in range(2))

    def forward(self, x: Tensor, source: Layout) -> Tensor:
        x = self.residuals[0](x, lambda y: source.attend(self.self_attention, y, y, source))
        return self.residuals[1](x, self.feed_forward)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = _attention(config)
        self.cross_attention = _attention(config, is_cross=True)
        self.feed_forward = _feed_forward(config)
        self.residuals = nn.ModuleList(Residual(config) for _ in range(3))

    def forward(self, x: Tensor, context: Attends) -> Tensor:
        x = self.residuals[0](x, lambda y: context.attend_self(self.self_attention, y))
        x = self.residuals[1](x, lambda y: context.attend_memory(self.cross_attention, y))
        return self.residuals[2](x, self.feed_forward)


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Table (length, d_model) float32: sin(pos / 10000^(2i/d)) at column 2i, the cosine at 2i + 1 (section 3.5)."""
    column = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000.0 ** (column / d_model)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model].float()


class Positions(nn.Module):
    """The vector of every position: the paper's sinusoids, or a learned table drawn from N(0, 1 / d_model)."""

    table: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.is_learned = config.positions == "learned"
        if self.is_learned:
            self.table = nn.Parameter(torch.randn(config.max_len, config.d_model) * config.d_model**-0.5)
        else:
            self.register_buffer("table", sinusoidal_positions(config.max_len, config.d_model), persistent=False)

    def forward(self, positions: Tensor, max_seqlen: int) -> Tensor:
        """Vectors (..., d_model) of `positions` (...), all below `max_seqlen`."""
        table = self.table
        if max_seqlen > table.shape[0]:
            if self.is_learned:
                raise ValueError(f"length: learned positions end at max_len {table.shape[0]}, got {max_seqlen}")
            table = sinusoidal_positions(max_seqlen, table.shape[1]).to(table)
        return F.embedding(positions, table)


# ---- the model ----


class Transformer(nn.Module):
    """Encoder-decoder whose source, target and output embeddings are one matrix.

    `model(source, target)` returns the logits of `target` under teacher forcing: the decoder reads `bos_id` and
    `target[:-1]`, so that the logits at a position are those of the target id at that same position. `source` and
    `target` are both int64 ids (batch, length) padded on the right, or both `PackedTokens`; results are then
    (batch, target length, ...) or (total target tokens, ...).

    Setting `checkpoint_activations` keeps only the inputs of the layers for the gradient and computes the rest again:
    about a quarter more time for a fraction of the memory, and the same gradients.

    Args:
        config: sizes and constants.

    Raises:
        ValueError: ids that are not int64, of the wrong shape or (checked on the CPU only) outside the vocabulary; a
            length beyond `max_len` with learned positions; a target space outside the table.

    Source: section 3.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        rows = config.num_target_spaces
        self.target_spaces = nn.Embedding(rows, config.d_model) if rows else None
        self.positions = Positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        is_pre = config.norm == "pre"
        self.encoder_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps) if is_pre else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps) if is_pre else nn.Identity()
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        nn.init.zeros_(self.embedding.weight[config.pad_id].detach())
        if self.target_spaces is not None:
            nn.init.xavier_uniform_(self.target_spaces.weight)

    def forward(self, source: Tensor | PackedTokens, target: Tensor | PackedTokens, target_space: int = 0) -> Tensor:
        """Logits (..., vocab_size) of every target id given those before it; the arguments of `hidden`."""
        return self.logits(self.hidden(source, target, target_space))

    def hidden(self, source: Tensor | PackedTokens, target: Tensor | PackedTokens, target_space: int = 0) -> Tensor:
        """Decoder states (..., d_model), which with `output_weight` are what the chunked loss takes.

        Args:
            source: ids of the source sentences.
            target: ids of the target sentences, each ended by `eos_id`.
            target_space: row of the table of target languages, the same for the whole batch.
        """
        source_layout, target_layout = self._layout("source", source), self._layout("target", target)
        if type(source_layout) is not type(target_layout) or source_layout.batch_size != target_layout.batch_size:
            raise ValueError(
                f"target: must be {_described(source_layout)} as source is, got {_described(target_layout)}"
            )
        memory = self._encode(source_layout, target_space)
        context = TeacherForcing(target_layout, source_layout, memory)
        decoder_input = target_layout.shift_right(self.config.bos_id)
        contexts = [context] * len(self.decoder)
        return self.decode(decoder_input, target_layout.positions, target_layout.max_seqlen, contexts)

    def encode(self, source: Tensor | PackedTokens, target_space: int = 0) -> Tensor:
        """The encoder's output (..., d_model); the arguments of `hidden`."""
        return self._encode(self._layout("source", source), target_space)

    def decode(self, tokens: Tensor, positions: Tensor, max_seqlen: int, contexts: Iterable[Attends]) -> Tensor:
        """Decoder states of decoder inputs that are already shifted.

        Args:
            tokens: (...) int64 ids.
            positions: int64, broadcasts to `tokens`; all below `max_seqlen`.
            contexts: the attention of each layer.
        """
        x = self.dropout(self._embed(tokens, positions, max_seqlen))
        for layer, context in zip(self.decoder, contexts, strict=True):
            x = self._run(layer, x, context)
        return self.decoder_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of decoder states (..., d_model)."""
        return F.linear(hidden, self.output_weight())

    def output_weight(self) -> Tensor:
        """The shared matrix (vocab_size, d_model), such that no gradient reaches the row of padding."""
        weight = self.embedding.weight
        if not torch.is_grad_enabled():
            return weight
        return weight.select_scatter(weight.new_zeros(weight.shape[1]), 0, self.config.pad_id)

    def save(self, path: str | PathLike[str]) -> None:
        """Write configuration and parameters to one file, for `load`."""
        torch.save({"config": asdict(self.config), "state_dict": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> Transformer:
        """The model that `save` wrote, in training mode; reads tensors and numbers only, never code.

        Raises:
            ValueError: the file holds something else, whatever that is.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(TransformerConfig(**saved["config"]))
            model.load_state_dict(saved["state_dict"])
        except (UnpicklingError, EOFError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"path: {path} is not a model that Transformer.save wrote") from error
        return model.to(device)

    def _embed(self, tokens: Tensor, positions: Tensor, max_seqlen: int) -> Tensor:
        return self.embedding(tokens) * self.config.d_model**0.5 + self.positions(positions, max_seqlen)

    def _encode(self, source: Layout, target_space: int) -> Tensor:
        x = self._embed(source.tokens, source.positions, source.max_seqlen)
        spaces = max(1, self.config.num_target_spaces)
        if not 0 <= target_space < spaces:
            raise ValueError(f"target_space: must lie in [0, {spaces}), got {target_space}")
        if self.target_spaces is not None:
            x = x + self.target_spaces.weight[target_space]
        x = self.dropout(x)
        for layer in self.encoder:
            x = self._run(layer, x, source)
        return self.encoder_norm(x)

    def _run(self, layer: nn.Module, x: Tensor, context: Any) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, x, context, use_reentrant=False)
        return layer(x, context)

    def _layout(self, name: str, ids: Tensor | PackedTokens) -> Layout:
        return layout_of(name, ids, self.config.vocab_size, self.config.pad_id)


def _described(layout: Layout) -> str:
    return f"{layout.batch_size} {type(layout).__name__.lower()} sentences"
