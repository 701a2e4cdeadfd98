"""The paper's Transformer: an independent computation of it, and padded against packed execution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastattn import functional
from fastattn.nmt.layout import PackedTokens, pack
from fastattn.nmt.transformer import Transformer, sinusoidal_positions
from tests.support.tiny_transformer import TINY, VARIANTS, loss_and_gradients, scrambled, sentences


def plain_transformer(model, source, target):
    """The paper's equations for one unpadded sentence pair, in plain torch."""
    config, p = model.config, dict(model.named_parameters())
    dk = config.head_dim or config.d_model // config.num_heads

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def attend(x, y, name, causal=False):
        rows = config.num_heads * dk
        sizes = [rows, rows, p[name + ".in_proj_weight"].shape[0] - 2 * rows]
        weights, biases = p[name + ".in_proj_weight"].split(sizes), p[name + ".in_proj_bias"].split(sizes)
        q, k, v = (z @ w.T + b for z, w, b in zip((x, y, y), weights, biases, strict=True))
        heads = []
        for qh, kh, vh in zip(*(z.chunk(config.num_heads, -1) for z in (q, k, v)), strict=True):
            scores = qh @ kh.T / math.sqrt(dk)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ vh)
        return torch.cat(heads, -1) @ p[name + ".out_proj.weight"].T + p[name + ".out_proj.bias"]

    def feed_forward(x, name):
        inner = (x @ p[name + ".0.weight"].T + p[name + ".0.bias"]).clamp(min=0)
        return inner @ p[name + ".2.weight"].T + p[name + ".2.bias"]

    def residual(x, name, sublayer):
        if config.norm == "pre":
            return x + sublayer(norm(x, name + ".norm"))
        return norm(x + sublayer(x), name + ".norm")

    def embed(ids):
        table = p.get("positions.table", sinusoidal_positions(len(ids), config.d_model).to(model.embedding.weight))
        return p["embedding.weight"][ids] * math.sqrt(config.d_model) + table[: len(ids)]

    x = embed(source)
    if config.num_target_spaces:
        x = x + p["target_spaces.weight"][0]
    for i in range(config.num_encoder_layers):
        name = f"encoder.{i}"
        x = residual(x, name + ".residuals.0", lambda y, name=name: attend(y, y, name + ".self_attention"))
        x = residual(x, name + ".residuals.1", lambda y, name=name: feed_forward(y, name + ".feed_forward"))
    memory = norm(x, "encoder_norm") if config.norm == "pre" else x
    x = embed([config.bos_id, *target[:-1]])
    for i in range(config.num_decoder_layers):
        name = f"decoder.{i}"
        x = residual(x, name + ".residuals.0", lambda y, name=name: attend(y, y, name + ".self_attention", causal=True))
        x = residual(x, name + ".residuals.1", lambda y, name=name: attend(y, memory, name + ".cross_attention"))
        x = residual(x, name + ".residuals.2", lambda y, name=name: feed_forward(y, name + ".feed_forward"))
    x = norm(x, "decoder_norm") if config.norm == "pre" else x
    return x @ p["embedding.weight"].T


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_the_papers_equations(config):
    model = scrambled(config)
    lengths = [5, 2, 7], [6, 3, 1]
    source, target = sentences(lengths[0]), sentences(lengths[1], seed=1)
    logits = model(source, target)
    for i, (n, m) in enumerate(zip(*lengths, strict=True)):
        expected = plain_transformer(model, source[i, :n].tolist(), target[i, :m].tolist())
        torch.testing.assert_close(logits[i, :m], expected, rtol=1e-10, atol=1e-10)


def test_logits_depend_on_earlier_target_ids_only():
    model = Transformer(TINY)
    source, target = sentences([4]), sentences([8], seed=1)
    logits = model(source, target)
    for position in range(8):
        changed = target.clone()
        changed[0, position] = target[0, position] % 12 + 1
        difference = (model(source, changed) - logits).abs().amax(-1)[0]
        assert difference[: position + 1].eq(0).all()
        assert difference[position + 1 :].gt(1e-4).all()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_depend_on_every_source_id_and_not_on_padding(config):
    model = scrambled(config)
    source, target = sentences([4, 6]), sentences([5, 3], seed=1)
    logits = model(source, target)
    wider = model(F.pad(source, (0, 3)), F.pad(target, (0, 2)))
    real = target != 0
    torch.testing.assert_close(wider[:, :5][real], logits[real], rtol=1e-10, atol=1e-10)
    for position in range(4):
        changed = source.clone()
        changed[0, position] = source[0, position] % 12 + 1
        difference = (model(changed, target) - logits).abs().amax(-1)
        assert difference[0].gt(1e-6).all()
        assert difference[1].eq(0).all()


