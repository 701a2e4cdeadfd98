"""The benchmark of attention gives no number for what is wrong, unavailable or impossible."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastattn
from benchmarks import attention, attention_columns, cases, comparison, gate, lengths, providers, published, roofline
from benchmarks.command import parse
from benchmarks.result_table import read
from benchmarks.roofline import Roofline
from benchmarks.timing import PassTime
from tests.support.benchmark_case import case, packed

CPU = torch.device("cpu")
ON_THE_CPU = {"torch-math", "torch-flash", "torch-default", "torch-products", "fastattn-torch"}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- the whole command


def smoke(folder: Path, *options: str) -> list[dict[str, str]]:
    """The rows of the tiny cases, read back."""
    assert attention.main(["--smoke", "--out", str(folder), *options]) == 0
    return read(folder / "attention.csv")[0]


def check(rows: list[dict[str, str]]) -> set[str]:
    """Every row has plausible numbers or says why it has none; the providers with numbers."""
    for row in rows:
        if row["no_numbers_because"]:
            assert row["no_numbers_because"].startswith("unavailable: ") and not row["p50_ms"]
        else:
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            assert float(row["gb_s"]) >= 0 and 0 <= float(row["percent_of_roofline"]) <= 100
    timed = [row for row in rows if row["p50_ms"]]
    assert {row["mask"] for row in timed} == set(cases.MASKS)
    assert {row["pass"] for row in timed} == {"forward", "backward", "both"}
    return {row["provider"] for row in timed}


def test_one_after_another(no_gpu, tmp_path, capsys):
    """As on a GPU, with what a CPU has."""
    command = parse("attention", "", ["--smoke", "--out", str(tmp_path)])
    assert attention.one_after_another(command) == 0
    rows = read(tmp_path / "attention.csv")[0]
    assert check(rows) == ON_THE_CPU
    assert {row["provider"] for row in rows} == {provider.name for provider in providers.all_providers()}
    assert {row["provider"] for row in rows if row["layout"] == "packed" and row["p50_ms"]} == {"fastattn-torch"}
    notes = {row["mask"]: row["note"] for row in rows if row["provider"] == "torch-default" and row["note"]}
    assert notes["none"] == "runs FLASH_ATTENTION" and notes["dropout"] == "runs MATH"
    origin = json.loads((tmp_path / "attention.json").read_text())
    assert set(origin) >= {"device", "driver", "versions", "commit", "dirty", "date", "copy_gb_s", "product_tflops"}
    assert origin["command"].startswith("python ") and origin["size"] == "smoke"
    assert "nothing to compare" in capsys.readouterr().out


@pytest.mark.gpu
def test_smoke_on_the_gpu(tmp_path):
    rows = smoke(tmp_path)
    assert {"torch-math", "torch-efficient", "fastattn-torch"} <= check(rows)
    assert all(float(row["peak_memory_mib"]) > 0 for row in rows if row["p50_ms"])


def test_filter(no_gpu, tmp_path):
    rows = smoke(tmp_path, "--filter", "wmt-dropout.*packed.*fastattn-cpu")
    assert {(row["layout"], row["provider"]) for row in rows} == {("packed", "fastattn-cpu")}


@pytest.mark.parametrize("options", [[], ["--quick"], ["--smoke", "--device", "cuda"]], ids=" ".join)
def test_without_a_gpu_nothing_is_measured(no_gpu, monkeypatch, tmp_path, capsys, options):
    for suites in ("every_case", "quick_cases", "smoke_cases"):  # which would take hours here
        monkeypatch.setattr(attention, suites, list)
    assert attention.main([*options, "--out", str(tmp_path / "results")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# ---- correctness before speed


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (causal, None),
        (F.scaled_dot_product_attention, "out is off by"),
        (lambda q, k, v: causal(q.detach(), k, v), "unavailable"),
        (lambda q, k, v: causal(q, DoubledGradient.apply(k), v), "dk is off by"),
    ],
    ids=["right", "no-mask", "no-gradient", "wrong-gradient"],
)
def test_what_is_wrong_gets_no_numbers(attend, reason):
    provider = providers.Provider("mine", lambda p: lambda: attend(p.q, p.k, p.v))
    roof = Roofline(1e9, {torch.float32: 1e9})
    rows = attention.measure(case("causal"), provider, gate.Gate(case("causal"), CPU), CPU, roof, 0.0)
    if reason is None:
        assert len(rows) == 3 and all("p50_ms" in row for row in rows)
    else:
        assert len(rows) == 1 and reason in rows[0]["no_numbers_because"] and "p50_ms" not in rows[0]


def test_every_bit_of_our_dropout_is_checked():
    """Other libraries draw their own bits, so that they are compared without dropout; ours with it."""
    ours = next(p for p in providers.all_providers() if p.name == "fastattn-torch")
    judge = gate.Gate(case("dropout"), CPU)
    judge.admit(ours)
    without = ours._replace(prepare=lambda p: ours.prepare(dataclasses.replace(p, dropout_p=0.0)))
    with pytest.raises(gate.Wrong, match="out is off"):
        judge.admit(without)
    judge.admit(without._replace(has_own_dropout=True))


def test_a_packed_batch_that_is_not_masked_is_wrong():
    judge = gate.Gate(packed(), CPU)

    def whole(p):
        return lambda: F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (p.q, p.k, p.v))).transpose(0, 1)

    with pytest.raises(gate.Wrong, match="out is off"):
        judge.admit(providers.Provider("mine", whole))


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("scores", [7, 100, 200], ids=lambda n: f"{n}-scores")
def test_a_large_case_is_judged_by_its_last_heads(mask, scores):
    """9 * 9 scores a head: some rows of one head, one head, or both heads of one entry at a time."""
    ours = providers.all_providers()[2]
    judge = gate.Gate(case(mask), CPU, max_scores=scores)
    judge.admit(ours)
    assert judge._expected["out"].shape[:2] == (1, 2 if scores == 200 else 1)

    def wrong_at_the_end(p):
        call = ours.prepare(p)
        return lambda: torch.cat([call()[:-1], 1.5 * call()[-1:]])

    with pytest.raises(gate.Wrong):
        judge.admit(ours._replace(prepare=wrong_at_the_end))


def test_what_beats_the_device_gets_no_numbers():
    time = PassTime(1.0, 0.9, 1.1)
    large = dataclasses.replace(case(), batch=512, nheads=8, seqlen_q=128, seqlen_k=128, head_dim=64)
    tflops = 4 * 512 * 8 * 128**2 * 64 / 1e-3 / 1e12
    roof = Roofline(1e9, {torch.float32: 4 * tflops})
    numbers = attention_columns.numbers(large, 1, "forward", time, roof, peak=2 * tflops)
    assert (numbers["tflops"], numbers["percent_of_peak"]) == (f"{tflops:.3f}", "50.0")
    assert numbers["percent_of_roofline"] == "25.0"
    numbers = attention_columns.numbers(large, 1, "forward", time, roof, peak=0.9 * tflops)
    assert list(numbers) == ["no_numbers_because"] and numbers["no_numbers_because"].startswith("wrong: ")


# ---- what is counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mask", ["none", "bool", "bias", "bias-gradient"])
def test_bytes_are_those_that_every_attention_moves(dtype, mask):
    inputs = case(mask, dtype).make(CPU)
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True)
    masks = [x for x in (inputs.mask, inputs.bias) if x is not None]
    forward = [q, k, v, *masks, out, lse]
    backward = [*forward, out, q, k, v]  # dout, dq, dk, dv are as large as out, q, k, v
    if mask == "bias-gradient":
        backward.append(inputs.bias)
    assert inputs.bytes("forward") == sum(x.nbytes for x in forward)
    assert inputs.bytes("backward") == sum(x.nbytes for x in backward)
    assert inputs.bytes("both") == inputs.bytes("forward") + inputs.bytes("backward")


def test_flops_of_packed_sentences_have_no_padding():
    assert packed().flops("forward") == 4 * (9 + 81 + 25) * 2 * 16
    assert packed("causal").flops("both") == 3.5 * packed().flops("forward") / 2
    assert case(batch=3).flops("backward") == 2.5 * 4 * 3 * 81 * 2 * 16


def test_rates_are_bytes_and_operations_per_second(monkeypatch):
    monkeypatch.setattr(roofline, "time_once", lambda run, device, repetitions: PassTime(0.5, 0.5, 0.5))
    assert roofline.copy_rate(CPU) == pytest.approx(2 * roofline.CPU_BYTES / 0.5e-3 / 1e9)
    assert roofline.product_rate(CPU, torch.float32) == pytest.approx(2 * roofline.CPU_MATRIX**3 / 0.5e-3 / 1e12)
    measured = Roofline(copy_gb_s=2.0, product_tflops={torch.float32: 3.0})
    assert measured.share(1.0, 2e9, torch.float32, 2000.0) == pytest.approx(0.5)  # a second of copying
    assert measured.share(3e12, 1.0, torch.float32, 4000.0) == pytest.approx(0.25)  # a second of products
    assert measured.share(3e12, 2e9, torch.bfloat16, 2000.0) == pytest.approx(0.5)  # which it cannot multiply


# ---- cases


def test_updates_hold_sentences_of_similar_length():
    updates = lengths.updates(3, 25_000)
    for source, target in updates:
        assert 23_000 < max(sum(source), sum(target)) <= 25_000 and len(source) == len(target)
        assert sum(source) > 0.6 * len(source) * max(source)
    means = [sum(source) / len(source) for source, _ in updates]
    assert means == sorted(means) and means[0] < 28 < means[-1]


def test_padded_and_packed_hold_the_same_sentences():
    update = lengths.Lengths((3, 9, 5), (4, 2, 7))
    found = {(c.workload.split()[0], c.layout): c for c in cases.of_updates([update], [torch.float32], nheads=2)}
    inputs = found["cross", "packed"].make(CPU)
    assert inputs.cu_seqlens_q.tolist() == [0, 4, 6, 13] and inputs.cu_seqlens_k.tolist() == [0, 3, 12, 17]
    assert found["encoder", "padded"].make(CPU).mask.sum(-1).flatten().tolist() == [3, 9, 5]
    assert found["decoder", "padded"].make(CPU).is_causal and found["decoder", "packed"].make(CPU).is_causal


def test_the_quick_form_is_small_and_shows_everything_once():
    every, quick = cases.every_case(), cases.quick_cases()
    assert len(quick) <= 50 and len(set(quick)) == len(quick) and set(quick) <= set(every)
    for suite in {c.suite for c in every}:
        for name in ("seqlen_k", "head_dim", "mask", "dtype", "workload", "layout"):
            all_values, shown = (
                {getattr(c, name) for c in some if c.suite == suite and c.seqlen_k <= 8192} for some in (every, quick)
            )
            assert shown == all_values, (suite, name)


def test_published_times_stand_beside_the_case_they_were_measured_on():
    assert published.times("forward", (8192, 1, 82, 64), torch.float32) == pytest.approx((5.2901, 6.8925))
    assert published.times("backward", (1024, 8, 82, 64), torch.float16) == pytest.approx((21.5728, 9.0591))
    assert published.times("backward", (8192, 1, 82, 64), torch.float32) is None
    assert published.times("backward", (16, 16, 128, 16), torch.float32) is None  # it calibrates only
    found = [c for c in cases.every_case() if c.suite == "published"]
    assert len(found) == 30 and all(c.mask == "none" for c in found)
    shape = next(c for c in found if (c.batch, c.seqlen_k, c.dtype) == (8192, 82, torch.float32))
    roof = Roofline(1.0, {torch.float32: 1.0})
    row = attention_columns.numbers(shape, 1, "forward", PassTime(9.0, 9.0, 9.0), roof, peak=None)
    assert (row["published_fused_ms"], row["published_vanilla_ms"]) == pytest.approx((5.2901, 6.8925))
    short = dataclasses.replace(shape, suite="short")
    row = attention_columns.numbers(short, 1, "forward", PassTime(9.0, 9.0, 9.0), roof, peak=None)
    assert "published_fused_ms" not in row


# ---- who wins


def row(provider: str, ms: float, layout: str = "padded", **changes: str) -> dict[str, str]:
    """A row of a table of attention."""
    described = case().columns()
    rest = {"layout": layout, "mask": layout, "provider": provider, "pass": "both", "p50_ms": str(ms)}
    return {name: str(value) for name, value in (described | rest | changes).items()}


def test_the_fastest_of_ours_meets_the_fastest_of_the_others():
    rows = [row("fastattn-cuda", 3.0), row("fastattn-triton", 2.0), row("torch-math", 9.0), row("torch-flash", 5.0)]
    rows += [row("fastattn-torch", 1.0), row("torch-cudnn", 0.1) | {"p50_ms": ""}]
    (found,) = comparison.comparisons(rows)
    assert (found.ours, found.peer, found.speedup()) == ("fastattn-triton", "torch-flash", 2.5)


def test_times_with_other_threads_are_not_compared():
    of_one = [
        row("fastattn-cpu", 2.0, threads="1"),
        row("torch-math", 6.0, threads="1"),
        row("fastattn", 1.0, threads="1"),
    ]
    of_two = [row("fastattn-cpu", 1.0, threads="2"), row("torch-math", 2.0, threads="2")]
    found = comparison.comparisons([*of_one, *of_two])
    assert [(c.ours, c.speedup(), c.case.split()[-1]) for c in found] == [
        ("fastattn-cpu", 3.0, "1t"),
        ("fastattn-cpu", 2.0, "2t"),
    ]


def test_a_packed_batch_meets_the_padded_one_of_the_same_sentences():
    rows = [row("fastattn-cuda", 4.0, "packed"), row("torch-flex", 8.0, "packed"), row("torch-math", 2.0)]
    rows += [
        row("fastattn-cuda", 1.0),
        row("torch-math", 0.5, workload="others"),
        row("xformers", 0.1, dtype="float16"),
    ]
    found = {c.case.split()[2]: c for c in comparison.comparisons(rows)}
    assert (found["packed"].peer, found["packed"].speedup()) == ("torch-math (padded)", 0.5)
    assert found["padded"].speedup() == 2.0
    assert comparison.medians(list(found.values())) == {"masks": (1.25, 2, 1)}
