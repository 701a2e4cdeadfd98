"""The sizes and constants of the Transformers of "Attention Is All You Need"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and constants of one model; the defaults are the paper's base model.

    Args:
        vocab_size: V, ids shared by source and target.
        d_model: width of the residual stream; also that of the embeddings.
        d_ff: width of the feed-forward layers.
        num_heads: h.
        head_dim: d_k; by default d_model // num_heads.
        v_head_dim: d_v; by default d_model // num_heads.
        num_encoder_layers, num_decoder_layers: N of each stack.
        dropout: probability, on each sub-layer's output and on the sums of embeddings and positions.
        label_smoothing: eps of the loss the model is trained with.
        norm: "post", LayerNorm(x + Sublayer(x)), or "pre", x + Sublayer(LayerNorm(x)) and a LayerNorm after each stack.
        positions: "sinusoidal" (any length) or "learned" (at most `max_len`).
        max_len: rows of the table of positions.
        pad_id: id of padding, whose embedding is and stays zero.
        bos_id: first decoder input.
        eos_id: id that ends every target sentence.
        num_target_spaces: rows of the table of target languages; 0 for none.
        layer_norm_eps: epsilon of every LayerNorm.

    Raises:
        ValueError: a value outside its range.

    Source: sections 3.1 to 3.5, 5.4 and Table 3.
    """

    vocab_size: int = 37_000
    d_model: int = 512
    d_ff: int = 2048
    num_heads: int = 8
    head_dim: int | None = None
    v_head_dim: int | None = None
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout: float = 0.1
    label_smoothing: float = 0.1
    norm: str = "post"
    positions: str = "sinusoidal"
    max_len: int = 1024
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 1
    num_target_spaces: int = 32
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "d_model", "d_ff", "num_heads", "head_dim", "v_head_dim"]
        sizes += ["num_encoder_layers", "num_decoder_layers", "max_len"]
        ids, probabilities = ("pad_id", "bos_id", "eos_id"), ("dropout", "label_smoothing")
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            **dict.fromkeys(sizes, (lambda size: size is None or size >= 1, "must be at least 1")),
            **dict.fromkeys(ids, (lambda id: 0 <= id < self.vocab_size, f"must lie in [0, {self.vocab_size})")),
            **dict.fromkeys(probabilities, (lambda p: 0.0 <= p < 1.0, "must be in [0, 1)")),
            "norm": (lambda norm: norm in ("post", "pre"), "must be 'post' or 'pre'"),
            "positions": (lambda kind: kind in ("sinusoidal", "learned"), "must be 'sinusoidal' or 'learned'"),
            "num_target_spaces": (lambda rows: rows >= 0, "must not be negative"),
        }
        for name, (holds, rule) in rules.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name}: {rule}, got {value!r}")
        if self.pad_id in (self.bos_id, self.eos_id):
            raise ValueError(f"pad_id: must be neither bos_id nor eos_id, got {self.pad_id}")
        if None in (self.head_dim, self.v_head_dim) and self.d_model % self.num_heads:
            raise ValueError(f"d_model: must be a multiple of num_heads {self.num_heads}, got {self.d_model}")

    @classmethod
    def base(cls, vocab_size: int = 37_000) -> TransformerConfig:
        """The paper's base model."""
        return cls(vocab_size=vocab_size)

    @classmethod
    def big(cls, vocab_size: int = 37_000, dropout: float = 0.3) -> TransformerConfig:
        """The paper's big model; `dropout` is 0.1 for English to French."""
        return cls(vocab_size=vocab_size, d_model=1024, d_ff=4096, num_heads=16, dropout=dropout)

    @classmethod
    def table3(cls, vocab_size: int = 37_000) -> dict[str, TransformerConfig]:
        """Every row of the paper's Table 3 by name: "base", "A h=1", ..., "E learned", "big"."""
        base = cls.base(vocab_size)
        rows = {name: replace(base, **changes) for name, changes in _TABLE_3_CHANGES.items()}
        return {"base": base, **rows, "big": cls.big(vocab_size)}


_TABLE_3_CHANGES: dict[str, dict[str, Any]] = {
    "A h=1": {"num_heads": 1},
    "A h=4": {"num_heads": 4},
    "A h=16": {"num_heads": 16},
    "A h=32": {"num_heads": 32},
    "B dk=16": {"head_dim": 16},
    "B dk=32": {"head_dim": 32},
    "C N=2": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "C N=4": {"num_encoder_layers": 4, "num_decoder_layers": 4},
    "C N=8": {"num_encoder_layers": 8, "num_decoder_layers": 8},
    "C d=256": {"d_model": 256},
    "C d=1024": {"d_model": 1024},
    "C dff=1024": {"d_ff": 1024},
    "C dff=4096": {"d_ff": 4096},
    "D dropout=0.0": {"dropout": 0.0},
    "D dropout=0.2": {"dropout": 0.2},
    "D smoothing=0.0": {"label_smoothing": 0.0},
    "D smoothing=0.2": {"label_smoothing": 0.2},
    "E learned": {"positions": "learned"},
}
