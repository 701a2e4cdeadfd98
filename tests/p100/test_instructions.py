"""Instructions of sm_60, one or two at a time, and the flow of control, step by step."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest
import torch

from benchmarks.p100.machine.execute import ExecutionError, Index, execute
from benchmarks.p100.machine.instructions import step_of
from benchmarks.p100.machine.state import State
from benchmarks.p100.machine.trace import WarpTrace
from tests.support.p100_small_kernels import assembled


def bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


NAN, TINY = bits(math.nan), 1
# Code, what R0, R1 and R2 hold before it, and what R8 and R9 hold behind it.
CODE = [
    ("IADD3 R8.CC, R0, R1, R2\nIADD3.X R9, RZ, RZ, RZ", (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFD, 2)),
    ("IADD R8.CC, R0, -R1\nIADD.X R9, R2, -RZ", (0, 1, 5), (0xFFFFFFFF, 4)),
    ("IADD3.RS R8, R0, R1, R2", (0xFFFF0000, 0x00030000, 7), (0x10002 + 7, 0)),
    ("IADD3 R8, R0, 0xffffe, R1\nIADD3 R9, R0, 0x7ffff, R1", (3, 4, 0), (5, 0x80006)),
    ("IADD R8, R0, -0x80", (0x7F, 0, 0), (0xFFFFFFFF, 0)),
    ("ISCADD R8, R0, R1, 0x4", (0x12345678, 3, 0), (0x23456783, 0)),
    ("ISCADD R8, -R0, R1, 0x4", (2, 33, 0), (1, 0)),
    ("LEA R8.CC, R0, R1\nLEA.HI.X P0, R9, R0, RZ, R2", (0xFFFFFFFF, 2, 5), (1, 6)),
    ("LEA R8.CC, R0, R1, 0x2\nLEA.HI.X R9, R0, RZ, R2, 0x2", (0xC0000001, 0xFFFFFFFC, 5), (0, 0x17 + 1)),
    ("LEA.HI R8, R0, R1, R2, 0x4", (0xF0000000, 1, 2), (0x2F + 1, 0)),
    ("XMAD.MRG R8, R0.H1, R1, R2", (0x20003, 0x70005, 1), (0x5000B, 0)),
    ("XMAD.PSL.CLO R8, R0, R1, R2", (3, 5, 0x70001), (0xF0001, 0)),
    ("XMAD.S16.U16 R8, R0, R1, R2", (0xFFFF, 0xFFFF, 0), (0xFFFF0001, 0)),
    ("SHL R8, R0, R1\nSHR R9, R0, R1", (0x80000001, 32, 0), (0, 0xFFFFFFFF)),
    ("SHL.W R8, R0, R1\nSHR.U32.W R9, R0, R1", (0x80000001, 33, 0), (2, 0x40000000)),
    ("SHF.R.HI R8, R0, R1, R2\nSHF.R.U64 R9, R0, 0x20, R2", (0x11, 4, 0x22), (2, 0x22)),
    ("LOP3.LUT R8, R0, R1, R2, 0xe4", (0xF0, 0xCC, 0xAA), (0xE4, 0)),
    ("LOP.PASS_B R8, RZ, ~R0\nLOP.AND.NZ P0, R9, R0, 0x6", (3, 0, 0), (0xFFFFFFFC, 2)),
    ("BFE R8, R0, 0x404\nBFE.U32 R9, R0, 0x404", (0xF8F, 0, 0), (0xFFFFFFF8, 8)),
    ("BFI R8, R0, 0x804, R1", (0x1AB, 0xFFFFFFFF, 0), (0xFFFFFABF, 0)),
    ("IMNMX.XHI R9.CC, R1, RZ, PT\nIMNMX.U32.XLO R8, R0, R2, PT", (5, 0, 0xFFFFFFFF), (5, 0)),
    ("IMNMX.XHI R9.CC, R1, RZ, !PT\nIMNMX.U32.XLO R8, R0, R2, !PT", (5, 0xFFFFFFFF, 3), (3, 0)),
    ("ICMP.LT R8, R0, R1, R2\nICMP.GT.U32 R9, R0, R1, R2", (5, 6, 0xFFFFFFFF), (5, 5)),
    ("FCMP.GEU R8, R0, R1, R2", (5, 6, NAN), (5, 0)),
    ("FSET.BF.GE.AND R8, R0, R1, PT\nFSET.GEU.AND R9, R0, R1, PT", (NAN, 0, 0), (0, 0xFFFFFFFF)),
    (
        "FSETP.LT.OR P0, P1, R0, R1, !PT\nPSET.AND.AND R8, P0, PT, PT\nPSET.AND.AND R9, P1, PT, PT",
        (0, bits(1), 0),
        (2**32 - 1, 0),
    ),
    ("ISETP.LT.AND P0, P1, R0, RZ, P6\nSEL R8, R1, R2, P0\nSEL R9, R1, R2, P1", (0xFFFFFFFF, 3, 4), (4, 4)),
    ("PSETP.XOR.OR P0, PT, PT, PT, !PT\nSEL R8, R0, R1, P0", (1, 2, 0), (2, 0)),
    (
        "ISETP.GT.AND P0, P1, R0, RZ, PT\nPSETP.AND.AND P2, P3, P0, PT, PT\n"
        "P2R R8, PR, RZ, 0x3\nR2P PR, R1, 0x6\nP2R R9, PR, RZ, 0x7f",
        (7, 0xFA, 0),
        (1, 3),
    ),
    (
        "ISETP.GT.AND P0, P1, R0, RZ, PT\nP2R R8, PR, R1, 0x3\nP2R R9, PR, R2, 0xf",
        (7, 0xF6, 0xFFFFFFFF),
        (0xF5, 0xFFFFFFF1),
    ),
    ("R2P PR, R1.B1, 0x7f\nP2R R8, PR, RZ, 0x7f", (0, 0x3A56, 0), (0x3A, 0)),
    (
        "IADD3 RZ.CC, R0, R0, R0\nP2R R3, CC, RZ, 0xf\nIADD RZ.CC, RZ, RZ\nR2P CC, R3, 0xf\nIADD3.X R8, RZ, RZ, RZ",
        (0xFFFFFFFF, 0, 0),
        (2, 0),
    ),
    ("FADD.FTZ R8, R0, RZ\nFADD R9, R0, RZ", (TINY, 0, 0), (0, TINY)),
    ("FMUL R8, -|R0|, R1\nFMUL32I R9, R0, 0.5", (bits(-2.0), bits(3.0), 0), (bits(-6.0), bits(-1.0))),
    ("FFMA.RP R8, R0, R0, RZ\nFFMA.RM R9, R0, R0, RZ", (bits(1.0000001), 0, 0), (bits(1.0000003), bits(1.0000002))),
    ("FFMA R8, R0, R0, R1", (bits(1 + 2.0**-12), bits(-1 - 2.0**-11), 0), (bits(2.0**-24), 0)),
    ("FMNMX R8, R0, R1, PT\nFMNMX R9, R0, R1, !PT", (NAN, bits(1.0), 0), (bits(1.0), bits(1.0))),
    ("FADD R8, R0, +INF \nFADD R9, R0, -INF ", (0, 0, 0), (bits(math.inf), bits(-math.inf))),
    ("MUFU.RSQ R8, R0\nMUFU.EX2 R9, R1", (bits(0.25), bits(-127.0), 0), (bits(2.0), 0)),
    ("F2I.S32.F32.TRUNC R8, R0\nF2I.U32.F32.FLOOR R9, R0", (bits(-1.5), 0, 0), (0xFFFFFFFF, 0)),
    ("I2F.F32.U32.RP R8, R0\nI2F.F32.U32.RM R9, R0", (0xFFFFFFFF, 0, 0), (bits(2.0**32), bits(2.0**32 - 256))),
    ("F2F.F16.F32 R8, R0\nHADD2.F32 R9, -R1.H1_H1, R1.H0_H0", (bits(1.5), 0x3C004000, 0), (0x3E00, bits(1.0))),
    ("I2I.S16.S8 R8, R0\nI2I.S16.S8 R9, R1", (0x17F, 0x80, 0), (0x7F, 0xFF80)),
    ("I2I.S32.S32 R8, |R0|\nMOV R9, -R0", (0xFFFFFFFB, 0, 0), (5, 5)),
]


@pytest.mark.parametrize(("code", "before", "behind"), CODE, ids=[code.replace("\n", "; ") for code, *_ in CODE])
def test_instruction(code: str, before: tuple[int, ...], behind: tuple[int, ...]) -> None:
    state = State(32, {}, {})
    state.registers[:3] = np.array(before, np.uint32)[:, None]
    with np.errstate(all="ignore"):
        for instruction in assembled(code).instructions:
            step_of(instruction, state)(np.array([3, 5]))
    assert [hex(x) for x in state.registers[8:10, 3]] == [hex(x) for x in behind]
    assert (state.registers[8:10, 5] == behind).all() and not state.registers[8:10, 4].any(), "other lanes"
    assert not state.registers[255].any() and state.predicates[7].all()


def test_votes() -> None:
    state = State(64, {}, {})
    state.predicates[0] = np.arange(64) % 4 == 0
    active = np.flatnonzero(np.arange(64) % 2 == 0)
    for n, mode in enumerate(("ALL", "ANY", "EQ")):
        (vote,) = assembled(f"VOTE.{mode} R{n}, P{n + 1}, P0").instructions[:1]
        step_of(vote, state)(active)
    assert (state.registers[:3, active] == 0x11111111).all()
    assert [bool(row[active].all()) for row in state.predicates[1:4]] == [False, True, False]
    state.predicates[0] = np.arange(64) < 32
    for n, mode in enumerate(("ALL", "ANY", "EQ")):
        (vote,) = assembled(f"VOTE.{mode} R{n}, P{n + 1}, P0").instructions[:1]
        step_of(vote, state)(active)
    assert state.predicates[1:4, [0, 32]].tolist() == [[True, False], [True, False], [True, True]]


def test_loads_of_constants() -> None:
    state = State(32, {0: bytes.fromhex("0102030405060708f9")}, {})
    for instruction in assembled("LDC R0, c[0x0][0x4]\nLDC.U8 R1, c[0x0][0x8]").instructions:
        step_of(instruction, state)(slice(None))
    assert (state.registers[0] == 0x08070605).all() and (state.registers[1] == 0xF9).all()
    for outside in ("LDC R0, c[0x0][0x8]", "LDC.U8 R0, c[0x0][0x9]", "LDC R0, [R1]", "I2I.S16.S32 R0, R1"):
        with pytest.raises(ValueError, match="not understood"):
            step_of(assembled(outside).instructions[0], state)


def run_with_out(
    code: str, threads: int | tuple[int, int], words: int, smem: int = 0
) -> tuple[torch.Tensor, WarpTrace]:
    """What a block writes, word by word, to the address that its first parameter gives; and its first warp's trace."""
    out = torch.full((words,), -1, dtype=torch.int32)
    load = "MOV R2, c[0x0][0x140]\nMOV R3, c[0x0][0x144]\n"
    traces = execute(
        assembled(f"{load}{code}\nEXIT"), (1,), threads, smem, struct.pack("<Q", out.data_ptr()), [(out, "out", True)]
    )
    return out, traces[0, 0, 0].warps[0]


