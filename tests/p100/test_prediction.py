"""From a pass to its predicted time on a P100: traces, blocks that stand for others, bounds, extrapolation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.p100 import chip, mix
from benchmarks.p100.machine import cubin, nvdisasm
from benchmarks.p100.machine.sass import Instruction, Program
from benchmarks.p100.machine.trace import BlockTrace, WarpTrace
from fastattn.cuda_kernels import nvrtc
from tests.support.p100_programs import CONFLICT, FREE, LDG, LDS, MINIMUM, MUFU, make, stream

pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built", exc_type=ImportError)

from benchmarks.p100 import prediction, sgemm, tracing
from benchmarks.p100.passes import Pass
from benchmarks.p100.tracing import Block, BlockKind, Cubins, Occupancy, TracedLaunch

CUBINS = Cubins(tracing.INSTALLED)


# ---- traces


def test_block_lays_misses_beside_the_accesses() -> None:
    sectors = np.array([0, 2, 0, 3, 2], np.int16)
    trace = WarpTrace(np.arange(5), np.full(5, 32), np.zeros(5, int), sectors)
    reads = [("k", False, np.array([10, 11])), ("q", False, np.array([20])), ("k", False, np.array([11, 12]))]
    accesses = [*reads, ("out", True, np.array([30, 31]))]
    alone = tracing.block_of(BlockTrace([trace], accesses, {}, {}), 100, {"q": 1.0, "k": 1.0, "out": 1.0})
    assert alone.warps[0].dram_sectors.tolist() == [0, 2, 0, 2, 2]  # 11 is there already
    shared = tracing.block_of(BlockTrace([trace], accesses, {}, {}), 100, {"q": 1.0, "k": 3.0, "out": 9.0})
    assert shared.warps[0].dram_sectors.sum() == 1 + 1 + 2  # 3 sectors of k for three blocks; writes are nobody else's


def test_a_block_that_adds_to_what_it_wrote_waits_longer_for_dram() -> None:
    def latency(read: str, written: str, sector: int) -> int:
        trace = BlockTrace([], [], {read: np.array([3, 7])}, {written: np.array([sector])})
        return tracing.block_of(trace, 100, {}).dram_latency

    assert latency("dq", "dq", 7) == chip.SUMMING_DRAM_LATENCY > chip.DRAM_LATENCY
    assert latency("dq", "dq", 8) == latency("q", "dq", 7) == latency("local", "local", 7) == chip.DRAM_LATENCY


def test_the_latency_is_that_of_the_block() -> None:
    def cycles(latency: int) -> float:
        one = launch([([LDG, make("FFMA", "R0", "R0", "R1", "R2", waits=(0,))], 1)])
        warps = tuple(warp._replace(dram_sectors=warp.sectors) for warp in one.kinds[0].block.warps)
        waiting = replace(one, kinds=(BlockKind(Block(warps, latency), 1),))
        return prediction.Predictor(CUBINS, chip.SXM2).cycles(waiting)

    assert cycles(800) - cycles(450) == 350


def test_tiles_stand_for_all() -> None:
    assert tracing._tiles(1, 1, is_causal=False, is_ragged=True) == [(0, 1)]
    assert tracing._tiles(8, 3, is_causal=False, is_ragged=True) == [(0, 7), (2, 1)]
    assert tracing._tiles(8, 3, is_causal=False, is_ragged=False) == [(0, 8)]
    assert tracing._tiles(3, 3, is_causal=True, is_ragged=True) == [(0, 1), (1, 1), (2, 1)]
    assert tracing._tiles(16, 16, is_causal=True, is_ragged=False) == [(2, 4), (6, 4), (10, 4), (14, 4)]


def test_how_many_read_the_same_mask() -> None:
    for shape, served in {(1, 1): 96, (12, 1): 8, (1, 8): 12, (12, 8): 1}.items():
        assert tracing._readers(torch.empty(*shape, 2, 2), nheads=8, running=96) == served


def launch(kinds: list[tuple[list[Instruction], int]], resident: int = 2) -> TracedLaunch:
    """A launch of blocks of two warps; the instructions of all kinds form one program."""
    program, made = [], []
    for instructions, count in kinds:
        one = stream(instructions)
        one = one._replace(positions=one.positions + len(program))
        program += instructions
        made.append(BlockKind(Block((one, one)), count))
    return TracedLaunch("k", "float32", Program("k", tuple(program), b""), Occupancy(64, 32, 0, resident), tuple(made))


def test_fullest_multiprocessor() -> None:
    two = launch([([FREE], 112), ([MUFU], 50)])
    first, second = (kind.block for kind in two.kinds)
    assert two.blocks == 162
    assert two.on_fullest(56) == [first, first, second]


def test_many_blocks_take_as_long_as_when_all_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "BLOCK_STAGGER", 40)
    many = launch([([FREE] * 300, 56 * 30), ([CONFLICT] * 300, 56 * 10)])
    model = prediction.Predictor(CUBINS)
    exact = model.cycles(many)
    monkeypatch.setattr(prediction, "REPLAY_LIMIT", 10_000)
    extrapolated = prediction.Predictor(CUBINS).cycles(many)
    assert extrapolated == pytest.approx(exact, rel=0.03)


def test_many_blocks_of_one_kind_are_extrapolated_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = launch([([make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 100, 56 * 40)])
    monkeypatch.setattr(chip, "BLOCK_STAGGER", 40)
    waves = 20 * 600 + 19 * chip.BLOCK_LAUNCH + chip.BLOCK_STAGGER
    assert prediction.Predictor(CUBINS).cycles(alike) == waves
    monkeypatch.setattr(prediction, "REPLAY_LIMIT", 2000)
    assert prediction.Predictor(CUBINS).cycles(alike) == waves


def test_the_last_blocks_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "BLOCK_STAGGER", 40)
    monkeypatch.setattr(prediction, "REPLAY_LIMIT", 2000)
    chain = [make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 100
    even, odd = (prediction.Predictor(CUBINS).cycles(launch([(chain, 56 * n)])) for n in (40, 41))
    assert odd - even == 600  # as long as two of them
    few = launch([(chain, 56 * 3)])
    assert prediction.Predictor(CUBINS).cycles(few) == 600 + chip.BLOCK_LAUNCH + 600


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


def test_long_sequences_are_extrapolated() -> None:
    backward, forward = Pass("backward", 1, 1, 1000, 64), Pass("forward", 1, 1, 1000, 64)
    assert prediction.lengths_replayed(backward) == [168, 232, 296]  # as ragged as 1000
    assert prediction.lengths_replayed(forward) == [296, 552]
    assert prediction.lengths_replayed(backward._replace(seqlen=319)) == [319]
    assert prediction.lengths_replayed(forward._replace(seqlen=575)) == [575]

    def quantities(n: int) -> dict[str, float]:
        busy = 3.0 * n * n + 70 * n + 900
        return {prediction.ISSUE: busy, "DRAM": 5.0 * n, "time": busy / (0.9 - 20 / n)}

    lengths = prediction.lengths_replayed(backward)
    extrapolated = prediction._extrapolated(lengths, [quantities(n) for n in lengths], 1000)
    assert extrapolated == pytest.approx(quantities(1000))


# ---- cubins


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


# ---- on real kernels; it needs nvdisasm


@pytest.fixture
def disassembler() -> None:
    try:
        nvdisasm.path()
    except nvdisasm.NotFound as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_masks_shared_by_heads_are_read_once(disassembler: None) -> None:
    model = prediction.Predictor(CUBINS)
    bytes_of = {}
    for feature in ("plain", "full mask", "bias"):
        pass_ = Pass("forward", 64, 8, 64, 64, feature=feature)
        (launch,) = model.launches(pass_)
        sectors = sum(kind.blocks * sum(warp.dram_sectors.sum() for warp in kind.block.warps) for kind in launch.kinds)
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
