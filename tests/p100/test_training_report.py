"""The arithmetic of a predicted training step on a P100, and the committed page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.wmt14 import estimate
from examples.wmt14.throughput import training_flops
from fastattn import TransformerConfig
from fastattn.cuda_kernels import images

pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built", exc_type=ImportError)

from benchmarks.lengths import Lengths
from benchmarks.p100 import chip, page, tracing, training_report, training_step
from benchmarks.p100.calibration import expected
from benchmarks.p100.passes import Pass
from benchmarks.p100.prediction import Prediction
from benchmarks.p100.training_step import StepAssumptions, Work

PAGE = Path(__file__).parents[2] / "docs" / "p100_training.md"
BASE = TransformerConfig.base()
TINY = TransformerConfig(100, 4, 8, 2, num_encoder_layers=1, num_decoder_layers=2, num_target_spaces=0)
CARD = chip.Card("card", 1e9, 100.0, dram_share=0.5)  # 50 bytes per second


# ---- arithmetic


@pytest.mark.parametrize("model", [BASE, TransformerConfig.big(), TINY, TransformerConfig.table3()["B dk=16"]])
def test_products_are_all_but_attentions(model):
    n, pairs = 30, 10
    scores = model.num_encoder_layers * n * n + model.num_decoder_layers * (n * (n + 1) / 2 + n * n)
    width = model.num_heads * sum(dim or model.d_model // model.num_heads for dim in (model.head_dim, model.v_head_dim))
    everything = training_flops(model, np.full(pairs, n), np.full(pairs, n))
    assert Work(model, pairs * n).flops == pytest.approx(everything - 6 * pairs * scores * width)


def test_logits_come_in_chunks():
    (logits,) = (product for product in training_step.products(BASE, 3125) if product.part == "products: logits")
    assert logits[1:] == (2**25 // 37_000, 512, 37_000, 3 * 3125 / (2**25 // 37_000))
    (few,) = (product for product in training_step.products(BASE, 100) if product.part == "products: logits")
    assert (few.tokens, few.times) == (100, 3)


def test_traffic_by_hand():
    floats = {name: n / 4 for name, n in training_step.traffic(TINY, 10).items()}
    assert floats == {
        "LayerNorm": (2 + 3 + 3) * 7 * 4 * 10,
        "dropout": 8 * 4.5 * 4 * 10,
        "residual sums": 8 * 6 * 4 * 10 + 3 * 4 * 10,
        "ReLU": 3 * 5 * 8 * 10,
        "gradients of biases": (12 + 4 + 8 + 4 + 2 * (12 + 4 + 4 + 8 + 4 + 8 + 4)) * 10,
        "joining gradients of q, k, v": 2 * (12 + 2 * (12 + 8)) * 10,
        "embeddings": 2 * 16.5 * 4 * 10,
        "loss": 14 * 100 * 10,
        "shared matrix": 15 * 100 * 4,
    }
    spaces = training_step.traffic(replace(TINY, num_target_spaces=3), 10)["embeddings"]
    assert spaces / 4 - floats["embeddings"] == 3 * 4 * 10


def test_rates_of_products():
    usual = StepAssumptions()
    assert usual.product_flops(2 * 3072 * 7435 * 1024) == pytest.approx(8.60e12)
    between = math.sqrt(math.prod((1024, 700, 512)) * math.prod((4096, 128, 4096)))
    assert usual.product_flops(2 * between) == pytest.approx((5.21e12 + 7.00e12) / 2)
    assert (usual.product_flops(1.0), usual.product_flops(1e15)) == pytest.approx((5.21e12, 9.00e12))
    assert StepAssumptions(product_rate=0.5).product_flops(1e15) == pytest.approx(4.50e12)
    of_two_sizes = 2 * 1024 * 24_000 * 2048  # and of 512 outputs and twice as many columns
    assert usual.product_flops(of_two_sizes) == pytest.approx((8.92 + 8.59 + 8.98 + 8.60) / 4 * 1e12)
    assert StepAssumptions(cublas="squares").product_flops(2 * 4096**3) == pytest.approx(7.61e12)


def test_parts_of_an_update():
    once, twice = (Work(TINY, 20, steps).parts(0.25, CARD) for steps in (1, 2))
    assert (once["attention"], twice["attention"]) == (5.0, 5.0)
    parameters = estimate.count_parameters(TINY)
    assert once["Adam and the gradient's norm"] == twice["Adam and the gradient's norm"] == 32 * parameters / 50
    assert (once["adding up gradients"], twice["adding up gradients"]) == (0, 12 * parameters / 50)
    moved = training_step.traffic(TINY, 20)
    assert {name: once[name] for name in moved} == pytest.approx({name: n / 50 for name, n in moved.items()})
    assert twice["loss"] == pytest.approx(once["loss"])
    assert twice["shared matrix"] == 2 * once["shared matrix"]
    assert once["products: logits"] == pytest.approx(3 * 2 * 20 * 4 * 100 / 5.21e12)
    assert once["products: feed-forward"] == twice["products: feed-forward"] == pytest.approx(18 * 1280 / 5.21e12)
    assert (once["gaps between kernels"], twice["gaps between kernels"]) == pytest.approx((320 * 4e-6, 640 * 4e-6))
    assert Work(TINY, 20, 2).host_seconds == pytest.approx(640 * 10e-6)


def test_assumptions_change_their_parts_only():
    usual = Work(BASE, 3125).parts(1e-6, chip.SXM2)
    half = Work(BASE, 3125).parts(1e-6, chip.SXM2, StepAssumptions(dram_rate=0.5))
    slow = Work(BASE, 3125).parts(1e-6, chip.SXM2, StepAssumptions(product_rate=0.8))
    for name, seconds in usual.items():
        is_product, is_fixed = name.startswith("products"), name in ("attention", "gaps between kernels")
        assert half[name] == pytest.approx(seconds * (1 if is_product or is_fixed else 2))
        assert slow[name] == pytest.approx(seconds * (1.25 if is_product else 1))


def test_rate_that_an_aim_needs():
    work = Work(BASE, 25_000)
    needed = training_step.needed_tflops(work, 10_000, rest=0.5)
    assert work.tokens / (work.flops / (needed * 1e12) + 0.5) == pytest.approx(10_000)


def test_memory_by_hand():
    assert training_step.stored_weights_bytes(TINY, 3, 5) == 4 * 2 * (3 * 3 + 2 * (5 * 5 + 5 * 3))
    assert training_step.tokens_that_fit(TINY, 1e6) == (0.9 * 16e9 - 1.5e9 - 16 * estimate.count_parameters(TINY)) / 1e6


# ---- attention


def test_attentions_of_an_update():
    chosen = [Lengths((3,) * 15 + (7,), (2,) * 15 + (9,))]
    ((longest, pairs, passes),) = training_report.attentions(replace(BASE, num_decoder_layers=2), chosen)
    assert (longest, pairs) == (9, 2)
    one = Pass("forward", 2, 8, 9, 64)
    expected = {one._replace(feature="packed"): 6 + 2, one._replace(feature="causal"): 2}
    assert passes == {p._replace(direction=name): n for p, n in expected.items() for name in ("forward", "backward")}


def test_vanilla_is_as_published():
    assert training_report.vanilla_seconds(Pass("forward", 8192, 1, 82, 64)) == pytest.approx(6892.5e-6)
    backward = Pass("backward", 512, 8, 82, 64, feature="causal")
    assert training_report.vanilla_seconds(backward) == pytest.approx(9070.3e-6 / 2)


# ---- the page


class Fixed:
    """A predictor by which every pass takes 100 us, and twice that with half of DRAM."""

    def predict(self, pass_, assumptions=training_report.USUAL):
        return Prediction(pass_, 100.0 / assumptions.dram_rate, {}, ())


@pytest.fixture
def made(tmp_path) -> training_report.TrainingReport:
    """The report of an empty cubin."""
    cubins = tracing.Cubins(tmp_path)
    cubins.file("float32").write_bytes(b"")
    report = training_report.TrainingReport(cubins)
    report.predictor = Fixed()
    return report


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the tables' rows that begin with a cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [line for line in lines if line[0] == first]


def test_text(made):
    text = made.text()
    assert page.digest(made.file) in text
    attention = made.attention("base", made.fused_seconds)
    passes = 6 * 2 * (12 + 6)  # of six updates
    tokens = sum(sum(lengths.target) for lengths in made.chosen)
    shares = [expected(way, chip.SXM2).centre for way in ("forward", "backward")]
    assert attention == pytest.approx(passes * 100e-6 * 8 / tokens * sum(1 / share for share in shares) / 2)
    exposed = estimate.estimate(training_report.PAPER_MODELS["base"].config, "P100 SXM2", 8, 1, "fp32", 37_000).exposed
    share = sum(Work(BASE, 3125).parts(attention, chip.SXM2).values()) + exposed
    alone = sum(Work(BASE, 25_000).parts(attention, chip.SXM2).values())
    one, all_ = rows(text, "base")[:2]
    assert one[1:4] == ["one of eight", f"**{1e3 * share:.0f}**", "400"]
    assert one[4:7] == [f"**{3125 / share:,.0f}**", "7,812", "reached"]
    assert all_[1:3] == ["alone", f"**{1e3 * alone:.0f}**"]
    assert all_[4:7] == [f"**{25_000 / alone:,.0f}**", "14,500", "reached"]
    usual, half = rows(text, "as above")[0], rows(text, "half of DRAM, attention included")[0]
    twice = Work(BASE, 25_000).parts(2 * attention, chip.SXM2, StepAssumptions(dram_rate=0.5))
    assert (usual[3], half[3]) == (f"{1e3 * alone:.0f}", f"{1e3 * sum(twice.values()):.0f}")
    slower = rows(text, "products 15 % slower")[0]
    assert all(int(late) > int(early) for late, early in zip(slower[1::2], usual[1::2], strict=True))


def test_big_needs_two_steps_alone(made):
    assert [work.steps for name in ("base", "big") for work in made.works(name).values()] == [1, 1, 1, 2]


def test_stored_weights_are_padded(made):
    made.chosen = [Lengths((3, 1), (5, 2))]
    assert made.stored_weights("base") == 2 * training_step.stored_weights_bytes(BASE, 3, 5) / 7


def test_a_slow_host_binds(made):
    host = made.works("base")["alone"].host_seconds
    assert made.seconds("base", "alone", {"attention": host / 2}) == host
    assert made.seconds("base", "alone", {"attention": host, "loss": 1.0}) == host + 1.0


def test_the_page_is_that_of_this_build():
    file = tracing.Cubins(tracing.INSTALLED).file("float32")
    installed = images.installed()
    if not file.is_file():
        pytest.skip(f"there are no cubins for sm_60: {installed.reason or 'this build has none'}")
    if installed.nvrtc != "12.9":
        pytest.skip(f"the page is that of NVRTC 12.9, this build of {installed.nvrtc}")
    noted = re.findall(r"^\| `(\S+\.cubin)` \| `([0-9a-f]{64})` \|$", PAGE.read_text(), re.MULTILINE)
    assert noted == [(file.name, page.digest(file))], "if this is meant: make kernel-report"


def test_the_page_is_that_of_this_arithmetic(made):
    text = PAGE.read_text()
    assert page.markdown_table(("what", "from where"), training_step.SOURCES) in text
    assert made._memory() in text and made._all_reduce() in text
    for name in training_report.PAPER_MODELS:
        header, _, *lines = (line.split(" | ") for line in made._parts(name, 0.0).splitlines())
        assert " | ".join(header) in text
        for part, one, _, alone, _ in lines:
            if part != "| attention":  # which is that of the cubin; the shares depend on it
                assert re.search(f"^{re.escape(part)} \\| {one} \\| [^|]* \\| {alone} ", text, re.MULTILINE), part
