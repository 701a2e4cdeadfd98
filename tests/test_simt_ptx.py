"""The PTX that NVRTC emits, on the CPU executor: the numbers of the source, and its defects at their source lines."""

from __future__ import annotations

import pytest
import torch

from fastattn import nvrtc
from simt import selftest
from simt.executor import SCHEDULES, SimtError, load
from simt.ptx import PtxError, load_ptx, load_ptx_text
from simt.selftest import DEFECTS, KERNELS, needs_nvrtc

ARCHITECTURES = pytest.mark.parametrize("arch", ["compute_60", "compute_80"])
BUILDS = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])


# ---- kernels of the executor's own tests


@needs_nvrtc
@ARCHITECTURES
@BUILDS
@pytest.mark.parametrize("run", selftest.CORRECT)
def test_numbers_of_the_source(run, checked, arch):
    from_ptx = selftest.check_correct(load_ptx(KERNELS / "correct.cu", arch=arch, checked=checked), run, SCHEDULES)
    from_source = selftest.check_correct(load(KERNELS / "correct.cu", checked=checked), run, SCHEDULES[:1])
    for actual, expected in zip(from_ptx, from_source, strict=True):
        if run is selftest.run_online_softmax:  # NVRTC makes exp a product and ex2, and fuses what g++ does not
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(actual, expected)


@needs_nvrtc
@ARCHITECTURES
def test_shuffles_votes_and_bits(arch):
    selftest.check_lanes(load_ptx(KERNELS / "builtins.cu", arch=arch, checked=True))


@needs_nvrtc
def test_float_functions():
    selftest.check_float_functions(load_ptx(KERNELS / "builtins.cu"), rtol=1e-6)


@needs_nvrtc
@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types_round_like_torch(dtype, arch):
    selftest.check_rounding(load_ptx(KERNELS / "builtins.cu", arch=arch), dtype)


def broken(defect: str, checked: bool = True):
    return load_ptx(KERNELS / "broken.cu", checked=checked, defines=(f"DEFECT={defect}",))


@needs_nvrtc
@BUILDS
def test_kernel_without_defect(checked):
    for schedule in SCHEDULES:
        selftest.check_without_defect(broken("none", checked), schedule)


@needs_nvrtc
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_reported_at_its_source_line(defect):
    # In PTX there is no index to check, but the gap behind the array is seen.
    address = r"shared tile\+256" if defect == "shared_read" else None
    for schedule in SCHEDULES:
        with pytest.raises(SimtError) as caught:
            selftest.run_broken(broken(defect), schedule)
        selftest.check_reports(caught.value, defect, address)


# ---- PTX by hand: what the kernels above do not contain

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
# A kernel whose thread %tid has its own int32 at [%in] and [%out].
KERNEL = """
.visible .entry kernel(.param .align 8 .b8 p[16]) {{
.reg .pred %p<8>;
.reg .b32 %r<16>, %tid;
.reg .b64 %rd<8>, %in, %out;
.reg .b16 %rs<8>;
{declarations}
ld.param.u64 %in, [p];
ld.param.u64 %out, [p+8];
mov.u32 %tid, %tid.x;
mul.wide.u32 %rd0, %tid, 4;
add.s64 %in, %in, %rd0;
add.s64 %out, %out, %rd0;
ld.global.u32 %r0, [%in];
{code}
st.global.u32 [%out], %r1;
ret;
}}
"""


def kernel(code: str, declarations: str = "", before: str = "") -> str:
    return HEADER + before + KERNEL.format(code=code, declarations=declarations)


