"""The benchmarks run, and give no number for what is wrong, unavailable or impossible."""

from __future__ import annotations

import csv
import importlib
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastattn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """benchmarks.torch_backends; benchmarks are run from the repository's root and not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.torch_backends")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def smoke(bench, folder: Path) -> list[dict[str, str]]:
    """The rows of the tiny cases, read back."""
    assert bench.main(["--smoke", "--out", str(folder)]) == 0
    with (folder / "torch_backends.csv").open() as file:
        return list(csv.DictReader(file))


def check(rows: list[dict[str, str]]) -> set[str]:
    """Every row has plausible numbers or says why it has none; the providers with numbers."""
    for row in rows:
        if row["no_numbers_because"]:
            assert row["no_numbers_because"].startswith("unavailable: ") and not row["p50_ms"]
        else:
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            assert float(row["gb_s"]) >= 0 and float(row["percent_of_copy"]) >= 0
    timed = [row for row in rows if row["p50_ms"]]
    assert {row["mask"] for row in timed} == {"none", "padding", "causal"}
    assert {row["pass"] for row in timed} == {"forward", "backward", "both"}
    return {row["provider"] for row in timed}


def test_smoke_on_the_cpu(bench, no_gpu, tmp_path):
    rows = smoke(bench, tmp_path)
    assert check(rows) == {"torch-math", "torch-flash", "fastattn-torch"}
    assert {row["provider"] for row in rows} >= {"torch-cudnn", "torch-efficient", "fastattn-cuda", "fastattn-triton"}
    origin = json.loads((tmp_path / "torch_backends.json").read_text())
    assert set(origin) >= {"device", "driver", "versions", "commit", "dirty", "date", "command"}
    assert origin["versions"]["torch"] == str(torch.__version__)


@pytest.mark.gpu
def test_smoke_on_the_gpu(bench, tmp_path):
    rows = smoke(bench, tmp_path)
    assert {"torch-math", "torch-efficient", "fastattn-torch"} <= check(rows)
    assert all(float(row["peak_memory_mib"]) > 0 for row in rows if row["p50_ms"])


def test_without_a_gpu_nothing_is_measured(bench, no_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CASES", [])  # they would take hours here
    assert bench.main(["--out", str(tmp_path / "results")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (F.scaled_dot_product_attention, None),
        (lambda q, k, v, is_causal: F.scaled_dot_product_attention(q, k, v), "wrong: out is off"),
        (lambda q, k, v, is_causal: F.scaled_dot_product_attention(q.detach(), k, v, None, 0.0, True), "unavailable: "),
        (
            lambda q, k, v, is_causal: F.scaled_dot_product_attention(q, DoubledGradient.apply(k), v, None, 0.0, True),
            "wrong: dk is off",
        ),
    ],
    ids=["right", "no-mask", "no-gradient", "wrong-gradient"],
)
def test_what_is_wrong_gets_no_numbers(bench, attend, reason):
    case, device = bench.Case(2, 2, 9, 16, "causal", torch.float32), torch.device("cpu")
    provider = bench.Provider("mine", attend, nullcontext)
    found = bench.why_no_numbers(provider, case, device, bench.expect(case, device))
    assert found == reason if reason is None else found.startswith(reason)


def test_what_beats_the_device_gets_no_numbers(bench, monkeypatch):
    case, timing = bench.Case(512, 8, 128, 64, "none", torch.float32), bench.Timing(1.0, 0.9, 1.1)
    tflops = 4 * 512 * 8 * 128**2 * 64 / 1e-3 / 1e12
    monkeypatch.setattr(bench, "peak_tflops", lambda device, dtype: 2 * tflops)
    numbers = bench.numbers(case, torch.device("cpu"), "forward", timing, 1.0)
    assert (numbers["tflops"], numbers["percent_of_peak"]) == (f"{tflops:.3f}", "50.0")
    monkeypatch.setattr(bench, "peak_tflops", lambda device, dtype: 0.9 * tflops)
    numbers = bench.numbers(case, torch.device("cpu"), "forward", timing, 1.0)
    assert list(numbers) == ["no_numbers_because"] and numbers["no_numbers_because"].startswith("wrong: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bandwidth_counts_what_every_attention_moves(bench, dtype):
    case = bench.Case(2, 3, 5, 64, "none", dtype)
    q, k, v = case.make(torch.device("cpu")).inputs
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True)
    forward = [q, k, v, out, lse]
    backward = [q, k, v, out, lse, out, q, k, v]  # dout, dq, dk, dv are as large as out, q, k, v
    assert case.bytes("forward") == sum(x.nbytes for x in forward)
    assert case.bytes("backward") == sum(x.nbytes for x in backward)
    assert case.bytes("both") == case.bytes("forward") + case.bytes("backward")
    timing = bench.Timing(2.0, 1.0, 3.0)
    numbers = bench.numbers(case, torch.device("cpu"), "forward", timing, copy_gb_s=0.5 * case.bytes("forward") * 1e-6)
    assert numbers["percent_of_copy"] == "100.0"


def test_copy_rate_is_bytes_read_and_written_per_second(monkeypatch, bench):
    bandwidth = importlib.import_module("benchmarks.bandwidth")
    monkeypatch.setattr(bandwidth, "time_once", lambda run, device, repetitions: bench.Timing(0.5, 0.5, 0.5))
    assert bandwidth.copy_rate(torch.device("cpu")) == pytest.approx(2 * bandwidth.CPU_BYTES / 0.5e-3 / 1e9)
