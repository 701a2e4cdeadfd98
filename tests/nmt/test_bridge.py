"""The Transformer beside torch.nn.Transformer: the same weights, outputs, gradients and 200 updates of training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from fastattn import Transformer, TransformerConfig
from fastattn.nmt.layout import pack
from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.schedule import noam_learning_rate
from fastattn.nmt.transformer import sinusoidal_positions

CONFIG = TransformerConfig(
    vocab_size=40, d_model=32, d_ff=64, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, dropout=0.0,
    num_target_spaces=0, max_len=64,
)  # fmt: skip
ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


class TorchTransformer(nn.Module):
    """torch.nn.Transformer between the paper's embeddings and its output."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        self.stacks = nn.Transformer(
            config.d_model, config.num_heads, config.num_encoder_layers, config.num_decoder_layers, config.d_ff,
            dropout=0.0, layer_norm_eps=config.layer_norm_eps, batch_first=True, norm_first=config.norm == "pre",
        )  # fmt: skip
        if config.norm == "post":  # torch ends its stacks by a norm of their own; the paper has none there
            self.stacks.encoder.norm = self.stacks.decoder.norm = None

    def embed(self, ids):
        positions = sinusoidal_positions(ids.shape[1], self.config.d_model).to(self.embedding.weight)
        return self.embedding(ids) * math.sqrt(self.config.d_model) + positions

    def forward(self, source, target):
        decoder_input = F.pad(target, (1, 0), value=self.config.bos_id)[:, :-1]
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.embedding.weight.dtype)
        padding = source == self.config.pad_id
        states = self.stacks(
            self.embed(source), self.embed(decoder_input), tgt_mask=later, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return states @ self.embedding.weight.T


def names(config):
    """The names of torch's parameters by the names of fastattn's."""
    pairs = {"embedding.weight": "embedding.weight"}
    stacks = {
        "encoder": (config.num_encoder_layers, {"self_attention": "self_attn"}),
        "decoder": (config.num_decoder_layers, {"self_attention": "self_attn", "cross_attention": "multihead_attn"}),
    }
    for stack, (layers, attentions) in stacks.items():
        for i in range(layers):
            ours, theirs = f"{stack}.{i}", f"stacks.{stack}.layers.{i}"
            for name, other in attentions.items():
                pairs |= {f"{ours}.{name}.{part}": f"{theirs}.{other}.{part}" for part in ATTENTION}
            for part in ("weight", "bias"):
                pairs[f"{ours}.feed_forward.0.{part}"] = f"{theirs}.linear1.{part}"
                pairs[f"{ours}.feed_forward.2.{part}"] = f"{theirs}.linear2.{part}"
                for norm in range(len(attentions) + 1):
                    pairs[f"{ours}.residuals.{norm}.norm.{part}"] = f"{theirs}.norm{norm + 1}.{part}"
        if config.norm == "pre":
            pairs |= {f"{stack}_norm.{part}": f"stacks.{stack}.norm.{part}" for part in ("weight", "bias")}
    return pairs


def twins(norm):
    """Two models with the same weights."""
    torch.manual_seed(0)
    config = replace(CONFIG, norm=norm)
    ours, theirs = Transformer(config).double(), TorchTransformer(config).double()
    state = ours.state_dict()
    assert names(config).keys() == state.keys()
    theirs.load_state_dict({other: state[name] for name, other in names(config).items()})
    return ours, theirs


def sentence_pairs(seed, pairs=24):
    """Sentence pairs whose target is the source backwards, every id one higher."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (pairs,), generator=generator)
    words = torch.randint(2, 39, (pairs, 7), generator=generator)
    sources = [row[:length] for row, length in zip(words, lengths, strict=True)]
    targets = [source.flip(0) + 1 for source in sources]
    return [
        pad_sequence([F.pad(ids, (0, 1), value=1) for ids in side], batch_first=True) for side in (sources, targets)
    ]


def their_loss(model, source, target):
    """Label smoothing as the paper's: eps / (V - 1) on every id but the true one."""
    log_p = model(source, target).log_softmax(-1)
    eps, vocab = 0.1, log_p.shape[-1]
    true = log_p.gather(-1, target[..., None]).squeeze(-1)
    loss = -((1 - eps - eps / (vocab - 1)) * true + eps / (vocab - 1) * log_p.sum(-1))
    return loss[target != 0].mean()


def our_loss(model, source, target):
    packed = pack(source), pack(target)
    sums = label_smoothed_cross_entropy(model.hidden(*packed), model.output_weight(), packed[1].tokens, 0.1)
    return sums.loss / sums.num_tokens


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_outputs_and_gradients_are_those_of_torch(norm):
    ours, theirs = twins(norm)
    source, target = sentence_pairs(seed=1)
    real = target != 0
    torch.testing.assert_close(ours(source, target)[real], theirs(source, target)[real], rtol=1e-10, atol=1e-10)
    for loss, model in ((our_loss, ours), (their_loss, theirs)):
        loss(model, source, target).backward()
    gradients, expected = (dict(model.named_parameters()) for model in (ours, theirs))
    # torch's output matrix is its whole embedding, so that the row of padding gets a gradient there.
    expected["embedding.weight"].grad[0] = 0
    for name, other in names(ours.config).items():
        torch.testing.assert_close(gradients[name].grad, expected[other].grad, rtol=1e-8, atol=1e-10, msg=name)


def curve(model, loss_of, updates=200):
    """The loss before each of `updates` updates by the paper's recipe."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    losses = []
    for update in range(1, updates + 1):
        loss = loss_of(model, *sentence_pairs(seed=update))
        optimizer.zero_grad()
        loss.backward()
        model.embedding.weight.grad[0] = 0
        optimizer.param_groups[0]["lr"] = noam_learning_rate(update, 32, warmup_steps=100, factor=0.3)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.long
def test_200_updates_of_training_are_those_of_torch():
    ours, theirs = twins("post")
    actual, expected = curve(ours, our_loss), curve(theirs, their_loss)
    assert actual == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < 0.75 * expected[0]