def test_blocks_in_two_dimensions() -> None:
    code = """
        S2R R0, SR_TID.X
        S2R R1, SR_TID.Y
        MOV R4, c[0x0][0x8]
        MOV R5, c[0x0][0xc]
        XMAD R6, R1, R4, R0
        ISCADD R2, R6, R2, 0x2
        XMAD R7, R1, R5, R0
        STG.E [R2], R7
    """
    out, _ = run_with_out(code, (16, 3), 64)
    assert out.tolist() == [y * 3 + x for y in range(3) for x in range(16)] + [-1] * 16


def test_generic_addresses() -> None:
    code = """
        LEA R4.CC, R2, RZ
        LEA.HI.X P0, R5, R2, RZ, R3
        MOV R6, 0x7
        ST.E [R4], R6, P0
        LD.E R7, [R4], P0
        STG.E [R2+0x4], R7
    """
    assert run_with_out(code, 1, 3)[0].tolist() == [7, 7, -1]


@pytest.mark.parametrize(
    ("atomic", "results"),
    [("MAX.S32", [24, 25, 26, 27, -1]), ("MIN", [0, 1, 2, 3, -1])],
)
def test_atomic_extremes_of_shared_memory(atomic: str, results: list[int]) -> None:
    """Eight lanes want each of four words, with their numbers - 4; unsigned, the first four are the largest."""
    code = f"""
        S2R R0, SR_TID.X
        LOP.AND R1, R0, 0x3
        SHL R1, R1, 0x2
        IADD R4, R0, -0x4
        MOV R5, -0x2
        STS [R1], R5
        ATOMS.{atomic} RZ, [R1], R4
        LDS R6, [R1]
        IADD R2, R2, R1
        STG.E [R2], R6
    """
    out, trace = run_with_out(code, 32, 5, smem=16)
    assert out.tolist() == results
    assert trace.smem_cycles.max() == 8


