"""Estimates: parameters and activations are the real model's, FLOPs a hand count's, hours what was published."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.wmt14.configs import CONFIGS
from examples.wmt14.estimate import (
    GPUS,
    PAPER_FLOPS,
    PAPER_HOURS,
    SOURCE_LENGTH,
    TARGET_LENGTH,
    activation_bytes,
    count_parameters,
    estimate,
    print_estimate,
)
from fastattn import Transformer, TransformerConfig

BASE, BIG = CONFIGS["base_en_de"], CONFIGS["big_en_de"]


@pytest.mark.parametrize(
    ("row", "vocab_size", "millions"),
    [("base", 41_000, 65.15), ("base", 37_000, 63.10), ("big", 37_000, 214.3), ("B dk=16", 41_000, 58.06),
     ("C d=256", 41_000, 27.87), ("C N=8", 41_000, 79.86)],
)  # fmt: skip
def test_parameters_of_the_papers_rows(row, vocab_size, millions):
    assert count_parameters(TransformerConfig.table3(vocab_size)[row]) / 1e6 == pytest.approx(millions, abs=0.06)


def test_parameters_are_the_models():
    config = CONFIGS["multi30k_fast"].model(400)
    assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_flops_by_hand():
    made = replace(TransformerConfig(), d_model=4, d_ff=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
    config = replace(CONFIGS["smoke"], transformer=made, tokens_per_update=10 * TARGET_LENGTH)
    s, t = SOURCE_LENGTH, TARGET_LENGTH
    encoder = s * (4 * 4 * 4 + 2 * 4 * 8) + 2 * s * s * 4
    decoder = t * (4 * 4 * 4 + 2 * 4 * 4 + 2 * 4 * 8) + s * 2 * 4 * 4 + 2 * 4 * (t * (t + 1) // 2 + s * t)
    expected = 10 * 6 * (encoder + decoder + t * 4 * 100)
    assert estimate(config, "T4", 1, 1, "fp32", 100).flops_per_update == pytest.approx(expected)


def test_activations_are_what_autograd_keeps():
    # Without dropout, whose masks take a byte per element on a GPU, four on the CPU.
    made = dict(d_model=64, d_ff=256, num_heads=4, num_encoder_layers=3, num_decoder_layers=3, num_target_spaces=0)
    model = Transformer(TransformerConfig(vocab_size=50, dropout=0.0, **made))
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pairs = 40
    source, target = (torch.randint(2, 50, (pairs, n)) for n in (SOURCE_LENGTH, TARGET_LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(source, target)
    assert hidden.requires_grad
    predicted = pairs * TARGET_LENGTH * activation_bytes(model.config, "fp32")
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.1)


# What NVIDIA published of its training of the big model, target tokens per second and GPU.
PUBLISHED = [("V100", "fp32", 8_742), ("V100", "fp16", 32_942), ("A100", "bf16", 82_059)]


@pytest.mark.parametrize(("gpu", "precision", "tokens_per_second"), PUBLISHED)
def test_speed_is_as_published(gpu, precision, tokens_per_second):
    predicted = estimate(replace(BIG, tokens_per_update=5_120), gpu, 1, 1, precision, 33_708).tokens_per_second
    assert predicted == pytest.approx(tokens_per_second, rel=0.15)


@pytest.mark.parametrize("gpu", ["P100 PCIe", "P100 SXM2"])
def test_half_precision_saves_memory_and_not_time_on_a_p100(gpu):
    single, half = (estimate(BIG, gpu, 1, 1, precision) for precision in ("fp32", "fp16"))
    assert half.products == single.products and half.peak == single.peak
    assert half.memory / half.accumulation < single.memory / single.accumulation or half.accumulation == 1
    assert 1.0 <= half.tokens_per_second / single.tokens_per_second < 1.1


def test_the_papers_figures():
    nominal = {name: hours * 3600 * 8 * PAPER_FLOPS for name, hours in PAPER_HOURS.items()}
    assert nominal["base_en_de"] == pytest.approx(3.3e18, rel=0.01)
    assert nominal["big_en_de"] == pytest.approx(2.3e19, rel=0.01)
    own = {
        config.name: estimate(config, "T4", 1, 1, "fp32").flops_per_update * config.updates for config in (BASE, BIG)
    }
    assert own["base_en_de"] == pytest.approx(9.5e17, rel=0.05)
    assert own["big_en_de"] == pytest.approx(9.7e18, rel=0.05)


def test_more_gpus_take_less_and_hide_less():
    hours = [estimate(BASE, "P100 SXM2", n, 1, "fp32").hours for n in (1, 2, 4, 8)]
    assert hours == sorted(hours, reverse=True)
    assert hours[0] / 8 < hours[3] < hours[0] / 6
    one, two = (estimate(BIG, "V100", 8, machines, "fp16") for machines in (1, 2))
    assert one.exposed < two.exposed < two.all_reduce
    assert estimate(BIG, "V100", 1, 1, "fp16").exposed == 0.0


def test_ring_all_reduce_by_hand():
    run = estimate(BASE, "A100", 4, 2, "bf16")
    assert run.all_reduce == pytest.approx(2 * 3 / 4 * 4 * run.parameters / (0.8 * 12.5e9))
    # Within a machine the backward pass hides all but the embedding's, which is the last to be complete.
    run = estimate(BASE, "A100", 8, 1, "fp32", 37_000)
    assert run.exposed == pytest.approx(2 * 7 / 8 * 4 * 37_000 * 512 / (0.8 * 300e9))


def test_accumulation_where_memory_is_short():
    small, large = (estimate(BIG, gpu, 1, 1, "fp32") for gpu in ("P100 SXM2", "H200"))
    assert (small.accumulation, large.accumulation) == (2, 1)
    assert small.memory < 16e9 < large.memory
    huge = replace(BIG, transformer=replace(BIG.transformer, num_encoder_layers=60, num_decoder_layers=60))
    with pytest.raises(ValueError, match="gpu: T4 has not the memory"):
        estimate(huge, "T4", 1, 1, "fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("GTX", 1, 1, "fp32"), "gpu: must be one of P100 PCIe, .* got 'GTX'"),
        (("T4", 1, 1, "tf32"), "precision: must be 'fp32', 'fp16' or 'bf16', got 'tf32'"),
        (("T4", 3, 2, "fp32"), "n_gpus: must be a positive multiple of machines 2, got 3"),
        (("T4", 0, 1, "fp32"), "n_gpus: .* got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(BASE, *arguments)


@pytest.mark.parametrize("name", ["base_en_de", "big_en_fr", "multi30k_fast"])
def test_table(name, capsys):
    print_estimate(CONFIGS[name], 37_000)
    printed = capsys.readouterr().out
    assert (
        all(gpu in printed for gpu in GPUS)
        and "PREDICTED" in printed
        and "Nothing in this table was measured" in printed
    )
    assert ("The paper: " in printed) == (name in PAPER_HOURS)
