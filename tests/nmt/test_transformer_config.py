"""The paper's Transformer before any training: configurations, parameter counts, initial values, positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastattn.nmt.config import TransformerConfig
from fastattn.nmt.transformer import Transformer, sinusoidal_positions
from tests.support.tiny_transformer import TINY, sentences

# ---- configuration ----

MILLIONS = {
    "base": 65.15,
    "B dk=16": 58.06,
    "B dk=32": 60.42,
    "C N=2": 35.72,
    "C N=4": 50.43,
    "C N=8": 79.86,
    "C d=256": 27.87,
    "C d=1024": 168.02,
    "C dff=1024": 52.55,
    "C dff=4096": 90.34,
}


def count_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


@pytest.mark.parametrize("row", MILLIONS)
def test_parameters_of_table_3(row):
    """MILLIONS is an exact count of the paper's model with 41,000 ids; the paper prints its integer part."""
    assert round(count_parameters(TransformerConfig.table3(41_000)[row]) / 1e6, 2) == MILLIONS[row]


def test_parameters_with_37000_ids():
    assert round(count_parameters(TransformerConfig.base()) / 1e6, 2) == 63.10
    assert round(count_parameters(TransformerConfig.big()) / 1e6, 1) == 214.3
    d, ff, v = 512, 2048, 37_000
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * ff + ff + d, 2 * d
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    assert count_parameters(TransformerConfig.base()) == v * d + 32 * d + layers


def test_rows_of_table_3():
    rows = TransformerConfig.table3()
    assert len(rows) == 20
    assert rows["base"] == TransformerConfig()
    heads = {
        row.num_heads * (row.head_dim or row.d_model // row.num_heads) for name, row in rows.items() if "A" in name
    }
    assert heads == {512}
    assert rows["C d=256"].d_model // rows["C d=256"].num_heads == 32
    assert rows["C d=1024"].d_model // rows["C d=1024"].num_heads == 128
    assert (rows["D dropout=0.2"].dropout, rows["D smoothing=0.2"].label_smoothing) == (0.2, 0.2)
    assert (rows["big"].dropout, rows["big"].d_ff, rows["big"].num_heads) == (0.3, 4096, 16)
    assert rows["E learned"].positions == "learned"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim: must be at least 1, got 0"),
        ({"num_heads": 7}, "d_model: must be a multiple of num_heads 7, got 12"),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing: must be in \[0, 1\), got -0.1"),
        ({"norm": "mid"}, "norm: must be 'post' or 'pre', got 'mid'"),
        ({"positions": "rotary"}, "positions: must be 'sinusoidal' or 'learned', got 'rotary'"),
        ({"eos_id": 13}, r"eos_id: must lie in \[0, 13\), got 13"),
        ({"pad_id": 1}, "pad_id: must be neither bos_id nor eos_id, got 1"),
        ({"num_target_spaces": -1}, "num_target_spaces: must not be negative, got -1"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_heads_that_do_not_divide_the_width():
    model = Transformer(replace(TINY, num_heads=5, head_dim=4, v_head_dim=3))
    assert model(sentences([3]), sentences([4])).shape == (1, 4, 13)


# ---- initial values ----


def test_initial_values():
    model = Transformer(TransformerConfig(vocab_size=3000, d_model=128, d_ff=256, num_heads=4, num_encoder_layers=1))
    std = model.embedding.weight[1:].std().item()
    assert std == pytest.approx(128**-0.5, rel=0.01)
    assert model.embedding.weight[0].eq(0).all()
    layer = model.decoder[0]
    glorot = {
        layer.self_attention.in_proj_weight: (128, 3 * 128),
        layer.cross_attention.in_proj_weight[:128]: (128, 128),
        layer.cross_attention.in_proj_weight[128:]: (128, 2 * 128),
        layer.self_attention.out_proj.weight: (128, 128),
        layer.feed_forward[0].weight: (128, 256),
        layer.feed_forward[2].weight: (256, 128),
        model.target_spaces.weight: (32, 128),
    }
    for weight, fans in glorot.items():
        bound = math.sqrt(6 / sum(fans))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        if "norm.weight" in name:
            assert parameter.eq(1).all(), name


def test_sinusoids():
    table = sinusoidal_positions(600, 12)
    for position, column in [(0, 0), (0, 1), (3, 0), (3, 1), (3, 6), (599, 11), (40, 4)]:
        angle = position / 10000 ** (2 * (column // 2) / 12)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[position, column].item() == pytest.approx(expected, abs=1e-6)


def test_sinusoids_have_no_last_position_and_learned_ones_do():
    source, target = sentences([3]), sentences([40])
    longer = Transformer(replace(TINY, max_len=64))
    model = Transformer(TINY)
    model.load_state_dict(longer.state_dict())
    torch.testing.assert_close(model(source, target), longer(source, target), rtol=0, atol=0)
    with pytest.raises(ValueError, match="learned positions end at max_len 32, got 40"):
        Transformer(replace(TINY, positions="learned"))(source, target)
