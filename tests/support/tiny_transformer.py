"""A Transformer small enough for any test, and sentences for it."""

from __future__ import annotations

import torch

from fastattn.nmt.config import TransformerConfig

TINY = TransformerConfig(
    vocab_size=13, d_model=12, d_ff=10, num_heads=3, num_encoder_layers=2, num_decoder_layers=2, dropout=0.0, max_len=32
)


def sentences(lengths, vocab=13, seed=0):
    """Random ids `(len(lengths), max(lengths))`, padded with 0 on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths, default=0)), generator=generator)
    return ids.masked_fill(torch.arange(ids.shape[1]) >= torch.tensor(lengths).view(-1, 1), 0)
