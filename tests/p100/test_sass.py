"""The machine code of sm_60 as nvdisasm prints it, its static properties, and nvdisasm itself."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.p100.machine import nvdisasm, sass
from benchmarks.p100.static_analysis import bank_conflicts, loops, touched_bytes
from tests.support.p100_small_kernels import NAMES, small


def word(stall: int, no_yield: int, write: int, read: int, waits: int) -> int:
    return stall | no_yield << 4 | write << 5 | read << 8 | waits << 11


TEXT = f"""
.text.k:
.L_x_0:
  /* 0x{word(1, 0, 7, 7, 0) | word(0, 1, 3, 7, 0b100001) << 21 | word(15, 1, 7, 2, 0) << 42:016x} */
  /*0008*/  MOV R1, c[0x0] [0x20] ;  /* 0x4c98078000870001 */
  /*0010*/  {{  @!P3 FFMA.FTZ R0, -R4.reuse, R8, R12 ;  /* 0x5980000000000000 */
  /*0018*/  @P0 BRA CC.EQ, `(.L_x_0)  (*"BRANCH_TARGETS .L_x_1"*)  }}
  /* 0xe240000000000000 */
.L_x_1:
  /* 0x{word(2, 1, 7, 7, 0):016x} */
  /*0028*/  FFMA R0, R4, R8, R9 ;  /* 0x5980000000000000 */
  /*0030*/  SSY `(.L_x_1) ;  /* 0xe240000000000000 */
  /*0038*/  FFMA R3, R5, R1, c[0x0][0x4] ;  /* 0x5980000000000000 */

	.section	.nv.constant2.k,"a",@progbits
.nv.constant2.k:
	.align	4
  /*0000*/ 	.byte	0x00, 0x00, 0x80, 0x7f

	.section	.text.other
"""


def test_parse() -> None:
    program = sass.parse(TEXT, "k")
    assert program.name == "k" and program.constants == b"\0\0\x80\x7f"
    first, second, third, fourth, fifth, _ = program.instructions
    assert (first.pc, first.op, first.modifiers, first.operands) == (8, "MOV", (), ("R1", "c[0x0][0x20]"))
    assert (first.stall, first.yields, first.write_barrier, first.read_barrier) == (1, True, None, None)
    assert (second.op, second.modifiers, second.guard) == ("FFMA", ("FTZ",), "!P3")
    assert second.operands == ("R0", "-R4.reuse", "R8", "R12")
    assert (second.stall, second.yields, second.write_barrier, second.waits) == (0, False, 3, (0, 5))
    assert second.pairs_with_next and not first.pairs_with_next and not third.pairs_with_next
    assert (third.operands, third.guard, third.target) == (("CC.EQ",), "P0", 0)
    assert (third.stall, third.read_barrier) == (15, 2)
    assert (fourth.target, fifth.target, fifth.operands) == (None, 3, ())
    assert str(second) == "0x0010: @!P3 FFMA.FTZ R0, -R4.reuse, R8, R12"


def test_loops_and_bank_conflicts() -> None:
    program = sass.parse(TEXT, "k")
    assert loops(program) == [(0, 2)]
    # R4, R8, R12 lie in one bank; then R4 and R8 again, but R4 has been kept; R5 and R1 lie in another one.
    assert bank_conflicts(program) == [0, 2, 0, 0, 0, 1]


def test_touched_code_in_whole_cache_lines() -> None:
    program = small("flow")
    times = np.zeros(len(program.instructions), int)
    assert touched_bytes(program, times) == 0
    times[:2] = 1  # in the first line
    assert touched_bytes(program, times) == 128
    times[-1] = 7
    assert touched_bytes(program, times) == 256
    everything = touched_bytes(program, np.ones_like(times))
    assert 0 <= everything - program.instructions[-1].pc < 128


def test_inner_loops_come_first() -> None:
    program = small("flow")
    found = loops(program)
    assert len(found) >= 2
    assert [b - a for a, b in found] == sorted(b - a for a, b in found)
    assert all(program.instructions[b].target == a < b for a, b in found)


@pytest.mark.parametrize("kernel", NAMES)
def test_only_the_first_of_a_pair_does_not_stall(kernel: str) -> None:
    instructions = [i for i in small(kernel).instructions if i.op != "NOP"]
    for instruction in instructions:
        assert instruction.pairs_with_next == (instruction.stall == 0), instruction


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace(".text.k:", ".text.l:"), "'k' is not in this text"),
        (TEXT.replace("MOV R1", "mov R1"), "not an instruction: .*mov R1"),
        (TEXT.replace("/* 0x4c98078000870001 */", ""), "6 instructions, but 7 encodings"),
    ],
)
def test_text_that_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sass.parse(text, "k")


# ---- the disassembler


def test_nvdisasm_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_NVDISASM", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="FASTATTN_NVDISASM: must be a file, got '.*missing'"):
        nvdisasm.path()
    (tmp_path / "missing").touch()
    assert nvdisasm.path() == tmp_path / "missing"


def test_nvdisasm_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "triton-3.3.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(nvdisasm.MEMBER, "a program")
        file.writestr("triton-3.3.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: triton\nVersion: 3.3.1\n")
        file.writestr("triton-3.3.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.delenv("FASTATTN_NVDISASM", raising=False)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(nvdisasm, "WHEEL", str(wheel))
    program = nvdisasm.path()
    assert program.read_text() == "a program" and os.access(program, os.X_OK)
    wheel.unlink()
    assert nvdisasm.path() == program
    program.unlink()
    with pytest.raises(nvdisasm.NotFound, match="set FASTATTN_NVDISASM"):
        nvdisasm.path()
    assert [*(tmp_path / "cache").iterdir()] == []
