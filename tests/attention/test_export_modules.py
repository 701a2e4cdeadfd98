"""Modules exported with lengths of queries and keys that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import fastattn
from fastattn.nmt.config import TransformerConfig

pytestmark = pytest.mark.long

BATCH, SEQLEN_Q, SEQLEN_K = Dim("batch", min=1, max=64), Dim("seqlen_q", min=2, max=64), Dim("seqlen_k", min=2, max=64)
DYNAMIC = {0: BATCH, 1: SEQLEN_Q}, {0: BATCH, 1: SEQLEN_K}
SIZES = ((2, 5, 5), (3, 4, 9), (1, 9, 4))


class Cross(nn.Module):
    """Attention from one tensor to another, whose last key is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = fastattn.MultiHeadAttention(16, 2, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        padding = torch.zeros(memory.shape[:2], dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
        return self.attention(query, memory, memory, key_padding_mask=padding, need_weights=False)[0]


class Swapped(nn.Module):
    """torch's Transformer with fastattn's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = fastattn.replace_attention(nn.Transformer(16, 2, 1, 1, 32, batch_first=True))

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        mask = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


def paper() -> nn.Module:
    sizes = {"vocab_size": 20, "d_model": 16, "d_ff": 32, "num_heads": 2, "max_len": 64}
    return fastattn.Transformer(TransformerConfig(**sizes, num_encoder_layers=1, num_decoder_layers=1))


def features(batch: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, seqlen_q, 16), torch.randn(batch, seqlen_k, 16)


def ids(batch: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(2, 20, (batch, seqlen_q)), torch.randint(2, 20, (batch, seqlen_k))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "MultiHeadAttention": (Cross, features),
    "nn.Transformer": (Swapped, features),
    "fastattn.Transformer": (paper, ids),
}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_any_two_lengths(name: str, strict: bool) -> None:
    make, inputs = MODELS[name]
    model = make().eval()
    program = export(model, inputs(2, 5, 5), dynamic_shapes=DYNAMIC, strict=strict).module()
    for sizes in SIZES:
        given = inputs(*sizes)
        torch.testing.assert_close(program(*given), model(*given))
