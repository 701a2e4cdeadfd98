"""The cycle model of a multiprocessor of the P100, on programs whose time is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.p100 import chip, l2_cache, mix
from benchmarks.p100.machine.sass import Instruction, Program
from benchmarks.p100.pipeline import SENSITIVITIES, USUAL, Bandwidth, ChipAssumptions, Encoder, Multiprocessor
from tests.support.p100_programs import CONFLICT, FREE, LDG, LDS, MINIMUM, MUFU, make, stream


def multiprocessor(
    warps: list[list[Instruction]],
    blocks: int = 1,
    resident: int = 1,
    assumptions: ChipAssumptions = USUAL,
    **accesses: int,
) -> Multiprocessor:
    """A multiprocessor with so many blocks of these warps to run."""
    issued = []
    for instructions in warps:
        encoder = Encoder(Program("k", tuple(instructions), b""), Bandwidth.of(chip.SXM2, 56, assumptions), assumptions)
        issued.append(encoder.for_schedulers(stream(instructions, **accesses)))
    return Multiprocessor([issued] * blocks, resident, assumptions)


def replay(warps: list[list[Instruction]], *how: Any, **more: Any) -> float:
    """The cycles that these warps take."""
    return multiprocessor(warps, *how, **more).run()[-1]


# ---- the pipeline


@pytest.mark.parametrize(
    ("instruction", "cycles"),
    [(FREE, 1 / 2), (CONFLICT, 1), (MINIMUM, 1), (MUFU, 2), (LDS, 3)],
    ids=["peak", "bank conflict", "half rate", "special functions", "shared memory"],
)
def test_rates_of_many_warps(instruction: Instruction, cycles: float) -> None:
    n, warps = 256, 8
    assert replay([[instruction] * n] * warps, smem_cycles=3) == pytest.approx(n * warps * cycles, rel=0.03)


def test_conversions_from_float16_are_not_the_lanes() -> None:
    def rate(modifiers: tuple[str, ...]) -> float:
        add = replace(make("HADD2", "R0", "R1", "R5"), modifiers=modifiers)
        return replay([[FREE, add] * 128] * 8) / (8 * 128)

    assert rate(()) == pytest.approx(3 / 2, rel=0.03)  # with its bank conflict
    assert rate(("F32",)) == pytest.approx(1, rel=0.03)  # an issue slot each


def test_a_chain_takes_its_latency() -> None:
    assert replay([[make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 100]) == 600


def test_one_warp_does_not_fill_a_scheduler_nor_two_warps_two() -> None:
    chain = [make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 120
    assert replay([chain] * 2) == 720
    assert replay([chain] * 12) == pytest.approx(720, rel=0.02)
    assert replay([chain] * 24) == pytest.approx(1440, rel=0.02)


def test_pairs_are_issued_together_if_their_units_are_free() -> None:
    first, second = make("FFMA", "R0", "R1", "R2", "R3", stall=0, pairs_with_next=True), LDS
    warps = [[first, second] * 100] * 8
    assert replay(warps) == pytest.approx(800, rel=0.1)  # shared memory takes one access per cycle
    alone = [[first, make("NOP")] * 100] * 8
    assert replay(alone) == pytest.approx(400, rel=0.02)
    assert replay(alone, assumptions=ChipAssumptions(dual_issue=False)) == pytest.approx(800, rel=0.02)


def test_a_result_is_waited_for() -> None:
    warp = [make("LDS", "R0", "[R1]", write_barrier=3), make("FFMA", "R0", "R0", "R1", "R2", waits=(3,))]
    assert replay([warp], smem_cycles=2) == 2 + chip.TIMINGS["LDS"].latency + 1
    other = [warp[0], make("FFMA", "R0", "R0", "R1", "R2", waits=(2,))]
    assert replay([other], smem_cycles=2) == 2
    pair = [make("FFMA", "R0", "R1", "R2", "R3", stall=0, pairs_with_next=True), make("NOP", waits=(3,))]
    assert replay([[warp[0], *pair]], smem_cycles=2) == 2 + chip.TIMINGS["LDS"].latency + 1


def test_idle_cycles_are_those_before_an_instruction() -> None:
    waiting = multiprocessor(
        [[make("LDS", "R0", "[R1]", write_barrier=0), FREE, make("FFMA", "R0", "R0", "R1", "R2", waits=(0,))]]
    )
    cycles = waiting.run()[-1]
    assert waiting.idle == {2: cycles - 3}


def test_depbar_leaves_some_outstanding() -> None:
    loads = [make("LDG", "R0", "[R2]", write_barrier=1)] * 3
    times = [replay([[*loads, make("DEPBAR", "SB1", hex(n)), FREE]], sectors=4, dram=0) for n in (0, 1, 2, 3)]
    assert times[0] > times[1] > times[2] > times[3] == 5


def test_a_barrier_waits_for_the_slowest_warp() -> None:
    slow = [make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 50
    barrier = make("BAR", "0x0")
    assert replay([[barrier, FREE], [*slow, barrier, FREE]]) == 300 + 1 + chip.BARRIER_LATENCY + 1
    assert replay([[barrier, FREE], slow]) == 300 + chip.BARRIER_LATENCY + 1  # a warp that has ended is not waited for


@pytest.mark.parametrize("assumptions", [USUAL, SENSITIVITIES["in step"], SENSITIVITIES["half of DRAM"]])
def test_a_stream_gets_the_bandwidth(assumptions: ChipAssumptions) -> None:
    loads, warps, blocks = 64, 8, 8
    warp = [*[LDG] * loads, make("FFMA", "R0", "R0", "R1", "R2", waits=(0,))]
    cycles = replay([warp] * warps, blocks=blocks, resident=4, assumptions=assumptions, sectors=16, dram=16)
    per_cycle = 0.78 * 732 / 56 / 1.48 * assumptions.dram_rate
    moved = 32 * 16 * loads * warps * blocks
    assert moved / per_cycle < cycles < 1.05 * moved / per_cycle


def test_a_burst_is_served_at_once_unless_all_are_in_step() -> None:
    work = [make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 500
    load = [*[LDG] * 8, make("FFMA", "R0", "R0", "R1", "R2", waits=(0,))]
    usual, in_step = (replay([[*work, *load]], assumptions=a) for a in (USUAL, SENSITIVITIES["in step"]))
    assert usual == 3000 + 8 + chip.DRAM_LATENCY + 1
    assert in_step == pytest.approx(3000 + 8 * 128 / (0.78 * 732 / 56 / 1.48) + chip.DRAM_LATENCY, abs=2)


def test_blocks_take_turns() -> None:
    block = [[make("FFMA", "R0", "R0", "R1", "R2", stall=6)] * 100] * 2
    assert replay(block, blocks=3, resident=1) == 3 * 600 + 2 * chip.BLOCK_LAUNCH
    assert replay(block, blocks=3, resident=3) == 600 + 2 * chip.BLOCK_STAGGER


def test_no_assumption_makes_it_slower_than_without_it() -> None:
    pair = [make("FFMA", "R0", "R1", "R2", "R3", stall=0, pairs_with_next=True), make("NOP")]
    turn = [LDG, *[*pair, *pair, *pair, CONFLICT] * 20, make("FFMA", "R0", "R0", "R1", "R2", waits=(0,))]
    times = {name: replay([turn * 4] * 24, assumptions=a) for name, a in {"usual": USUAL, **SENSITIVITIES}.items()}
    usual = times.pop("usual")
    assert times.pop("no register conflicts") < usual
    assert all(time >= 0.99 * usual for time in times.values()), times
    assert times["no pairs"] > 1.1 * usual


# ---- the card, the cache


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "blocks"),
    [
        (256, 32, 0, 8),  # 64 warps
        (32, 16, 0, 32),  # 32 blocks
        (64, 184, 0, 5),  # 10 warps of 5888 registers
        (128, 255, 0, 2),
        (64, 32, 20480, 3),
        (128, 32, 32768, 2),
        (128, 32, 32769, 1),
        (32, 16, 13107, 4),  # five but for the units
        (256, 125, 16384, 2),
    ],
)
def test_resident_blocks(threads: int, registers: int, smem: int, blocks: int) -> None:
    assert chip.resident_blocks(threads, registers, smem) == blocks


def test_peaks_are_those_of_the_data_sheets() -> None:
    peaks = {name: round(card.peak_flops * 1e-12, 1) for name, card in chip.CARDS.items()}
    assert peaks == {"sxm2": 10.6, "pcie": 9.3, "quadro": 10.3}


def test_cache_evicts_what_was_used_least_recently() -> None:
    share = l2_cache.CacheShare(2)
    assert share.read([1, 2]) == [1, 2]
    assert share.read([1]) == []
    assert share.read([3]) == [3]  # 2 was evicted
    assert share.read([1, 2]) == [2]


def test_cache_writes_a_sector_once_while_it_stays() -> None:
    share = l2_cache.CacheShare(2)
    assert share.write([1, 1]) == [1]
    assert share.read([1]) == []
    assert share.write([1]) == []
    share.read([2, 3])
    assert share.write([1]) == [1]


def test_mix_and_main_loops() -> None:
    loop = [FREE, CONFLICT] * 32
    program = Program("k", (make("IADD"), *loop, make("BRA", target=1), MUFU), b"")
    ((name, turn),) = mix.main_loops(program).items()
    assert name == "0x0 ... 0x0"
    assert turn.counts["FFMA"] == 64 and turn.conflicts == 32 and turn.total == 65
    assert turn.conflicts_per_256 == 128
    whole = mix.mix(program, np.array([1, *[10] * 65, 2]))
    assert (whole.counts["integer"], whole.counts["FFMA"], whole.counts["MUFU"], whole.counts["other"]) == (
        1,
        640,
        2,
        10,
    )
    assert mix.row("x", whole)[-1] == f"{640 / 653:.2f}"