def test_compare_and_swap_in_the_order_of_lanes() -> None:
    code = """
        S2R R0, SR_TID.X
        STS [RZ], RZ
        IADD R1, R0, 0x1
        MOV R4, R0
        MOV R5, R1
        ISETP.GE.AND P0, PT, R0, 0x14, PT
        @P0 MOV R4, 0x63
        ATOMS.CAS R6, [RZ], R4, R5
        ISCADD R2, R0, R2, 0x2
        STG.E [R2], R6
    """
    out, trace = run_with_out(code, 32, 32, smem=4)
    # Each lane finds what the one before has left, and those from 20 on do not find what they expect.
    assert out.tolist() == [*range(20), *[20] * 12]
    assert trace.smem_cycles.tolist().count(32) == 1


@pytest.mark.parametrize(
    "atomic", ["ATOMS.ADD RZ, [R1], R4", "ATOMS.MAX.S32 R5, [R1], R4", "ATOMS.CAS RZ, [R1], R4, R5"]
)
def test_atomics_that_are_not_understood(atomic: str) -> None:
    with pytest.raises(ExecutionError, match="not understood"):
        run_with_out(atomic, 32, 1, smem=4)


def test_atomic_outside_shared_memory() -> None:
    with pytest.raises(ExecutionError, match="thread 1 .* is not in the 4 bytes of shared memory"):
        run_with_out("S2R R0, SR_TID.X\nSHL R1, R0, 0x2\nATOMS.MIN RZ, [R1], R0", 32, 1, smem=4)


