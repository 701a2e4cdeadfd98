"""Tensor-core instructions, in the inline PTX of CUDA kernels: mma.sync, ldmatrix, cp.async."""

from __future__ import annotations

import pytest
import torch

from tests.simt.executor import SCHEDULES, SimtError
from tests.simt.ptx import load_ptx, load_ptx_text
from tests.simt.selftest import KERNELS, launch, needs_nvrtc

DTYPES = {"f16": ("__half", torch.float16), "bf16": ("__nv_bfloat16", torch.bfloat16)}


def multiply(shape: str, element: str, schedule="in-order", *, layout="row.col", arch="compute_80", defines=()):
    """c + a @ b by the kernel, and by torch in float64."""
    cuda_type, dtype = DTYPES[element]
    numbers = "".join(filter(str.isdigit, shape))
    number = numbers if shape == "m8n8k4" else "16" + shape.partition("k")[2].zfill(2)
    opcode = f"mma.sync.aligned.{shape}.{layout}.f32.{element}.{element}.f32"
    defines = (f"SHAPE={number}", f"ELEMENT={cuda_type}", f'INSTRUCTION="{opcode}"', *defines)
    library = load_ptx(KERNELS / "tensor.cu", arch=arch, checked=True, defines=defines)
    torch.manual_seed(0)
    rows, inner, batch = (8, 4, (4,)) if shape == "m8n8k4" else (16, int(number[2:]), ())
    a, b = torch.randn(*batch, rows, inner).to(dtype), torch.randn(*batch, inner, 8).to(dtype)
    start = torch.randn(*batch, rows, 8)
    expected = start.double() + a.double() @ b.double()
    inputs = {"a": a, "b": b}
    (c,) = launch(library, "multiply", (1,), (32,), inputs, {"c": start}, schedule=schedule)
    return c.double(), expected


@needs_nvrtc
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k8"])
def test_mma_of_matrices_from_ldmatrix(shape, element, schedule):
    actual, expected = multiply(shape, element, schedule)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@needs_nvrtc
def test_mma_of_quarter_warps():
    actual, expected = multiply("m8n8k4", "f16", layout="row.row", arch="compute_70")
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@needs_nvrtc
def test_copies_in_the_background():
    actual, expected = multiply("m16n8k16", "f16", defines=("COPY_LATER",))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@needs_nvrtc
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("defect", "kinds", "operand"),
    [
        ("NEVER_SYNC", {"race", "uninitialised"}, "(at_a)"),
        ("NEVER_WAIT", {"uninitialised"}, "(at_b)"),  # what is still under way
    ],
)
def test_defect_is_reported(defect, kinds, operand, schedule):
    with pytest.raises(SimtError) as caught:
        multiply("m16n8k16", "bf16", schedule, defines=("COPY_LATER", defect))
    assert caught.value.kinds <= kinds
    lines = (KERNELS / "tensor.cu").read_text().splitlines()
    found = [lines[int(site.split(":")[1]) - 1] for report in caught.value.reports for site in report.sites]
    assert any(operand in line for line in found), found


# ---- every layout of mma.sync, with the registers filled from Python as the manual draws them


