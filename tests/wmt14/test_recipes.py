"""The recipes: those of the paper say what it says, those of the small models what they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.wmt14.configs import CONFIGS
from fastattn import Transformer, TransformerConfig


def test_recipes_of_the_paper():
    base, big = CONFIGS["base_en_de"], CONFIGS["big_en_de"]
    assert base.transformer == TransformerConfig.base() and big.transformer == TransformerConfig.big()
    assert (base.updates, big.updates, base.averaged, big.averaged) == (100_000, 300_000, 5, 20)
    assert f"{base.learning_rate(4000):.2e} {big.learning_rate(4000):.2e}" == "6.99e-04 4.94e-04"
    assert CONFIGS["big_en_fr"].transformer.dropout == 0.1 and CONFIGS["big_en_fr"].target == "fr"
    for row, model in TransformerConfig.table3().items():
        assert CONFIGS[f"table3 {row}"].transformer == model
        assert CONFIGS[f"table3 {row}"].averaged == 1
    for config in CONFIGS.values():
        assert config.averaged <= config.keep_last
        assert (config.betas, config.eps) == ((0.9, 0.98), 1e-9)


def test_recipes_of_the_small_models():
    tiny = CONFIGS["multi30k_tiny"]
    assert (
        max(map(tiny.learning_rate, range(1, 8001))) == pytest.approx(tiny.learning_rate(2000)) == pytest.approx(5e-3)
    )
    fast = CONFIGS["multi30k_fast"]
    assert fast.learning_rate(fast.warmup) == fast.peak and 0 < fast.learning_rate(fast.updates) < 1e-5
    for name, least, most in (
        ("multi30k_fast", 1.4e6, 1.5e6),
        ("multi30k_tiny", 2.4e6, 2.8e6),
        ("small_en_de", 9e6, 15e6),
    ):
        config = CONFIGS[name]
        assert least < sum(p.numel() for p in Transformer(config.transformer).parameters()) < most
        model = config.model(1234)
        assert model == replace(config.transformer, vocab_size=1234) and model.bos_id == model.eos_id == 1
