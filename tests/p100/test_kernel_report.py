"""The kernel report: its passes and targets, the command, and the committed page."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.p100 import chip, page
from benchmarks.p100.machine import nvdisasm
from benchmarks.p100.pipeline import SENSITIVITIES
from fastattn.cuda_kernels import images
from fastattn.cuda_kernels.sources import ELEMENTS

pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built", exc_type=ImportError)

from benchmarks.p100 import kernel_report, prediction, targets, tracing
from benchmarks.p100.passes import FEATURES, Pass, params
from benchmarks.p100.quick import parse_pass

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "p100_report.md"


# ---- passes and targets


@pytest.mark.parametrize("feature", FEATURES)
def test_parameters_of_a_pass(feature: str) -> None:
    pass_ = Pass("backward", 2, 3, 40, 8, feature=feature)
    p = params(pass_, 24)
    assert (p.max_seqlen_q, p.max_seqlen_k, p.batch_size(), p.q.shape[-1]) == (24, 24, 2, 8)
    assert p.is_packed() == (feature == "packed")
    assert torch.isfinite(p.q[:24, 0] if p.is_packed() else p.q[0, 0]).all()
    given = {name for name in ("mask", "bias", "seed") if getattr(p, name) is not None}
    expected = {"key padding mask": "mask", "full mask": "mask", "dropout 0.1": "seed"} | dict.fromkeys(
        ("bias", "bias and its gradient"), "bias"
    )
    assert given == {expected[feature]} if feature in expected else not given


def test_flops() -> None:
    assert Pass("forward", 2, 3, 10, 8).flops == 4 * 6 * 100 * 8
    assert Pass("backward", 2, 3, 10, 8).flops == 10 * 6 * 100 * 8
    assert Pass("backward", 2, 3, 10, 8, feature="causal").flops == 5 * 6 * 100 * 8


def test_targets() -> None:
    rates = {(target.pass_.direction, target.pass_.seqlen): target.tflops for target in targets.targets(chip.SXM2)}
    assert rates["forward", 82] == 6.2 and rates["backward", 128] == 7.8 and rates["backward", 512] is None
    assert rates["forward", 32] == pytest.approx(0.95 * 4.5, rel=0.02)
    assert rates["backward", 32] == pytest.approx(0.95 * 6.5, rel=0.02)
    with (ROOT / "benchmarks" / "data" / "published_gp100.csv").open() as file:
        assert len(targets.published_passes()) == sum(row["compared"] == "yes" for row in csv.DictReader(file)) == 32
    vanilla = {
        step.backward.batch * step.backward.nheads: step.vanilla_us
        for step in targets.both_passes()
        if step.backward.seqlen == 82
    }
    assert vanilla == {8192: pytest.approx(6892.5 + 9070.3)}
    scaled = [step.vanilla_us for step in targets.both_passes() if step.backward.seqlen == 256]
    assert scaled == [pytest.approx(3421.3 * 2400 / 768 + 13249.2)]
    readings = {step.backward.batch: step.card_us for step in targets.both_passes() if step.backward.seqlen == 128}
    assert readings == {16: pytest.approx(340.5 + 1590.0 / 4), 64: None}


def test_passes_of_the_command() -> None:
    assert parse_pass("fwd:8192x82x64") == Pass("forward", 8192, 1, 82, 64)
    assert parse_pass("bwd:16x8x128x40") == Pass("backward", 16, 8, 128, 40)
    with pytest.raises(Exception, match="must be like fwd:8192x82x64"):
        parse_pass("fwd:82")


# ---- the page


def test_the_report_is_that_of_this_build() -> None:
    installed = images.installed()
    kernels = tracing.Cubins(tracing.INSTALLED)
    files = [kernels.file(element) for element in ELEMENTS]
    if not all(file.is_file() for file in files):
        pytest.skip(f"there are no cubins for sm_60: {installed.reason or 'this build has none'}")
    if installed.nvrtc != "12.9":
        pytest.skip(f"the report is that of NVRTC 12.9, this build of {installed.nvrtc}")
    noted = dict(re.findall(r"^\| `(\S+\.cubin)` \| `([0-9a-f]{64})` \|$", PAGE.read_text(), re.MULTILINE))
    assert noted == {file.name: page.digest(file) for file in files}, "if this is meant: make kernel-report"


def test_the_report_has_every_prediction() -> None:
    with PAGE.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = {(row["pass"], row["dtype"], row["seqlen"], row["feature"]) for row in rows}
    for pass_ in [*(p for p, _ in targets.published_passes()), *targets.feature_passes()]:
        dtype = str(pass_.dtype).removeprefix("torch.")
        assert (pass_.direction, dtype, str(pass_.seqlen), pass_.feature) in shown
    for row in rows:
        bounds = [name for name in row if name.startswith("bound: ") and name != f"bound: {prediction.WITHOUT_PAIRS}"]
        assert 0 < float(row["tflops"]) < 1.01 * min(float(row[name]) for name in bounds if row[name])
        assert math.isclose(float(row["tflops"]) * float(row["us"]), pass_of(row).flops * 1e-6, rel_tol=0.01)


def pass_of(row: dict[str, str]) -> Pass:
    sizes = (int(row[name]) for name in ("batch", "nheads", "seqlen", "head_dim"))
    return Pass(row["pass"], *sizes, getattr(torch, row["dtype"]), row["feature"])


# ---- the command on real kernels; it needs nvdisasm


@pytest.fixture
def disassembler() -> None:
    try:
        nvdisasm.path()
    except nvdisasm.NotFound as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_quick_form(disassembler: None, capsys: pytest.CaptureFixture[str]) -> None:
    if not tracing.Cubins(tracing.INSTALLED).file("float32").is_file():
        pytest.skip(f"there are no cubins for sm_60: {images.installed().reason or 'this build has none'}")
    assert kernel_report.main(["--quick", "fwd:1024x32x64"]) == 0
    first, allowed, *rest = capsys.readouterr().out.splitlines()
    rate = float(re.search(r"predicted \d+ us, ([\d.]+) TFLOP/s", first)[1])
    assert 0.5 < rate < min(map(float, re.findall(r" ([\d.]+)(?:,|$)", allowed)))
    assert [line.split(":")[0] for line in rest[:4]] == [*SENSITIVITIES]
