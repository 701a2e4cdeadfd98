"""The model of V100, T4 and A100: parsing, the way of a warp, the replay, and the committed page."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from benchmarks.p100.machine.sass import Instruction, Program
from tests.support.p100_programs import make

pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built", exc_type=ImportError)

from benchmarks.p100.machine import nvdisasm
from benchmarks.volta import chips, prediction, public_kernels, replay, report, sass, walk
from benchmarks.volta.walk import Tile
from fastattn.cuda_kernels import images, nvrtc

TABLE = report.read(report.PAGE.with_suffix(".csv"))
TILE = Tile(16, 16, 16, 1)  # a product is 4096 multiply-adds: 128 FFMA, 4 HMMA.1688
FFMA = make("FFMA", "R0", "R0", "R1", "R2")
HMMA = dataclasses.replace(make("HMMA", "R0", "R1", "R2", "R0"), modifiers=("1688", "F32"))
EXIT = make("EXIT")


def branch(to: int, guard: str | None = "P0") -> Instruction:
    return dataclasses.replace(make("BRA"), target=to, guard=guard)


def program(*instructions: Instruction) -> Program:
    return Program("kernel", instructions, b"")


# ---- parsing

TEXT = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
                                                            /* 0x000fe40000000f00 */
.L_x_0:
        /*0010*/              @!P0 LDG.E.128.SYS R4, [R2] ; /* 0x0000000002047381 */
                                                            /* 0x000ea200001eed00 */
        /*0020*/               @P1 BRA `(.L_x_0) ;          /* 0xfffffff000001947 */
                                                            /* 0x004fea000383ffff */
\t.section\t.text.other,"ax",@progbits
.text.other:
"""


def test_control_bits_are_parsed() -> None:
    move, load, back = sass.parse(TEXT, "kernel").instructions
    assert (move.op, move.operands, move.stall, move.write_barrier) == ("MOV", ("R1", "c[0x0][0x28]"), 2, None)
    assert (load.guard, load.modifiers, load.write_barrier, load.waits) == ("!P0", ("E", "128", "SYS"), 2, ())
    assert (back.guard, back.target, back.waits, back.stall) == ("P1", 1, (2,), 5)
    with pytest.raises(ValueError, match="other: 0 instructions"):
        sass.parse(TEXT, "other")


# ---- the way of a warp


def test_loops_are_turned_as_the_products_need_it() -> None:
    scores, values = [FFMA] * 64, [FFMA] * 32
    code = [make("MOV"), *scores, branch(1), make("MUFU"), *values, branch(67), branch(1), branch(0), EXIT]
    way = walk.stream(program(*code), TILE, tiles=3)
    assert sum(code[n].op == "FFMA" for n in way) == 3 * 256
    assert sum(code[n].op == "MUFU" for n in way) == 3 and way.count(0) == 1 and way[-1] == len(code) - 1


def test_values_may_come_in_several_loops() -> None:
    code = [*[FFMA] * 64, branch(0), *[FFMA] * 16, branch(65), *[FFMA] * 16, branch(82), branch(0), EXIT]
    way = walk.stream(program(*code), TILE, tiles=2)
    assert sum(code[n].op == "FFMA" for n in way) == 2 * 256


def test_unrolled_products_of_tensor_cores() -> None:
    code = [*[HMMA] * 8, branch(0), EXIT]
    assert sum(code[n].op == "HMMA" for n in walk.stream(program(*code), TILE, tiles=5)) == 40


def test_another_number_of_products_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel: 8192 multiply-adds of HMMA on the way, 16384 in 2 tiles"):
        walk._checked(program(*[HMMA] * 8, EXIT), TILE, 2, [*range(8)], "HMMA")
    with pytest.raises(ValueError, match="no loop over tiles"):
        walk.stream(program(HMMA, EXIT), TILE, tiles=2)


def test_branches() -> None:
    select, load = make("FSEL"), make("LDG")
    code = [branch(9), *[select] * 8, EXIT]
    assert walk._is_taken(code, 0, 9, "FFMA", is_first=True)  # what only partial tiles need
    assert not walk._is_taken([branch(9), *[select] * 7, FFMA, EXIT], 0, 9, "FFMA", is_first=True)
    either = [branch(4), load, load, branch(5, guard=None), load, EXIT]
    assert [walk._is_taken(either, 0, 4, "FFMA", first) for first in (True, False)] == [False, True]
    assert walk._is_taken([branch(3), load, branch(4, None), FFMA, EXIT], 0, 3, "FFMA", is_first=True)
    assert walk._is_taken([branch(1, guard=None)], 0, 1, "FFMA", is_first=True)


# ---- the replay


