"""PTX by hand: memory, control flow, atomics, and what a warp does together."""

from __future__ import annotations

import functools
import operator
import struct

import pytest
import torch

from tests.simt.executor import SCHEDULES, SimtError
from tests.simt.ptx import load_ptx_text
from tests.support.ptx_kernel import HEADER, kernel, run


def test_branches_and_predicated_instructions():
    code = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    $loop:
    setp.ge.s32 %p1|%p2, %r2, %r0;
    @%p1 bra $done;
    add.s32 %r1, %r1, %r2;
    @%p2 add.s32 %r2, %r2, 1;
    bra.uni $loop;
    $done:
    @!%p1 mov.u32 %r1, 1000;"""
    assert run(kernel(code)) == [sum(range(n)) for n in range(32)]


def test_branch_to_an_index():
    code = """
    $targets: .branchtargets $zero, $one, $zero, $two;
    and.b32 %r2, %r0, 3;
    brx.idx %r2, $targets;
    $zero: mov.u32 %r1, 10; bra $done;
    $one: mov.u32 %r1, 11; bra $done;
    $two: mov.u32 %r1, 12;
    $done:"""
    assert run(kernel(code)) == [10, 11, 10, 12] * 8


def test_call_of_a_device_function():
    functions = """
    .func (.param .b32 result) twice(.param .b32 x) {
    .reg .b32 %r<2>;
    ld.param.u32 %r0, [x];
    shl.b32 %r0, %r0, 1;
    st.param.b32 [result], %r0;
    ret;
    }
    .func (.param .b32 result) sum(.param .align 8 .b8 pair[8]) {
    .reg .b32 %r<3>;
    ld.param.v2.u32 {%r0, %r1}, [pair];
    add.s32 %r0, %r0, %r1;
    { .param .b32 argument; st.param.b32 [argument], %r0;
    .param .b32 returned; call.uni (returned), twice, (argument);
    ld.param.b32 %r0, [returned]; }
    st.param.b32 [result], %r0;
    ret;
    }
    """
    code = """
    { .param .align 8 .b8 argument[8];
    st.param.b32 [argument], %r0;
    st.param.b32 [argument+4], 5;
    .param .b32 returned;
    call.uni (returned), sum, (argument);
    ld.param.b32 %r1, [returned]; }"""
    assert run(kernel(code, before=functions)) == [2 * (n + 5) for n in range(32)]


def test_registers_of_a_block_are_its_own():
    code = """
    mov.u32 %r1, 100000;
    { .reg .b16 %r1; mov.u16 %r1, 7; { .reg .pred %r1; setp.eq.u32 %r1, %r0, 3; @%r1 add.s32 %r0, %r0, 50; } }
    add.s32 %r1, %r1, %r0;"""
    assert run(kernel(code)) == [100000 + (53 if n == 3 else n) for n in range(32)]


def test_several_parameters_lie_as_in_a_struct():
    text = (
        HEADER
        + """.visible .entry several(.param .u8 a, .param .u64 out, .param .u16 b, .param .align 4 .b8 c[4]) {
    .reg .b32 %r<4>; .reg .b64 %rd; .reg .b16 %rs<2>;
    ld.param.u8 %rs0, [a]; ld.param.u64 %rd, [out]; ld.param.u16 %rs1, [b]; ld.param.u32 %r2, [c];
    cvt.u32.u16 %r0, %rs0; cvt.u32.u16 %r1, %rs1;
    mad.lo.s32 %r3, %r0, 1000, %r1; mad.lo.s32 %r3, %r3, 1000, %r2;
    st.global.u32 [%rd], %r3; ret; }"""
    )
    out = torch.zeros(1, dtype=torch.int32)
    params = struct.pack("@BQHI", 7, out.data_ptr(), 8, 9)
    load_ptx_text(text, checked=True).launch("several", (1,), (1,), params, buffers=[(out, "out", True)])
    assert out.item() == 7008009


def test_local_memory_and_generic_addresses():
    code = """
    mov.u64 %rd1, depot;
    cvta.local.u64 %rd2, %rd1;
    and.b32 %r2, %tid, 3;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd3, %rd1, %rd3;
    st.local.v4.u32 [%rd1], {10, 11, 12, 13};
    st.local.u32 [%rd3], %r0;
    ld.v4.u32 {%r3, %r4, _, %r5}, [%rd2];
    mad.lo.s32 %r1, %r3, 100, %r4;
    mad.lo.s32 %r1, %r1, 100, %r5;"""
    expected = []
    for n in range(32):
        values = [10, 11, 12, 13]
        values[n % 4] = n
        expected.append((values[0] * 100 + values[1]) * 100 + values[3])
    assert run(kernel(code, ".local .align 16 .b8 depot[16];")) == expected


def test_constants_and_packed_registers():
    before = """.const .f32 one = 0f3F800000;
    .const .align 4 .u32 table[3] = {7, 0x10, 4294967295};
    .global .align 1 .b8 bytes[5] = {1, 2, 3, 255};"""
    code = """
    mov.u64 %rd1, table;
    ld.const.u32 %r2, [%rd1+4];
    ld.const.u32 %r3, [table];
    ld.global.s8 %r4, [bytes+3];
    ld.global.u8 %r5, [bytes+4];
    mov.b64 %rd2, {%r2, %r3};
    mov.b64 {%r6, %r7}, %rd2;
    mov.b32 {%rs1, _}, %r4;
    mov.b32 %r8, {%rs1, 1};
    add.s32 %r1, %r6, %r7;
    add.s32 %r1, %r1, %r5;
    xor.b32 %r1, %r1, %r8;
    ld.const.f32 %r2, [one];
    add.s32 %r1, %r1, %r2;"""
    assert run(kernel(code, before=before)) == [((0x10 + 7) ^ 0x1FFFF) + 0x3F800000] * 32


@pytest.mark.parametrize(("addend", "expected"), [(-(2.0**-60), 193), (0.0, 194), (2.0**-60, 194)])
def test_fused_bfloat16_is_rounded_once(addend, expected):
    """(1 + 2^-7) * 1.5 lies half-way between 193 and 194 units of 2^-7, and float64 would lose the addend."""
    bits = torch.tensor([1 + 2**-7, 1.5, addend, expected / 128], dtype=torch.bfloat16).view(torch.int16).tolist()
    a, b, c, result = (x & 0xFFFF for x in bits)
    code = f"""
    mov.b16 %rs1, {a};
    mov.b16 %rs2, {b};
    mov.b16 %rs3, {c};
    fma.rn.bf16 %rs1, %rs1, %rs2, %rs3;
    cvt.u32.u16 %r1, %rs1;"""
    assert run(kernel(code), [0], threads=1) == [result]


REDUCTIONS = {
    "add.s32": sum(range(100, 132)),
    "min.u32": 100,
    "max.s32": 131,
    "and.b32": functools.reduce(operator.and_, range(100, 132)),
    "or.b32": functools.reduce(operator.or_, range(100, 132)),
    "xor.b32": functools.reduce(operator.xor, range(100, 132)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_over_a_warp(reduction):
    code = f"redux.sync.{reduction} %r1, %r0, -1;"
    assert run(kernel(code), range(100, 132)) == [REDUCTIONS[reduction]] * 32


def test_lanes_and_threads():
    code = """
    mov.u32 %r2, %laneid;
    mov.u32 %r3, %lanemask_lt;
    mov.u32 %r4, %lanemask_ge;
    xor.b32 %r3, %r3, %r4;
    mov.u32 %r4, %lanemask_le;
    mov.u32 %r5, %lanemask_gt;
    and.b32 %r4, %r4, %r5;
    mov.u32 %r5, %lanemask_eq;
    popc.b32 %r5, %r5;
    mov.u32 %r6, %ntid.x;
    mov.u32 %r7, WARP_SZ;
    add.s32 %r1, %r2, %r3;
    add.s32 %r1, %r1, %r4;
    mad.lo.s32 %r1, %r5, 1000, %r1;
    mad.lo.s32 %r1, %r6, %r7, %r1;
    membar.gl; fence.acq_rel.gpu; prefetch.global.L2 [%in];"""
    assert run(kernel(code), range(40), threads=40) == [t % 32 - 1 + 1000 + 40 * 32 for t in range(40)]


def test_second_predicate_reads_what_the_first_overwrites():
    code = """
    setp.gt.u32 %p1, %r0, 10;
    setp.gt.and.u32 %p1|%p2, %r0, 20, %p1;
    selp.u32 %r1, 1, 0, %p1;
    @%p2 add.s32 %r1, %r1, 2;"""
    assert run(kernel(code)) == [0] * 11 + [2] * 10 + [1] * 11


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_barriers_and_votes(schedule):
    code = """
    setp.lt.u32 %p1, %r0, 40;
    bar.red.popc.u32 %r2, 0, %p1;
    bar.red.and.pred %p2, 0, %p1;
    barrier.red.or.pred %p3, 0, %p1;
    vote.sync.ballot.b32 %r3, %p1, -1;
    vote.sync.uni.pred %p4, %p1, -1;
    vote.sync.any.pred %p5, !%p1, 0xffffffff;
    selp.u32 %r4, 1, 0, %p2;
    selp.u32 %r5, 2, %r4, %p3;
    selp.u32 %r6, 4, 0, %p4;
    selp.u32 %r7, 8, 0, %p5;
    add.s32 %r1, %r5, %r6;
    add.s32 %r1, %r1, %r7;
    mad.lo.s32 %r1, %r2, 16, %r1;
    popc.b32 %r3, %r3;
    mad.lo.s32 %r1, %r3, 0x10000, %r1;
    bar.sync 0;"""
    expected = [(32 << 16) + 40 * 16 + 2 + 4] * 32 + [(8 << 16) + 40 * 16 + 2 + 8] * 32
    assert run(kernel(code), range(64), threads=64, schedule=schedule) == expected


SHUFFLES = {
    "idx.b32 %r1|%p1, %r0, 5, 0x1f": lambda n: (100 + 5, True),
    "idx.b32 %r1|%p1, %r0, 3, 0x181f": lambda n: (100 + n // 8 * 8 + 3, True),
    "up.b32 %r1|%p1, %r0, 3, 0": lambda n: (100 + n - 3, True) if n >= 3 else (100 + n, False),
    "down.b32 %r1|%p1, %r0, 3, 0x101f": lambda n: (100 + n + 3, True) if n % 16 < 13 else (100 + n, False),
    "bfly.b32 %r1|%p1, %r0, 9, 0x1f": lambda n: (100 + (n ^ 9), True),
    "bfly.b32 %r1|%p1, %r0, 16, 0xf": lambda n: (100 + (n ^ 16), True) if n >= 16 else (100 + n, False),
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffle_with_its_predicate(shuffle):
    code = f"shfl.sync.{shuffle}, -1;\n@!%p1 add.s32 %r1, %r1, 1000;"
    expected = [SHUFFLES[shuffle](n) for n in range(32)]
    assert run(kernel(code), range(100, 132)) == [value + (0 if inside else 1000) for value, inside in expected]


ATOMICS = {  # of the numbers 3, 4, ... 34, on 5: the final value
    "atom.{}.add.u32 %r4,": sum(range(3, 35)) + 5,
    "red.{}.add.s32": sum(range(3, 35)) + 5,
    "red.{}.min.s32": 3,
    "atom.{}.max.u32 %r4,": 34,
    "atom.relaxed.gpu.{}.or.b32 %r4,": 63,
    "red.{}.and.b32": 0,
    "atom.{}.xor.b32 %r4,": 5 ^ 3 ^ 32 ^ 33 ^ 34,
    "atom.{}.exch.b32 %r4,": 34,
    "atom.{}.inc.u32 %r4,": functools.reduce(lambda old, n: 0 if old >= n else old + 1, range(3, 35), 5),
    "atom.{}.dec.u32 %r4,": functools.reduce(
        lambda old, n: n if old in (0, *range(n + 1, 99)) else old - 1, range(3, 35), 5
    ),
}


@pytest.mark.parametrize("space", ["shared", "generic"])
@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics_and_reductions(operation, space):
    address = "%r2" if space == "shared" else "%rd1"
    code = f"""
    mov.u32 %r2, cell;
    mov.u64 %rd1, cell;
    cvta.shared.u64 %rd1, %rd1;
    setp.eq.u32 %p1, %tid, 0;
    @%p1 st.shared.u32 [%r2], 5;
    bar.sync 0;
    {operation.replace(".{}", ".shared" if space == "shared" else "")} [{address}], %r0;
    bar.sync 0;
    ld.u32 %r1, [%rd1];"""
    assert run(kernel(code, ".shared .align 4 .b8 cell[4];"), range(3, 35)) == [ATOMICS[operation]] * 32


@pytest.mark.parametrize(
    ("type_", "start", "added", "expected"),
    [("f32", 0x3F800000, 0x3F000000, 0x40000000), ("f16x2", 0x3C004000, 0x38003C00, 0x40004400)],
)
def test_atomic_sums_of_floats(type_, start, added, expected):
    """Atomic sums of two threads: 1 + 0.5 + 0.5, and in halves 2 + 1 + 1 beside it."""
    code = f"""
    mov.u32 %r2, cell;
    setp.eq.u32 %p1, %tid, 0;
    @%p1 st.shared.u32 [%r2], {start};
    mov.b32 %r3, {added};
    bar.sync 0;
    atom.shared.add.noftz.{type_} %r4, [%r2], %r3;
    bar.sync 0;
    ld.shared.u32 %r1, [%r2];"""
    assert run(kernel(code, ".shared .align 4 .b8 cell[4];"), [0, 0], threads=2) == [expected] * 2


def test_atomic_compare_and_swap():
    code = """
    mov.u32 %r2, cell;
    st.shared.u32 [%r2], 0;
    $again:
    ld.volatile.shared.u32 %r3, [%r2];
    add.s32 %r4, %r3, %r0;
    atom.shared.cas.b32 %r5, [%r2], %r3, %r4;
    setp.ne.s32 %p1, %r5, %r3;
    @%p1 bra $again;
    mov.u32 %r1, %r5;"""
    assert run(kernel(code, ".shared .align 4 .b8 cell[4];"), [7], threads=1) == [0]


def test_copies_in_the_background_wait_in_groups():
    """Two groups of 4 and 8 bytes, of which 3 are used; after the first wait, the second group may not be read."""
    copies = """
    mov.u32 %r2, space;
    cvta.to.global.u64 %rd1, %in;
    cp.async.ca.shared.global [%r2], [%rd1], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r2+8], [%rd1], 8, 3;
    cp.async.commit_group;
    cp.async.wait_group {};
    ld.shared.u32 %r1, [%r2];
    ld.shared.v2.u32 {{%r3, %r4}}, [%r2+8];
    mad.lo.s32 %r1, %r3, 3, %r1;
    add.s32 %r1, %r1, %r4;"""
    declarations = ".shared .align 16 .b8 space[16];"
    value = 0x01020304
    assert run(kernel(copies.format(0), declarations), [value, 0], threads=1) == [value + 3 * 0x020304]
    everything = copies.replace("cp.async.wait_group {}", "cp.async.wait_all").format()
    assert run(kernel(everything, declarations), [value, 0], threads=1) == [value + 3 * 0x020304]
    with pytest.raises(SimtError, match=r"uninitialised: at shared space\+8"):
        run(kernel(copies.format(1), declarations), [value, 0], threads=1)
