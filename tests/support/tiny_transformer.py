"""Transformers small enough for any test, with sentences for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastattn.nmt.config import TransformerConfig
from fastattn.nmt.layout import PackedTokens
from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.transformer import Transformer

TINY = TransformerConfig(
    vocab_size=13, d_model=12, d_ff=10, num_heads=3, num_encoder_layers=2, num_decoder_layers=2, dropout=0.0, max_len=32
)
VARIANTS = {
    "paper": TINY,
    "pre-norm": replace(TINY, norm="pre"),
    "learned": replace(TINY, positions="learned"),
    "row B": replace(TINY, head_dim=2, v_head_dim=5),
    "no target spaces": replace(TINY, num_target_spaces=0),
}


def sentences(lengths, vocab=13, seed=0):
    """Random ids (len(lengths), max(lengths)), padded with 0 on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths, default=0)), generator=generator)
    return ids.masked_fill(torch.arange(ids.shape[1]) >= torch.tensor(lengths).view(-1, 1), 0)


def scrambled(config):
    """A model in float64 whose biases and norms are not at their neutral initial values."""
    model = Transformer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.embedding.weight[config.pad_id] = 0
    return model


def loss_and_gradients(model, source, target):
    """The sums of the loss, and its gradient by parameter."""
    model.zero_grad()
    ids = target.tokens if isinstance(target, PackedTokens) else target
    sums = label_smoothed_cross_entropy(model.hidden(source, target), model.output_weight(), ids)
    sums.loss.backward()
    return sums, {name: parameter.grad for name, parameter in model.named_parameters()}