def cycles(instructions: list[Instruction], card: chips.Card = chips.V100, warps: int = 8) -> float:
    ops = [replay.encode(instruction, card) for instruction in instructions]
    return replay.Multiprocessor(ops, warps, resident=1).run(1)[-1]


@pytest.mark.parametrize(
    ("instruction", "per_partition"),
    [(FFMA, 2), (make("MUFU"), 8), (HMMA, 8), (make("LOP3"), 2), (make("LDS"), 4 * 1), (make("SHFL"), 4 * 2)],
    ids=["lanes", "special", "tensor cores", "integer", "shared memory", "shuffles"],
)
def test_rates_of_many_warps(instruction: Instruction, per_partition: int) -> None:
    n, warps = 200, 16
    assert cycles([instruction] * n, chips.T4, warps) == pytest.approx(n * warps / 4 * per_partition, rel=0.03)


def test_a_warp_waits_for_its_scoreboard() -> None:
    load = dataclasses.replace(make("LDG"), write_barrier=1)
    wait = dataclasses.replace(FFMA, waits=(1,))
    assert cycles([load, wait], warps=1) - cycles([load, FFMA], warps=1) >= chips.GLOBAL_LATENCY


def test_a_barrier_waits_for_all_warps() -> None:
    assert cycles([make("BAR"), EXIT], warps=4) >= chips.BARRIER_LATENCY


def test_blocks_take_turns() -> None:
    ops = [replay.encode(FFMA, chips.V100)] * 100
    one, two = (replay.Multiprocessor(ops, 4, resident=1).run(blocks) for blocks in (1, 2))
    assert len(two) == 2 and two[1] == pytest.approx(2 * one[0] + chips.BLOCK_LAUNCH, abs=4)


def test_residency() -> None:
    assert chips.V100.resident_blocks(128, 168, 0) == 3
    assert chips.T4.resident_blocks(128, 32, 0) == 8  # 32 warps
    assert chips.A100.resident_blocks(128, 32, 60 << 10) == 2


def test_dram_bounds_a_prediction() -> None:
    code = [*[HMMA] * 8, branch(0), EXIT]
    kernel = prediction.Kernel(program(*code), TILE, 32, 0, 2)
    narrow = chips.T4._replace(dram_bytes_per_s=1e9)
    pass_ = prediction.Forward(64, 32, 16)
    wanted = 1e6 * (4 * 64 * 32 * 16 * 2 / 0.8e9 + chips.LAUNCH_SECONDS)
    assert prediction.microseconds(kernel, pass_, narrow) == pytest.approx(wanted)
    assert prediction.microseconds(kernel, pass_, chips.T4) < wanted / 2


# ---- the committed page


def test_every_published_row_is_predicted() -> None:
    with report.PUBLISHED.open() as lines:
        wanted = [[cells[name] for name in cells if name != "head_dim"] for cells in csv.DictReader(lines)]
    rows = [row for row in TABLE if row.published_us is not None]
    found = [(*row[1:5], row.published_us, "yes" if row.is_host_time else "no") for row in rows]
    assert [[*map(str, row)] for row in found] == wanted


def test_the_calibration_is_as_near_as_it_should_be() -> None:
    for band in report.bands(TABLE).values():
        assert 0.75 < band.low < 0.85 < band.centre < band.high < 1.05


def test_the_page_is_that_of_its_table(tmp_path: Path) -> None:
    assert report.PAGE.read_text() == report.text(TABLE)
    report.write(TABLE, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == report.PAGE.with_suffix(".csv").read_text()


def test_the_t4_is_compared_with_a_prediction() -> None:
    of_t4 = [line for line in report.text(TABLE).splitlines() if line.startswith("| T4 | float16")]
    assert len(of_t4) == len(report.SHAPES) and all("predicted" in line for line in of_t4)


# ---- machine code


@pytest.mark.slow
@pytest.mark.parametrize("card", chips.CARDS.values(), ids=chips.CARDS.keys())
def test_machine_code_is_predicted_as_the_table_says(card: chips.Card) -> None:
    pass_ = prediction.Forward(1024, 128, 64)
    try:
        public = public_kernels.kernel(card, "float16")
        compiler = report.Compiler(nvrtc.find(card.arch), images.HERE.csrc)
    except (nvdisasm.NotFound, nvrtc.NotFound) as error:
        pytest.skip(f"cannot be predicted here: {error}")
    for name, code in ((report.PUBLIC, public), (report.OURS, compiler.kernel(pass_, card, "float16"))):
        known = [row for row in TABLE if row[:5] == (name, card.name, "float16", 1024, 128)]
        got = report.predicted(name, code, card, "float16", pass_)
        assert got.predicted_us == pytest.approx(known[0].predicted_us, abs=0.06)
