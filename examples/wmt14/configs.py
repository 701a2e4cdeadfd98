"""Every model that can be trained, with its recipe: the rows of the paper's Tables 2 and 3, and small ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastattn import TransformerConfig
from fastattn.nmt.schedule import linear_learning_rate, noam_learning_rate


@dataclass(frozen=True)
class Config:
    """One model with its training, averaging and search; the defaults are those of the paper's base model.

    Args:
        name: key in CONFIGS.
        preparation: name of the data's preparation.
        source, target: languages.
        transformer: the model, whose vocabulary the data decides.
        betas, eps: of Adam.
        schedule: "noam", the paper's learning rate, or "linear", to `peak` and down to 0 at the last update.
        warmup: updates until the learning rate peaks.
        factor: of the paper's learning rate.
        peak: greatest learning rate of "linear".
        tokens_per_update: most ids of a side, over all processes and accumulation steps.
        updates: optimiser steps.
        precision: "fp32", "fp16" (with a scaled loss) or "bf16": the dtype of matrix products and attention.
        save_every: updates between two checkpoints; None for the length of an epoch.
        validate_every: updates between two validations; None for the length of an epoch.
        keep_last: checkpoints kept.
        averaged: how many of the last checkpoints are averaged for the test set.
        patience: validations without a lower nll after which training stops; None for never.
        beam_size, alpha: of the search.
        length_penalty: "paper", ((5 + length) / 6)^alpha, or "length", length^alpha.
    """

    name: str
    preparation: str
    transformer: TransformerConfig
    source: str = "en"
    target: str = "de"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    schedule: str = "noam"
    warmup: int = 4000
    factor: float = 1.0
    peak: float | None = None
    tokens_per_update: int = 25_000
    updates: int = 100_000
    precision: str = "fp32"
    save_every: int | None = 1_400  # in the paper's time, ten minutes
    validate_every: int | None = 1_400
    keep_last: int = 5
    averaged: int = 5
    patience: int | None = None
    beam_size: int = 4
    alpha: float = 0.6
    length_penalty: str = "paper"

    def model(self, vocab_size: int) -> TransformerConfig:
        """The model's configuration for a vocabulary: id 0 is padding, id 1 ends, and begins, a sentence."""
        return replace(self.transformer, vocab_size=vocab_size, pad_id=0, bos_id=1, eos_id=1)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update, counted from 1."""
        if self.schedule == "linear":
            assert self.peak is not None  # every linear recipe has one
            return linear_learning_rate(update, self.peak, self.warmup, self.updates)
        return noam_learning_rate(update, self.transformer.d_model, self.warmup, self.factor)


def _paper_configs() -> list[Config]:
    base = Config("base_en_de", "wmt14_en_de", TransformerConfig.base())
    big = replace(
        base,
        name="big_en_de",
        transformer=TransformerConfig.big(),
        updates=300_000,
        save_every=600,
        validate_every=3_000,
        keep_last=20,
        averaged=20,
    )
    french_base, french_big = TransformerConfig.base(32_000), TransformerConfig.big(32_000, dropout=0.1)
    configs = [
        base,
        big,
        replace(base, name="base_en_fr", preparation="wmt14_en_fr", target="fr", transformer=french_base),
        replace(big, name="big_en_fr", preparation="wmt14_en_fr", target="fr", transformer=french_big),
    ]
    for row, transformer in TransformerConfig.table3().items():
        recipe = big if row == "big" else base
        configs.append(replace(recipe, name=f"table3 {row}", transformer=transformer, averaged=1))
    return configs


def _small_configs() -> list[Config]:
    transformer = TransformerConfig(
        vocab_size=4_000,
        d_model=128,
        d_ff=512,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_target_spaces=0,
    )
    fast = Config(
        "multi30k_fast",
        "multi30k_fast",
        replace(transformer, norm="pre"),
        schedule="linear",
        peak=2.5e-3,
        warmup=300,
        tokens_per_update=2_500,
        updates=2_500,
        precision="bf16",
        save_every=200,
        validate_every=400,
    )
    tiny = Config(
        "multi30k_tiny",
        "multi30k_tiny",
        replace(transformer, vocab_size=10_000, d_ff=256, num_encoder_layers=4, num_decoder_layers=4, dropout=0.3),
        warmup=2_000,
        factor=5e-3 * (128 * 2_000) ** 0.5,  # peaks at 5e-3
        tokens_per_update=2 * 4_096,
        updates=8_000,
        save_every=None,
        validate_every=None,
        keep_last=10,
        averaged=10,
        patience=10,
        beam_size=5,
        alpha=1.0,
        length_penalty="length",
    )
    small = Config(
        "small_en_de",
        "small_en_de",
        replace(
            transformer,
            vocab_size=10_000,
            d_model=256,
            d_ff=1_024,
            num_encoder_layers=4,
            num_decoder_layers=4,
            norm="pre",
        ),
        schedule="linear",
        peak=1.5e-3,
        warmup=1_000,
        updates=12_000,
        save_every=500,
        validate_every=500,
    )
    smoke = Config(
        "smoke",
        "smoke",
        replace(transformer, vocab_size=300, d_model=32, d_ff=64, num_encoder_layers=1, num_decoder_layers=1),
        schedule="linear",
        peak=5e-3,
        warmup=4,
        tokens_per_update=600,
        updates=60,
        save_every=10,
        validate_every=30,
        averaged=3,
    )
    return [fast, tiny, small, smoke]


CONFIGS: dict[str, Config] = {config.name: config for config in [*_paper_configs(), *_small_configs()]}