def positions_16x8(part: str, packed: int):
    """(row, column) of element i of a lane's part; two elements of 16 bits share a register."""

    def position(lane: int, i: int) -> tuple[int, int]:
        group, member, register = lane // 4, lane % 4, i // packed
        if part == "c":
            return group + 8 * (i // 2), 2 * member + i % 2
        along = packed * member + i % packed + 4 * packed * (register // 2 if part == "a" else register)
        return (group + 8 * (register % 2), along) if part == "a" else (along, group)

    return position


def positions_8x8(part: str, by_rows: bool, is_half: bool):
    def position(lane: int, i: int) -> tuple[int, int]:
        upper, member = 4 * (lane // 16), lane % 4
        if part == "c":
            return (member + upper, i) if is_half else (lane % 2 + (i & 2) + upper, (i & 4) + (lane & 2) + i % 2)
        if part == "a":
            return (member + upper, i) if by_rows else (i + upper, member)
        return (member, i + upper) if by_rows else (i, member + upper)

    return position


KERNEL = """.version 8.8
.target sm_80
.address_size 64
.visible .entry multiply(.param .align 8 .b8 p[32]) {{
.reg .b32 %lane;
.reg .b64 %base<4>, %offset;
.reg .b32 %a<8>, %b<8>, %c<8>, %d<8>;
mov.u32 %lane, %tid.x;
mul.wide.u32 %offset, %lane, 32;
{loads}
{opcode} {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};
{stores}
ret;
}}
"""


def kernel(opcode: str, counts: dict[str, int]) -> str:
    """A kernel whose lanes read a, b, c and write d, 32 bytes for each lane."""
    pointers = [
        f"ld.param.b64 %base{i}, [p+{8 * i}];\nadd.s64 %base{i}, %base{i}, %offset;" for i in range(len("abcd"))
    ]
    loads = [f"ld.global.b32 %{x}{i}, [%base{n}+{4 * i}];" for n, x in enumerate("abc") for i in range(counts[x])]
    stores = [f"st.global.b32 [%base3+{4 * i}], %d{i};" for i in range(counts["c"])]
    names = {x: ", ".join(f"%{x}{i}" for i in range(counts["c" if x == "d" else x])) for x in "abcd"}
    return KERNEL.format(opcode=opcode, loads="\n".join(pointers + loads), stores="\n".join(stores), **names)


def registers(matrices: torch.Tensor, position, group, count: int) -> torch.Tensor:
    """32 bytes for each lane: its elements of the matrix of its group."""
    lanes = torch.zeros(32, 32 // matrices.element_size(), dtype=matrices.dtype)
    for lane in range(32):
        for i in range(count):
            lanes[lane, i] = matrices[group(lane)][position(lane, i)]
    return lanes


LAYOUTS = [
    *(("m16n8k16", "row.col", element, total) for element, total in (("f16", "f32"), ("bf16", "f32"), ("f16", "f16"))),
    *(("m16n8k8", "row.col", element, total) for element, total in (("f16", "f32"), ("tf32", "f32"), ("f16", "f16"))),
    ("m16n8k4", "row.col", "tf32", "f32"),
    *(("m8n8k4", f"{a}.{b}", "f16", total) for a in ("row", "col") for b in ("row", "col") for total in ("f32", "f16")),
]


@pytest.mark.parametrize(("shape", "layout", "element", "total"), LAYOUTS, ids=lambda part: part)
def test_layout(shape, layout, element, total):
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "f32": torch.float32}
    rows, inner, groups = (8, 4, 4) if shape == "m8n8k4" else (16, int(shape[6:]), 1)
    torch.manual_seed(0)
    a, b = (torch.randint(-16, 16, (groups, *size)).to(dtypes[element]) / 8 for size in ((rows, inner), (inner, 8)))
    c = (torch.randint(-16, 16, (groups, rows, 8)) / 8).to(dtypes[total])
    parts = {"a": a, "b": b, "c": c}
    counts = {name: part.numel() // 32 for name, part in parts.items()}

    def group(lane: int) -> int:
        return lane // 4 % groups

    if shape == "m8n8k4":
        place = {x: positions_8x8(x, layout.split(".")[x == "b"] == "row", total == "f16") for x in parts}
    else:
        place = {x: positions_16x8(x, 1 if element == "tf32" else 2) for x in parts}
    if element == "tf32":  # the unit does not see these last bits
        parts["a"] = a * (1 + 2**-12)
    buffers = {x: registers(part, place[x], group, counts[x]) for x, part in parts.items()}
    num_registers = {x: counts[x] * parts[x].element_size() // 4 for x in parts}
    opcode = f"mma.sync.aligned.{shape}.{layout}.{total}.{element}.{element}.{total}"
    library = load_ptx_text(kernel(opcode, num_registers), name="mma.ptx", checked=True)
    outputs = {"d": torch.full_like(buffers["c"], torch.nan)}
    (d,) = launch(library, "multiply", (1,), (32,), buffers, outputs)
    # Eighths of small integers: every sum is exact.
    expected = registers(c + (a.float() @ b.float()).to(c.dtype), place["c"], group, counts["c"])
    assert torch.equal(d[:, : counts["c"]], expected[:, : counts["c"]])
