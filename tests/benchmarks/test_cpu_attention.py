"""The benchmark of attention on a CPU: all ways take turns, ratios are judged by a table, and memory is measured."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time

import pytest
import torch

from benchmarks import attention, cpu_attention, cpu_cases, cpu_peak, cpu_targets, host, lengths, shared_library
from benchmarks.cases import MASKS, AttentionCase
from benchmarks.comparison import CASE
from benchmarks.cpu_rates import Rates, using_threads
from benchmarks.cpu_targets import TARGETS, Target
from benchmarks.result_table import read
from benchmarks.roofline import Roofline
from benchmarks.shared_library import BuildError
from benchmarks.timing import TimedCall, cpu_clock, time_in_turns
from tests.support.benchmark_case import case

pytest.importorskip("fastattn._cpu", reason="fastattn._cpu is not built: it takes a C++ compiler")


# ---- the whole command


def test_smoke(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert attention.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    rows, origin = read(tmp_path / "attention.csv")
    timed = [row for row in rows if row["p50_ms"]]
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in timed)
    assert {row["mask"] for row in timed} == set(MASKS)
    here = {"1": "cpu", "2": "wall"} if os.cpu_count() > 1 else {"1": "cpu"}
    assert {(row["threads"], row["clock"]) for row in timed} == set(here.items())
    assert {row["cpu"] for row in rows if row["cpu"]} == {host.model()} and origin["device"] == f"CPU {host.model()}"
    assert all(row["load_before"] for row in rows)
    assert {row["provider"] for row in timed if row["layout"] == "packed"} == {"fastattn-cpu", "fastattn"}
    assert {row["note"] for row in timed if row["provider"] == "fastattn"} == {"runs cpu"}
    searches = {(row["provider"], row["pass"]) for row in timed if row["suite"] == "decode"}
    assert searches == {(name, "forward") for name in ("fastattn-cpu", "fastattn", "torch-default")}
    refused = {(row["provider"], row["mask"]) for row in rows if row["no_numbers_because"]}
    not_for_flash = [mask for mask, has in MASKS.items() if has & {"dropout", "gradient"}]
    assert refused == {("torch-flash", mask) for mask in not_for_flash}
    assert origin["cpu"]["instruction_set"] == host.instruction_set() and origin["backends"]["float32"] == "cpu"
    assert origin["float32_peak_tflops"].keys() == {f"threads: {n}" for n in sorted(here)}

    verdicts, judged_at = read(tmp_path / "attention_targets.csv")
    assert {row["target"] for row in verdicts} >= {"packed", "padded", "dropout", "no matrix of all scores"}
    printed = capsys.readouterr().out
    assert f"{sum(row['verdict'] == 'missed' for row in verdicts)} missed" in printed
    if host.instruction_set() == "avx512":
        held = [row for row in rows if row["suite"] == "wmt-avx2"]
        assert {row["isa"] for row in held} == {"avx2"} and {row["threads"] for row in held if row["p50_ms"]} == {"1"}
        assert judged_at["held_to_avx2"]["cpu"]["instruction_set_of_torch"] == "AVX2"
        assert "AVX2, packed" in {row["target"] for row in verdicts}


def test_a_wrong_way_gets_no_numbers(monkeypatch):
    known = cpu_attention.cpu_providers()
    sharper = lambda p: known["fastattn"].prepare(p)  # noqa: E731
    wrong = known["fastattn-cpu"]._replace(prepare=lambda p: lambda: 2 * sharper(p)())
    monkeypatch.setattr(cpu_attention, "cpu_providers", lambda: known | {"fastattn-cpu": wrong})
    command = cpu_attention.parse("x", "", ["--smoke", "--device", "cpu", "--filter", "fastattn-cpu|torch-math"])
    found = list(cpu_attention.in_turns([case()], command, [1], {1: RATES}))
    reasons = {row["provider"]: row.get("no_numbers_because", "") for row in found}
    assert reasons["fastattn-cpu"].startswith("wrong: out is off by") and reasons["torch-math"] == ""


RATES = Rates(Roofline(1e9, {torch.float32: 1e9}), 2e9)


# ---- turns


def test_all_take_their_turns_and_backward_follows_forward():
    called: list[str] = []

    def call(name: str, has_backward: bool) -> TimedCall:
        return TimedCall(lambda: called.append(name), (lambda _: called.append(f"{name}'")) if has_backward else None)

    found = time_in_turns({"a": call("a", True), "b": call("b", False)}, time.thread_time, 0.0, 3)
    assert {name: set(times) for name, times in found.items()} == {
        "a": {"forward", "backward", "both"},
        "b": {"forward"},
    }
    for start in range(0, len(called), 3):
        turn = called[start : start + 3]
        assert sorted(turn) == ["a", "a'", "b"] and turn.index("a'") == turn.index("a") + 1
    assert len(called) == 3 * (1 + 3)


def test_one_threads_clock_counts_work_alone():
    def both(clock) -> float:
        call = TimedCall(lambda: time.sleep(2e-3), lambda _: None)
        return time_in_turns({"sleep": call}, clock, 0.0, 3)["sleep"]["both"].p50_ms

    assert both(cpu_clock(1)) < 1 and both(cpu_clock(2)) >= 2


def test_padded_and_packed_batches_of_the_same_sentences_take_turns_together():
    batches = [c for c in cpu_cases.smoke_cases() if c.suite == "wmt-dropout"]
    keys = {cpu_attention.key_of_turns(c) for c in batches}
    assert len(batches) == 4 and len(keys) == 2
    assert not keys & {cpu_attention.key_of_turns(c) for c in cpu_cases.smoke_cases() if c.suite == "wmt"}


# ---- cases


def test_batches_are_of_real_sentences_up_to_a_length():
    among = [lengths.Lengths((2, 3, 3), (3, 2, 4)), lengths.Lengths((4, 5, 5, 9), (5, 5, 4, 3))]
    assert lengths.longest_up_to(5, 11, among) == lengths.Lengths((4, 5), (5, 5))
    assert lengths.longest_up_to(3, 99, among) == lengths.Lengths((2, 3), (3, 2))
    with pytest.raises(StopIteration):
        lengths.longest_up_to(8, 99, among)


def test_every_target_has_cases():
    """Both sides of each are among what is timed."""
    every = cpu_cases.every_case()
    every += cpu_cases.held_to("avx2", every)
    for target in TARGETS:
        assert any(target.covers(as_row(c, target)) for c in every), target
        others = [c for c in every if c.suite == target.suite and c.layout != "packed"]
        names = {provider.name for c in others for provider in cpu_attention.providers_of(c)}
        assert {target.peer, cpu_targets.OURS} <= names, target
    assert {c.seqlen_k for c in every if c.suite == "wmt"} == set(cpu_cases.LONGEST)


def as_row(c: AttentionCase, target: Target) -> dict[str, str]:
    described = {name: str(value) for name, value in c.columns().items()}
    return described | {"threads": str(target.threads), "pass": target.which, "p50_ms": "1.0"}


# ---- verdicts


def row(provider: str, ms: float, **changes: str) -> dict[str, str]:
    described = dict.fromkeys((*CASE, "peak_memory_mib"), "") | {n: str(v) for n, v in case().columns().items()}
    rest = {"provider": provider, "pass": "both", "p50_ms": str(ms), "threads": "1", "isa": "avx512"}
    return described | {"suite": "wmt", "layout": "padded", "mask": "padding"} | rest | changes


@pytest.mark.parametrize(("ms", "verdict"), [(1.0, "missed"), (1.5, "reached"), (2.0, "reached, the goal too")])
def test_a_ratio_is_judged_by_target_and_goal(ms, verdict):
    target = Target("padded", "wmt", "torch-flash", 1.5, 2.0, layouts=("padded",))
    (found,) = cpu_targets.verdicts([row("fastattn-cpu", 1.0), row("torch-flash", ms)], [target])
    assert (found.verdict, found.ratio, found.peer) == (verdict, f"{ms:.2f}", "torch-flash")


def test_a_packed_batch_is_judged_by_the_padded_one_with_the_same_threads_and_instruction_set():
    target = Target("packed", "wmt", "torch-flash", 1.5, layouts=("packed",))
    ours = row("fastattn-cpu", 1.0, layout="packed", mask="none")
    others = [
        row("torch-flash", 9.0, **change) for change in ({"threads": "2"}, {"isa": "avx2"}, {"workload": "other"})
    ]
    (found,) = cpu_targets.verdicts([ours, row("torch-flash", 3.0), *others], [target])
    assert found.ratio == "3.00"
    assert (
        cpu_targets.verdicts([ours | {"dtype": "bfloat16"}, row("torch-flash", 3.0, dtype="bfloat16")], [target]) == []
    )


@pytest.mark.parametrize(("mib", "verdict"), [("0.5", "reached"), ("2.0", "missed")])
def test_memory_is_judged_by_a_matrix_of_all_scores(mib, verdict):
    long = row("fastattn-cpu", 1.0, batch="1", nheads="1", seqlen_q="512", seqlen_k="512", peak_memory_mib=mib)
    (found,) = cpu_targets.memory_verdicts([long, row("torch-math", 1.0, peak_memory_mib="9")])
    assert (found.theirs, found.verdict) == ("1", verdict)


def test_what_is_missed_is_printed_last(capsys):
    rows = [row("fastattn-cpu", 1.0), row("torch-flash", 1.55)]
    targets = [Target(str(ratio), "wmt", "torch-flash", ratio) for ratio in (1.6, 1.5)]
    cpu_targets.print_verdicts(cpu_targets.verdicts(rows, targets))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith("reached") and lines[-2].endswith("missed") and lines[-1] == "1 reached, 1 missed"


# ---- the machine


def test_peak_memory_counts_what_is_freed_again():
    if not host.CLEAR_REFS.exists():
        pytest.skip("needs Linux's /proc")
    large = 64 << 20
    assert 60 < host.peak_memory_mib(lambda: torch.ones(large, dtype=torch.uint8)) < 80
    assert host.peak_memory_mib(lambda: None) < 5


def test_the_cpus_name(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A CPU @ 2.7GHz\n\nprocessor\t: 1\nmodel name\t: other\n")
    monkeypatch.setattr(host, "CPUINFO", info)
    assert host.model() == "A CPU @ 2.7GHz"
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "none")
    assert host.model() == platform.machine()


def test_a_busy_machine_is_named():
    assert host.busy_note(host.QUIET_LOAD) is None and "load of 0.31" in host.busy_note(0.31)


def test_nothing_is_faster_than_multiply_adds_in_registers():
    try:
        peak = cpu_peak.peak_tflops(host.instruction_set())
    except BuildError as error:
        pytest.skip(str(error))
    a = torch.randn(256, 256)
    with using_threads(1):
        found = time_in_turns({"product": TimedCall(lambda: a @ a)}, cpu_clock(1), 0.2, 3)
    assert 2e-9 * 256**3 / found["product"]["forward"].p50_ms < 1.1 * peak
    assert peak > cpu_peak.peak_tflops("baseline") or host.instruction_set() == "baseline"


def test_multiply_adds_are_made_and_counted(tmp_path):
    library = tmp_path / "cpu_peak.so"
    try:
        shared_library.build(cpu_peak.SOURCE, library)  # vectors of four numbers, twelve of them
    except BuildError as error:
        pytest.skip(str(error))
    multiply_add = ctypes.CDLL(str(library)).multiply_add
    multiply_add.restype, total = ctypes.c_double, ctypes.c_float(0.5)
    assert multiply_add(ctypes.c_long(1), ctypes.byref(total)) == 2 * 12 * 4
    assert total.value == 0.5 + 4 * sum(0.5 * i + 0.5 for i in range(12))


def test_shares_are_of_the_peak_where_it_is_known():
    assert RATES.roof().product_tflops[torch.float32] == 2e9 == RATES.peak_of(torch.float32)
    assert RATES.peak_of(torch.bfloat16) is None
    assert RATES._replace(peak=None).roof() == RATES.measured
    assert json.dumps(cpu_attention.cpu_rates.as_json({1: RATES}))
