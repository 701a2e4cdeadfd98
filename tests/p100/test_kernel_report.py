"""From a problem to its predicted time on a P100, and the committed report."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.p100 import chip, mix
from benchmarks.p100.machine import cubin, nvdisasm
from benchmarks.p100.machine.sass import Instruction, Program
from benchmarks.p100.machine.trace import BlockTrace, Trace
from benchmarks.p100.pipeline import SENSITIVITIES
from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.sources import ELEMENTS
from tests.support.p100_programs import CONFLICT, FREE, LDG, LDS, MINIMUM, MUFU, make, traced

pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built", exc_type=ImportError)

from benchmarks.p100 import goals, kernel_report, prediction, report, sgemm, tracing
from benchmarks.p100.problems import FEATURES, Problem, params
from benchmarks.p100.tracing import Block, Kind, Taken, TracedLaunch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "p100_report.md"


# ---- traces


def test_block_lays_misses_beside_the_accesses() -> None:
    sectors = np.array([0, 2, 0, 3, 2], np.int16)
    trace = Trace(np.arange(5), np.full(5, 32), np.zeros(5, int), sectors)
    reads = [("k", False, np.array([10, 11])), ("q", False, np.array([20])), ("k", False, np.array([11, 12]))]
    accesses = [*reads, ("out", True, np.array([30, 31]))]
    alone = tracing.block(BlockTrace([trace], accesses, {}, {}), 100, {"q": 1.0, "k": 1.0, "out": 1.0})
    assert alone.warps[0].dram_sectors.tolist() == [0, 2, 0, 2, 2]  # 11 is there already
    shared = tracing.block(BlockTrace([trace], accesses, {}, {}), 100, {"q": 1.0, "k": 3.0, "out": 9.0})
    assert shared.warps[0].dram_sectors.sum() == 1 + 1 + 2  # 3 sectors of k for three blocks; writes are nobody else's


def test_rows_stand_for_all() -> None:
    assert tracing._tiles(1, 1, is_causal=False, is_ragged=True) == [(0, 1)]
    assert tracing._tiles(8, 3, is_causal=False, is_ragged=True) == [(0, 7), (2, 1)]
    assert tracing._tiles(8, 3, is_causal=False, is_ragged=False) == [(0, 8)]
    assert tracing._tiles(3, 3, is_causal=True, is_ragged=True) == [(0, 1), (1, 1), (2, 1)]
    assert tracing._tiles(16, 16, is_causal=True, is_ragged=False) == [(2, 4), (6, 4), (10, 4), (14, 4)]


def test_how_many_read_the_same_mask() -> None:
    for shape, served in {(1, 1): 96, (12, 1): 8, (1, 8): 12, (12, 8): 1}.items():
        assert tracing._served(torch.empty(*shape, 2, 2), nheads=8, running=96) == served


def launch(kinds: list[tuple[list[Instruction], int]], resident: int = 2) -> TracedLaunch:
    """Of blocks of two warps; all instructions of the kinds are those of one program."""
    program, made = [], []
    for instructions, count in kinds:
        one = traced(instructions)
        one = one._replace(index=one.index + len(program))
        program += instructions
        made.append(Kind(Block((one, one)), count))
    return TracedLaunch("k", "float32", Program("k", tuple(program), b""), Taken(64, 32, 0, resident), tuple(made))


def test_fullest_multiprocessor() -> None:
    two = launch([([FREE], 112), ([MUFU], 50)])
    first, second = (kind.block for kind in two.kinds)
    assert two.blocks == 162
    assert two.on_fullest(56) == [first, first, second]


def test_many_blocks_take_as_long_as_when_all_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "BLOCK_STAGGER", 40)
    many = launch([([FREE] * 300, 56 * 30), ([CONFLICT] * 300, 56 * 10)])
    model = prediction.Model(tracing.Kernels(ROOT))
    exact = model.cycles(many)
    monkeypatch.setattr(prediction, "EXACT", 10_000)
    continued = prediction.Model(tracing.Kernels(ROOT)).cycles(many)
    assert continued == pytest.approx(exact, rel=0.03)


def test_many_blocks_of_one_kind_are_continued_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = launch([([make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 100, 56 * 40)])
    monkeypatch.setattr(chip, "BLOCK_STAGGER", 40)
    waves = 20 * 600 + 19 * chip.BLOCK_LAUNCH + chip.BLOCK_STAGGER
    assert prediction.Model(tracing.Kernels(ROOT)).cycles(alike) == waves
    monkeypatch.setattr(prediction, "EXACT", 2000)
    assert prediction.Model(tracing.Kernels(ROOT)).cycles(alike) == waves


def test_the_last_blocks_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "BLOCK_STAGGER", 40)
    monkeypatch.setattr(prediction, "EXACT", 2000)
    chain = [make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 100
    even, odd = (prediction.Model(tracing.Kernels(ROOT)).cycles(launch([(chain, 56 * n)])) for n in (40, 41))
    assert odd - even == 600  # as long as two of them
    few = launch([(chain, 56 * 3)])
    assert prediction.Model(tracing.Kernels(ROOT)).cycles(few) == 600 + chip.BLOCK_LAUNCH + 600


def test_bounds_of_a_block() -> None:
    pair = make("FFMA", "R0", "R1", "R5", "R3", pairs_with_next=True)
    one = launch([([pair, LDS, MUFU, MINIMUM, make("SHFL", "R0"), LDG], 1)])
    bounds = prediction.block_bounds(one.program, one.kinds[0].block, chip.SXM2)
    dram = 2 * 4 * 32 / (0.78 * 732 / 56 / 1.48)
    assert bounds == {
        "FP32 lanes": 3,
        "FP32 lanes with conflicts": 4,
        "issue, one at a time": 6,
        "issue, with pairs": 5,
        "shared memory": 4,
        "special functions": 4,
        "L2": pytest.approx(2 * 4 * 32 / (1624 / 56 / 1.48)),
        "DRAM": pytest.approx(dram),
    }


def test_long_sequences_are_continued() -> None:
    backward, forward = Problem("backward", 1, 1, 1000, 64), Problem("forward", 1, 1, 1000, 64)
    assert prediction.lengths_replayed(backward) == [168, 232, 296]  # as ragged as 1000
    assert prediction.lengths_replayed(forward) == [296, 552]
    assert prediction.lengths_replayed(backward._replace(seqlen=319)) == [319]
    assert prediction.lengths_replayed(forward._replace(seqlen=575)) == [575]

    def quantities(n: int) -> dict[str, float]:
        busy = 3.0 * n * n + 70 * n + 900
        return {prediction.ISSUE: busy, "DRAM": 5.0 * n, "time": busy / (0.9 - 20 / n)}

    lengths = prediction.lengths_replayed(backward)
    continued = prediction._continued(lengths, [quantities(n) for n in lengths], 1000)
    assert continued == pytest.approx(quantities(1000))


# ---- problems and goals


@pytest.mark.parametrize("feature", FEATURES)
def test_problems_are_calls(feature: str) -> None:
    problem = Problem("backward", 2, 3, 40, 8, feature=feature)
    p = params(problem, 24)
    assert (p.max_seqlen_q, p.max_seqlen_k, p.batch_size(), p.q.shape[-1]) == (24, 24, 2, 8)
    assert p.is_packed() == (feature == "packed")
    assert torch.isfinite(p.q[:24, 0] if p.is_packed() else p.q[0, 0]).all()
    given = {name for name in ("mask", "bias", "seed") if getattr(p, name) is not None}
    expected = {"key padding mask": "mask", "full mask": "mask", "dropout 0.1": "seed"} | dict.fromkeys(
        ("bias", "bias and its gradient"), "bias"
    )
    assert given == {expected[feature]} if feature in expected else not given


def test_flops() -> None:
    assert Problem("forward", 2, 3, 10, 8).flops == 4 * 6 * 100 * 8
    assert Problem("backward", 2, 3, 10, 8).flops == 10 * 6 * 100 * 8
    assert Problem("backward", 2, 3, 10, 8, feature="causal").flops == 5 * 6 * 100 * 8


def test_goals() -> None:
    rates = {(goal.problem.pass_, goal.problem.seqlen): goal.tflops for goal in goals.goals(chip.SXM2)}
    assert rates["forward", 82] == 6.2 and rates["backward", 128] == 7.8 and rates["backward", 512] is None
    assert rates["forward", 32] == pytest.approx(0.95 * 4.5, rel=0.02)
    assert rates["backward", 32] == pytest.approx(0.95 * 6.5, rel=0.02)
    with (ROOT / "benchmarks" / "data" / "published_gp100.csv").open() as file:
        assert len(goals.published_problems()) == len([*csv.reader(file)]) - 1
    vanilla = {
        step.backward.batch * step.backward.nheads: step.vanilla_us
        for step in goals.steps()
        if step.backward.seqlen == 82
    }
    assert vanilla == {8192: pytest.approx(6893 + 9070)}
    scaled = [step.vanilla_us for step in goals.steps() if step.backward.seqlen == 256]
    assert scaled == [pytest.approx(3421 * 2400 / 768 + 13249)]


def test_verdicts() -> None:
    assert report.verdict(5.0, None) == "no target"
    assert report.verdict(6.2, 6.2) == "reached"
    assert report.verdict(4.5, 6.0) == "missed by 25 %"


def test_cases_of_the_command() -> None:
    assert kernel_report.problem("fwd:8192x82x64") == Problem("forward", 8192, 1, 82, 64)
    assert kernel_report.problem("bwd:16x8x128x40") == Problem("backward", 16, 8, 128, 40)
    with pytest.raises(Exception, match="must be like fwd:8192x82x64"):
        kernel_report.problem("fwd:82")


# ---- cubins, the report


def test_resources_of_a_cubin(tmp_path: Path) -> None:
    try:
        compiled = nvrtc.find(60).compile(sgemm.SOURCE.read_text(), "sm_60", options=("--ptxas-options=-v",))
    except nvrtc.NotFound as error:
        pytest.skip(str(error))
    file = tmp_path / "sgemm.cubin"
    file.write_bytes(compiled.image)
    said = nvrtc.resources(compiled.log)["sgemm"]
    assert cubin.kernels(file) == {"sgemm": (said.registers, said.shared_bytes)}
    assert said.spill_bytes == 0
    file.write_bytes(b"\x7fELF\x01")
    with pytest.raises(ValueError, match="must be a 64-bit ELF file"):
        cubin.kernels(file)


def test_the_report_is_that_of_this_build() -> None:
    installed = images.installed()
    kernels = tracing.Kernels(kernel_report.FOLDER)
    files = [kernels.file(element) for element in ELEMENTS]
    if not all(file.is_file() for file in files):
        pytest.skip(f"there are no cubins for sm_60: {installed.reason or 'this build has none'}")
    if installed.nvrtc != "12.9":
        pytest.skip(f"the report is that of NVRTC 12.9, this build of {installed.nvrtc}")
    noted = dict(re.findall(r"^\| `(\S+\.cubin)` \| `([0-9a-f]{64})` \|$", PAGE.read_text(), re.MULTILINE))
    assert noted == {file.name: report.digest(file) for file in files}, "if this is meant: make kernel-report"


def test_the_report_has_every_prediction() -> None:
    with PAGE.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = {(row["pass"], row["dtype"], row["seqlen"], row["feature"]) for row in rows}
    for problem in [*(p for p, _ in goals.published_problems()), *goals.feature_problems()]:
        dtype = str(problem.dtype).removeprefix("torch.")
        assert (problem.pass_, dtype, str(problem.seqlen), problem.feature) in shown
    for row in rows:
        bounds = [name for name in row if name.startswith("bound: ") and name != f"bound: {prediction.WITHOUT_PAIRS}"]
        assert 0 < float(row["tflops"]) < 1.01 * min(float(row[name]) for name in bounds if row[name])
        assert math.isclose(float(row["tflops"]) * float(row["us"]), problem_of(row).flops * 1e-6, rel_tol=0.01)


def problem_of(row: dict[str, str]) -> Problem:
    sizes = (int(row[name]) for name in ("batch", "nheads", "seqlen", "head_dim"))
    return Problem(row["pass"], *sizes, getattr(torch, row["dtype"]), row["feature"])


# ---- on real kernels; it needs nvdisasm


@pytest.fixture
def disassembler() -> None:
    try:
        nvdisasm.path()
    except nvdisasm.NotFound as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_one_problem(disassembler: None, capsys: pytest.CaptureFixture[str]) -> None:
    if not tracing.Kernels(kernel_report.FOLDER).file("float32").is_file():
        pytest.skip(f"there are no cubins for sm_60: {images.installed().reason or 'this build has none'}")
    assert kernel_report.main(["--quick", "fwd:1024x32x64"]) == 0
    first, allowed, *rest = capsys.readouterr().out.splitlines()
    rate = float(re.search(r"predicted \d+ us, ([\d.]+) TFLOP/s", first)[1])
    assert 0.5 < rate < min(map(float, re.findall(r" ([\d.]+)(?:,|$)", allowed)))
    assert [line.split(":")[0] for line in rest[:4]] == [*SENSITIVITIES]


@pytest.mark.slow
def test_masks_shared_by_heads_are_read_once(disassembler: None) -> None:
    model = prediction.Model(tracing.Kernels(kernel_report.FOLDER))
    bytes_of = {}
    for feature in ("plain", "full mask", "bias"):
        problem = Problem("forward", 64, 8, 64, 64, feature=feature)
        (launch,) = model.launches(problem)
        sectors = sum(kind.count * sum(warp.dram_sectors.sum() for warp in kind.block.warps) for kind in launch.kinds)
        bytes_of[feature] = 32 * sectors / 512
    assert bytes_of["full mask"] - bytes_of["plain"] == pytest.approx(64 * 64 / 8, rel=0.2)
    assert bytes_of["bias"] - bytes_of["plain"] < 64 * 64 * 4 / 8


@pytest.mark.slow
def test_sgemm_is_right(disassembler: None, tmp_path: Path) -> None:
    launch = sgemm.trace(tmp_path, 128, 128, 64, 56)
    executed = mix.mix(launch.program, launch.kinds[0].block.times(launch.program))
    assert executed.counts["FFMA"] == 128 * 128 * 64 // 32
    a, b = torch.randn(64, 128), torch.randn(64, 128)
    c = torch.full((128, 128), torch.nan)
    sgemm.run(tmp_path / "sgemm.cubin", a, b, c, alpha=2.0)
    torch.testing.assert_close(c, 2 * a.T @ b)