def test_local_memory_is_each_threads_own() -> None:
    code = """
        S2R R0, SR_TID.X
        MOV R1, c[0x0][0x20]
        IADD32I R1, R1, -0x10
        IADD R4, R0, 0x5
        MOV R5, R0
        STL.64 [R1+0x8], R4
        LDL.LU R6, [R1+0xc]
        LDL R7, [R1+0x8]
        XMAD R6, R7, 0x40, R6
        ISCADD R2, R0, R2, 0x2
        STG.E [R2], R6
    """
    out, trace = run_with_out(code, 40, 40)
    assert out.tolist() == [(n + 5) * 64 + n for n in range(40)]
    # A word of all lanes lies together, so that 64 bits are two lines of four sectors.
    assert [n for n in trace.sectors.tolist() if n] == [8, 4, 4, 4]
    with pytest.raises(ExecutionError, match="is not in the 1024 bytes of local memory"):
        run_with_out("MOV R1, c[0x0][0x20]\nSTL [R1], RZ", 32, 1)


def test_shuffle_from_a_lane_that_is_not_there() -> None:
    (shuffle,) = assembled("SHFL.BFLY PT, R0, R1, 0x1, 0x1f").instructions[:1]
    with pytest.raises(ValueError, match="a lane that does not execute it"):
        step_of(shuffle, State(32, {}, {}))(np.arange(31))