@settings(max_examples=25, deadline=None)
@given(
    variant=st.sampled_from(list(VARIANTS.values())),
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_packed_execution_equals_padded(variant, lengths, seed):
    torch.manual_seed(seed)
    model = scrambled(variant)
    source, target = sentences([n for n, _ in lengths], seed=seed), sentences([m for _, m in lengths], seed=seed + 1)
    packed_source, packed_target = pack(source), pack(target)
    torch.testing.assert_close(
        model(packed_source, packed_target), model(source, target)[target != 0], rtol=1e-9, atol=1e-9
    )
    padded, padded_gradients = loss_and_gradients(model, source, target)
    packed, packed_gradients = loss_and_gradients(model, packed_source, packed_target)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed_gradients, padded_gradients, rtol=1e-9, atol=1e-9)


@given(lengths=st.lists(st.integers(0, 6), max_size=5))
def test_pack(lengths):
    ids = sentences(lengths)
    packed = pack(ids).to("cpu")
    assert packed.tokens.tolist() == [token for row in ids.tolist() for token in row if token]
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == max(lengths, default=0)


def test_one_matrix_embeds_and_predicts():
    model = Transformer(TINY)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes.count((13, 12)) == 1
    source, target = torch.tensor([[7, 8]]), torch.tensor([[9, 1]])
    logits = model(source, target)
    gradient = torch.randn_like(logits)
    logits.backward(gradient)
    hidden = model.hidden(source, target).detach()
    of_output = (gradient[0].T @ hidden[0]).index_fill(0, torch.tensor(0), 0.0)
    looked_up = (model.embedding.weight.grad - of_output).abs().amax(-1) > 1e-6
    assert looked_up.nonzero().flatten().tolist() == [1, 7, 8, 9]  # the ids of source and shifted target


@pytest.mark.parametrize("execution", [lambda ids: ids, pack], ids=["padded", "packed"])
def test_padding_row_stays_zero(execution):
    model = Transformer(TINY)
    source, target = execution(sentences([4, 2])), execution(sentences([3, 5], seed=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_and_gradients(model, source, target)
        model(source, target).square().sum().backward()
        assert model.embedding.weight.grad[0].eq(0).all()
        assert model.embedding.weight.grad[2].ne(0).any()
        optimizer.step()
    assert model.embedding.weight[0].eq(0).all()


def test_dropout_is_in_the_papers_two_places(monkeypatch):
    model = Transformer(replace(TINY, dropout=0.25))
    dropped = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: dropped.append((p, training)) or x)
    model(sentences([3]), sentences([4]))
    assert dropped == [(0.25, True)] * (2 + 2 * 2 + 2 * 3)
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attention) == 6
    assert {module.dropout for module in attention} == {0.0}


def test_dropout_follows_the_mode():
    model = Transformer(replace(TINY, dropout=0.25))
    source, target = sentences([3]), sentences([4])
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


def test_training_computes_no_attention_weights(monkeypatch):
    monkeypatch.delattr(functional, "weights_of")
    assert Transformer(TINY)(sentences([3]), sentences([4])).shape == (1, 4, 13)


def test_target_space_is_added_to_the_encoder_input():
    model = Transformer(TINY)
    source = sentences([4, 2])
    first, second = model.encode(source), model.encode(source, target_space=31)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model.encode(pack(source), 31), second[source != 0])
    with torch.no_grad():
        model.target_spaces.weight[31] = model.target_spaces.weight[0]
    assert torch.equal(model.encode(source, target_space=31), first)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.tensor([[13]]), torch.tensor([[1]]), r"source: ids 13 ... 13 must lie in \[0, 13\)"),
        (torch.tensor([[1]]), torch.tensor([[-1, 2]]), r"target: ids -1 ... 2 must lie in \[0, 13\)"),
        (torch.tensor([1]), torch.tensor([[1]]), r"source: must be \(batch, length\) int64, got shape \(1,\)"),
        (torch.tensor([[1.0]]), torch.tensor([[1]]), r"source: must be .* dtype torch.float32"),
        (
            torch.tensor([[1]]),
            torch.tensor([[1], [1]]),
            "target: must be 1 padded sentences as source is, got 2 padded",
        ),
        (
            torch.tensor([[1]]),
            pack(torch.tensor([[1]])),
            "target: must be 1 padded sentences as source is, got 1 packed",
        ),
        (
            PackedTokens(torch.tensor([[1]]), torch.tensor([0, 1], dtype=torch.int32), 1),
            torch.tensor([[1]]),
            r"source: must be \(total,\) int64, got shape \(1, 1\)",
        ),
    ],
)
def test_input_errors(source, target, message):
    with pytest.raises(ValueError, match=message):
        Transformer(TINY)(source, target)


def test_target_space_errors():
    with pytest.raises(ValueError, match=r"target_space: must lie in \[0, 32\), got 32"):
        Transformer(TINY).encode(sentences([3]), target_space=32)
    with pytest.raises(ValueError, match=r"target_space: must lie in \[0, 1\), got 1"):
        Transformer(replace(TINY, num_target_spaces=0)).encode(sentences([3]), target_space=1)


def test_empty_batches():
    model = Transformer(TINY)
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert model(none, none).shape == (0, 3, 13)
    assert model(sentences([2]), torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 13)
    assert model(torch.zeros(1, 0, dtype=torch.int64), sentences([2])).isfinite().all()
