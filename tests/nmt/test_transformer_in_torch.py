"""The Transformer with what torch does to a module: autocast, dtypes, checkpointing, compilation, files, optimisers."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from fastattn.nmt.config import TransformerConfig
from fastattn.nmt.layout import pack
from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.schedule import noam_schedule
from fastattn.nmt.transformer import Transformer
from tests.support.tiny_transformer import TINY, VARIANTS, loss_and_gradients, scrambled, sentences


def test_autocast():
    model = Transformer(TINY)
    source, target = sentences([4, 2]), sentences([3, 5], seed=1)
    exact, exact_gradients = loss_and_gradients(model, source, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden(source, target)
        sums = label_smoothed_cross_entropy(hidden, model.output_weight(), target)
    model.zero_grad()
    sums.loss.backward()
    torch.testing.assert_close(sums.loss, exact.loss, rtol=0.02, atol=0)
    gradient = model.encoder[0].feed_forward[0].weight.grad
    expected = exact_gradients["encoder.0.feed_forward.0.weight"]
    assert (gradient - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("execution", [lambda ids: ids, pack], ids=["padded", "packed"])
def test_bfloat16_model(execution):
    model = Transformer(TINY)
    source, target = execution(sentences([4, 2])), execution(sentences([3, 5], seed=1))
    expected = model(source, target)
    actual = model.bfloat16()(source, target)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("execution", [lambda ids: ids, pack], ids=["padded", "packed"])
def test_checkpointed_activations_are_computed_again_with_the_same_gradients(execution):
    model = Transformer(replace(TINY, dropout=0.3))
    source, target = execution(sentences([4, 2])), execution(sentences([3, 5], seed=1))
    kept, results = [0, 0], []
    for is_checkpointed in (False, True):
        model.checkpoint_activations = is_checkpointed

        def count(x, index=int(is_checkpointed)):
            kept[index] += x.numel()
            return x

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            sums, gradients = loss_and_gradients(model, source, target)
        results.append((sums.loss, gradients))
    torch.testing.assert_close(results[0], results[1])
    assert kept[1] < kept[0] / 2


@pytest.mark.long
def test_compiles_to_one_graph():
    model = Transformer(TINY)
    source, target = sentences([4, 2]), sentences([3, 5], seed=1)
    expected = model(source, target)
    gradient = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()), gradient)
    actual = torch.compile(model, backend="aot_eager", fullgraph=True)(source, target)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, list(model.parameters()), gradient), expected_gradients)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_copies_and_files(config, tmp_path):
    model = scrambled(config).float().eval()
    source, target = sentences([4, 2]), sentences([3, 5], seed=1)
    expected = model(source, target)
    assert torch.equal(copy.deepcopy(model)(source, target), expected)
    model.save(tmp_path / "model.pt")
    loaded = Transformer.load(tmp_path / "model.pt")
    assert loaded.config == config
    assert torch.equal(loaded.eval()(source, target), expected)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["config"] == asdict(config)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(source, target), expected)


@pytest.mark.long
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_learns_to_copy(norm):
    config = TransformerConfig(
        vocab_size=12, d_model=32, d_ff=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, norm=norm
    )
    model = Transformer(replace(config, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    scheduler = noam_schedule(optimizer, d_model=32, warmup_steps=60)
    batch = pack(F.pad(torch.randint(2, 12, (40, 6)), (0, 1), value=1))
    for _ in range(120):
        sums, _ = loss_and_gradients(model, batch, batch)
        optimizer.step()
        scheduler.step()
    assert sums.nll / sums.num_tokens < -math.log(1 - config.label_smoothing) + 0.02  # the least a smoothed model has
    assert model(batch, batch).argmax(-1).eq(batch.tokens).float().mean() > 0.99