def test_word_of_a_buffer_that_begins_between_words() -> None:
    x = torch.arange(9, dtype=torch.int16)[1:]
    assert x.data_ptr() % 4 == 2
    code = """
        MOV R2, c[0x0][0x140]
        MOV R3, c[0x0][0x144]
        LDG.E R4, [R2+0x2]
        STG.E [R2+0x6], R4
        EXIT
    """
    execute(assembled(code), (1,), 1, 0, struct.pack("<Q", x.data_ptr()), [(x, "x", True)])
    assert x.tolist() == [1, 2, 3, 2, 3, 6, 7, 8]


@pytest.mark.parametrize("blocks", [None, [(2, 0, 1), (0, 1, 3)]], ids=str)
def test_every_block_has_its_own_index(blocks: list[Index] | None) -> None:
    code = """
        S2R R0, SR_CTAID.X
        S2R R1, SR_CTAID.Y
        S2R R2, SR_CTAID.Z
        XMAD R1, R2, c[0x0][0x18], R1
        XMAD R0, R1, c[0x0][0x14], R0
        SHL R0, R0, 0x2
        MOV R4, c[0x0][0x1c]
        IADD R2.CC, R0, c[0x0][0x140]
        IADD.X R3, RZ, c[0x0][0x144]
        STG.E [R2], R4
        EXIT
    """
    grid = (3, 2, 4)
    out = torch.zeros(4, 2, 3, dtype=torch.int32)
    traces = execute(assembled(code), grid, 1, 0, struct.pack("<Q", out.data_ptr()), [(out, "out", True)], blocks)
    assert {*traces} == {*(blocks or itertools.product(*map(range, grid)))}
    expected = torch.zeros_like(out)
    for x, y, z in traces:
        expected[z, y, x] = 4
    assert torch.equal(out, expected)


# ---- the flow of control

BEGIN = """
S2R R0, SR_TID.X
SHL R1, R0, 0x2
IADD R2.CC, R1, c[0x0][0x140]
IADD.X R3, RZ, c[0x0][0x144]
MOV R4, RZ
LOP.AND R5, R0, 0x1f
"""
END = """
STG.E [R2], R4
EXIT
"""


def run(code: str, threads: int = 32, smem: int = 0) -> tuple[list[int], list[WarpTrace]]:
    """R4 of every thread at the end, and the traces of the code without its frame."""
    out = torch.full((threads,), -1, dtype=torch.int32)
    before = BEGIN.strip().count("\n") + 1
    trace = execute(
        assembled(BEGIN + code + END), (1,), threads, smem, struct.pack("<Q", out.data_ptr()), [(out, "out", True)]
    )
    within = [warp.index >= before for warp in trace[0, 0, 0].warps]
    cut = [
        WarpTrace(w.index[k] - before, w.lanes[k], w.smem_cycles[k], w.sectors[k])
        for w, k in zip(trace[0, 0, 0].warps, within, strict=True)
    ]
    return out.tolist(), cut


def executed(trace: WarpTrace) -> list[tuple[int, int]]:
    return [*zip(trace.index.tolist(), trace.lanes.tolist(), strict=True)]


def test_lanes_meet_again_at_sync() -> None:
    code = """
        ISETP.LT.AND P0, PT, R5, 0xa, PT
        SSY `(.L_x_1)
        @P0 BRA `(.L_x_0)
        IADD R4, R4, 0x1
        SYNC
        .L_x_0:
        IADD R4, R4, 0x2
        @P0 SYNC
        MOV R4, RZ
        .L_x_1:
        @P0 IADD R4, R4, 0x10
    """
    out, (trace,) = run(code)
    assert out == [0x12] * 10 + [1] * 22
    flow = [(0, 32), (1, 32), (2, 10), (3, 22), (4, 22), (5, 10), (6, 10), (8, 10), (9, 32), (10, 32)]
    assert executed(trace) == flow


def test_break_leaves_what_is_inside() -> None:
    code = """
        PBK `(.L_x_3)
        .L_x_0:
        SSY `(.L_x_1)
        ISETP.GE.AND P0, PT, R4, R5, PT
        @P0 BRK
        SYNC
        .L_x_1:
        IADD R4, R4, 0x1
        BRA `(.L_x_0)
        .L_x_3:
        IADD R4, R4, 0x64
    """
    out, (trace,) = run(code)
    assert out == [100 + lane for lane in range(32)]
    added = [lanes for index, lanes in executed(trace) if index == 5]
    assert added == [*range(31, 0, -1)]
    assert executed(trace)[-3:] == [(7, 32), (8, 32), (9, 32)]


