"""Models small enough for exhaustive search, with sentences to translate."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from fastattn.nmt.config import TransformerConfig
from fastattn.nmt.transformer import Transformer

EOS, PAD = 1, 0
TINY = TransformerConfig(vocab_size=5, d_model=8, d_ff=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=2)


def random_model(seed=0, **changes):
    """A model whose choices are neither uniform nor certain, in float64, in evaluation mode."""
    torch.manual_seed(seed)
    model = Transformer(replace(TINY, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
        model.embedding.weight *= 2
        model.embedding.weight[PAD] = 0
    return model


def constant_model(*probabilities, **changes):
    """A model that gives ids 1 ... 4 these probabilities, whatever came before."""
    model = random_model(**changes)
    norm = model.decoder[-1].residuals[-1].norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(F.one_hot(torch.tensor(0), 8))
        model.embedding.weight[1:, 0] = 50 + torch.tensor(probabilities).double().log()  # the logit of padding is 0
    return model


def sentences(*lengths, vocab=5, seed=0):
    """Random ids (len(lengths), max(lengths)) from 2 on, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab, (len(lengths), max(lengths)), generator=generator)
    return ids.masked_fill(torch.arange(ids.shape[1]) >= torch.tensor(lengths).view(-1, 1), PAD)