def run(text: str, values=range(32), *, threads: int = 32, schedule="in-order", dynamic_smem: int = 0) -> list[int]:
    x = torch.tensor([*values], dtype=torch.int32)
    library = load_ptx_text(text, checked=True)
    (out,) = selftest.launch(
        *(library, "kernel", (1,), (threads,), {"x": x}, {"out": torch.zeros(threads, dtype=torch.int32)}),
        **{"schedule": schedule, "dynamic_smem": dynamic_smem},
    )
    return out.tolist()


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
    before = ".const .align 4 .u32 table[3] = {7, 0x10, 4294967295};\n.global .align 1 .b8 bytes[5] = {1, 2, 3, 255};\n"
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
    xor.b32 %r1, %r1, %r8;"""
    assert run(kernel(code, before=before)) == [(0x10 + 7) ^ 0x1FFFF] * 32


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
    "add.u32": sum(range(3, 35)) + 5,
    "min.s32": 3,
    "max.u32": 34,
    "or.b32": 63,
    "and.b32": 0,
    "xor.b32": 5 ^ 3 ^ 32 ^ 33 ^ 34,
    "inc.u32": None,
    "exch.b32": 34,
}


@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics_and_reductions(operation):
    declarations = ".shared .align 4 .b8 cell[4];"
    code = f"""
    mov.u32 %r2, cell;
    mov.u64 %rd1, cell;
    cvta.shared.u64 %rd1, %rd1;
    setp.eq.u32 %p1, %tid, 0;
    @%p1 st.shared.u32 [%r2], 5;
    bar.sync 0;
    {"red" if operation[:3] in ("add", "min") else "atom"}.{operation} {"" if operation[:3] in ("add", "min") else "%r4, "}[%rd1], %r0;
    bar.sync 0;
    ld.shared.u32 %r1, [%r2];"""
    expected = ATOMICS[operation]
    if expected is None:  # wraps to 0 where the value has reached the operand
        expected = 5
        for operand in range(3, 35):
            expected = 0 if expected >= operand else expected + 1
    assert run(kernel(code, declarations), range(3, 35)) == [expected] * 32


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


# ---- what the checks must see in PTX, and what not

DYNAMIC = ".extern .shared .align 16 .b8 smem[];\n"
# Every thread writes 12 bytes of 16 to dynamic shared memory.
WRITE_THREE = """
    mov.u32 %r2, smem;
    shl.b32 %r3, %tid, 4;
    add.s32 %r2, %r2, %r3;
    st.shared.v2.u32 [%r2], {%r0, 1};
    st.shared.u32 [%r2+8], 2;"""


def test_widened_load_reads_only_its_used_bytes():
    load4 = "ld.shared.v4.u32 {%r1, %r4, %r5, %r6}, [%r2];"
    pragma = '.pragma "used_bytes_mask 4095";\n'
    assert run(kernel(WRITE_THREE + pragma + load4, before=DYNAMIC), dynamic_smem=512) == list(range(32))
    for text in (load4, pragma + load4 + load4, pragma.replace("4095", "8191") + load4):
        with pytest.raises(SimtError, match=r"uninitialised: at dynamic shared\+\d+: text.ptx:\d+"):
            run(kernel(WRITE_THREE + text, before=DYNAMIC), dynamic_smem=512)


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("ld.global.u32 %r1, [%in+128];", r"out-of-bounds: at x\+128 \(size 128\)"),
        ("st.global.u32 [%in], 1;", r"write-to-const: at x\+0"),
        ("ld.global.v2.u32 {%r1, %r2}, [%in];", r"misaligned: at x\+4"),
        ("st.shared.u32 [first+16], 1;", r"out-of-bounds: at shared first\+16"),
        ("ld.shared.u32 %r1, [second];", r"uninitialised: at shared second\+0"),
        ("st.shared.u32 [second], %tid;", r"race: at shared second\+0"),
        ("mov.u32 %r1, first;\nst.shared.u32 [%r1+-4], 1;", r"out-of-bounds: at shared"),
        ("st.shared.u64 [first+4], %in;", r"misaligned: at shared first\+4"),
        ("mov.u64 %rd1, depot;\nld.local.u32 %r1, [%rd1+16];", r"out-of-bounds: at local\+16 \(size 16\)"),
        ("ld.local.u64 %rd1, [depot+4];", r"misaligned"),
        ("atom.global.add.u32 %r1, [%in+128], 1;", r"out-of-bounds: at x\+128"),
        ("atom.shared.add.u32 %r1, [second], 1;", r"uninitialised: at shared second\+0"),
        ("red.shared.add.u32 [first+2], 1;", r"misaligned: at shared first\+2"),
        ("trap;", "trap: "),
    ],
)
def test_misuse_is_reported(code, report):
    declarations = """
    .shared .align 16 .b8 first[16];
    .shared .align 16 .b8 second[16];
    .local .align 16 .b8 depot[16];"""
    text = kernel("mov.u32 %r1, first; mov.u32 %r1, second;\n" + code, declarations)
    with pytest.raises(SimtError, match=report) as caught:
        run(text)
    last_line = text.splitlines().index(code.splitlines()[-1]) + 1
    assert f"text.ptx:{last_line}" in caught.value.reports[0].sites


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("frobnicate.b32 %r1, %r0;", "the instruction frobnicate.b32 with 2 operands is unknown"),
        ("add.cc.s32 %r1, %r0, %r0;", "the instruction add.cc.s32 with 3 operands is unknown"),
        ("add.s32 %r1, %r0;", "the instruction add.s32 with 2 operands is unknown"),
        ("ld.global.sideways.u32 %r1, [%in];", "ld.global.sideways.u32"),
        ("ld.global.v2.u32 %r1, [%in];", "2 elements are moved, 1 are named"),
        ("mov.u32 %r1, %clock;", "%clock is no u32"),
        ("mov.u32 %r1, 4294967296;", "4294967296 does not fit into u32"),
        ("add.f32 %r1, %r0, 1;", "the integer 1 is no f32"),
        ("ld.param.u32 %r1, [p+13];", "not within the 16 bytes"),
        ("ld.shared.u32 %r1, [p];", "p does not lie in shared memory"),
        ("ld.global.u32 %r1, [nothing];", "nothing is neither a register nor a variable"),
        ("cvt.f32.s32 %r1, %r0;", "the rounding does not fit the types"),
        ("setp.ltu.s32 %p1, %r0, %r0;", "ltu is no comparison of s32"),
        ("bar.sync 1;", "only the barrier 0"),
        ("call.uni missing, ();", "missing has no body"),
        ("mma.sync.aligned.m16n8k16.col.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "only row.col"),
        ("atom.global.add.b32 %r1, [%out], %r0;", "add of b32 is unknown"),
        ("activemask.b32 %r1;", "activemask.b32"),
    ],
)
def test_unknown_ptx_is_named_with_its_line(code, message):
    text = kernel(code)
    with pytest.raises(PtxError) as caught:
        run(text)
    line = text.splitlines().index(code) + 1
    assert str(caught.value).startswith(f"text.ptx line {line}: ")
    assert message in str(caught.value) and code.rstrip(";") in str(caught.value)


def test_text_that_is_no_ptx():
    with pytest.raises(PtxError, match=r"PTX line 2: not a declaration: gibberish;"):
        run(".version 8.0\ngibberish;\n")
    with pytest.raises(PtxError, match=r"PTX line \d+: not a statement: 5 mov.u32;"):
        run(kernel("5 mov.u32;"))


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"kernel: text.ptx has no kernel 'nothing'"):
        load_ptx_text(kernel("")).launch("nothing", (1,), (1,), bytes(16))
    with pytest.raises(ValueError, match="params: kernel takes a struct of 16 bytes, got 8"):
        load_ptx_text(kernel("")).launch("kernel", (1,), (1,), bytes(8))


@needs_nvrtc
def test_compile_errors_say_what_is_wrong(tmp_path):
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void kernel() { undeclared(); }\n')
    with pytest.raises(nvrtc.CompileError, match=r'wrong\.cu\(1\): error: identifier "undeclared" is undefined'):
        load_ptx(tmp_path / "wrong.cu")