def test_call_and_return() -> None:
    code = """
        ISETP.LT.AND P0, PT, R5, 0x3, PT
        CAL `(.L_x_0)
        CAL `(.L_x_0)
        BRA `(.L_x_1)
        .L_x_0:
        IADD R4, R4, 0x1
        @P0 RET
        IADD R4, R4, 0x10
        RET
        .L_x_1:
        NOP
    """
    out, (trace,) = run(code)
    assert out == [2] * 3 + [0x22] * 29
    assert executed(trace)[1:6] == [(1, 32), (4, 32), (5, 3), (6, 29), (7, 29)]


def test_barrier_without_the_lanes_that_have_left() -> None:
    code = """
        ISETP.GE.AND P0, PT, R0, 0x28, PT
        @P0 EXIT
        STS [R1], R0
        BAR.SYNC 0x0
        LOP.XOR R6, R1, 0x80
        ISETP.LT.AND P1, PT, R5, 0x8, PT
        @P1 LDS.U.32 R4, [R6]
    """
    out, traces = run(code, threads=64, smem=160)
    assert out == [*range(32, 40)] + [0] * 24 + [*range(8)] + [-1] * 24
    assert [executed(trace)[6] for trace in traces] == [(6, 8), (6, 8)]
    assert [trace.smem_cycles[[2, 3, 6]].tolist() for trace in traces] == [[1, 0, 1]] * 2
    assert [trace.sectors[7:].tolist() for trace in traces] == [[4, 0], [1, 0]]


@pytest.mark.parametrize(("condition", "expected"), [("EQ", [1, 0]), ("NE", [0, 1]), ("NEU", [0, 1])])
def test_branch_on_condition_codes(condition: str, expected: list[int]) -> None:
    code = f"""
        IADD RZ.CC, R5, -0x1
        SSY `(.L_x_1)
        BRA CC.{condition}, `(.L_x_0)
        SYNC
        .L_x_0:
        IADD R4, R4, 0x1
        SYNC
        .L_x_1:
        NOP
    """
    out, _ = run(code)
    assert out == [expected[1], expected[0], *[expected[1]] * 30]


@pytest.mark.parametrize(
    ("begin", "leave", "end"),
    [
        ("SSY `(.L_x_2)", "SYNC", "SYNC"),
        ("PBK `(.L_x_2)", "BRK", "BRK"),
        ("CAL `(.L_x_1)\nBRA `(.L_x_2)", "RET", "RET"),
    ],
    ids=["SYNC", "BRK", "RET"],
)
def test_leaving_on_condition_codes(begin: str, leave: str, end: str) -> None:
    code = f"""
        IADD RZ.CC, R5, -0x1
        ISETP.LT.AND P0, PT, R5, 0x8, PT
        {begin}
        .L_x_1:
        @P0 {leave} CC.NEU
        IADD R4, R4, 0x1
        {end}
        .L_x_2:
        NOP
    """
    out, _ = run(code)
    assert out == [0, 1, *[0] * 6, *[1] * 24]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("SYNC", "nothing on the stack"),
        ("ISETP.LT.AND P0, PT, R5, 0x3, PT\n@P0 SSY `(.L_x_0)\n.L_x_0:\nNOP", "only some lanes execute it"),
        (".L_x_0:\nSSY `(.L_x_0)\nBRA `(.L_x_0)", "the stack is higher than 64"),
        ("ISETP.LT.AND P0, PT, R5, 0x3, PT\n@P0 BAR.SYNC 0x0", "by some of the warp's lanes"),
        ("BRA CC.LT, `(.L_x_0)\n.L_x_0:\nNOP", "CC.LT"),
        ("PBK `(.L_x_0)\nBRK CC.LT\n.L_x_0:\nNOP", "CC.LT"),
        ("EXIT CC.LT", "CC.LT"),
    ],
)
def test_flow_that_must_not_be(code: str, message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        run(code)
