"""PTX by hand: defects that the checks see in a launch, limits of the checks, and errors about unknown PTX."""

from __future__ import annotations

import pytest

from tests.simt.executor import SimtError
from tests.simt.ptx import PtxError, load_ptx_text
from tests.support.ptx_kernel import kernel, run

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
        ("mov.u16 %r1, %p1;", "%p1, a register of type pred, holds no u16"),
        ("mov.u64 %r1, %rd1;", "%r1, a register of type b32, takes no u64"),
        ("add.s64 %rd1, %rd1, %r1;", "%r1, a register of type b32, holds no s64"),
        (".reg .b128 %q;", "registers of type b128 are unknown"),
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
    with pytest.raises(PtxError, match=r"text.ptx line 2: not a declaration: gibberish;"):
        run(".version 8.0\ngibberish;\n")
    with pytest.raises(PtxError, match=r"text.ptx line \d+: not a statement: 5 mov.u32;"):
        run(kernel("5 mov.u32;"))


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"kernel: text.ptx has no kernel 'nothing'"):
        load_ptx_text(kernel("")).launch("nothing", (1,), (1,), bytes(16))
    with pytest.raises(ValueError, match="params: kernel takes a struct of 16 bytes, got 8"):
        load_ptx_text(kernel("")).launch("kernel", (1,), (1,), bytes(8))
