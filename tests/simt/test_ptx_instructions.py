"""Instructions of PTX, one by one, against what Python and numpy compute: one kernel holds the whole table."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from tests.simt.executor import guarded
from tests.simt.ptx import load_ptx_text
from tests.support.ptx_cases import CASES, Case
from tests.support.ptx_numbers import FORMATS, ROWS, WIDTH, decode, encode, pool


def code(number: int, case_: Case, slots: list[tuple[str, int]]) -> str:
    """PTX that loads a row's operands, runs the instruction and stores 8 bytes of result."""
    result, *sources = case_.types.split()
    lines = [f".reg .b{max(WIDTH[t], 16)} x{i};" for i, t in enumerate((result, *sources)) if t != "pred"]
    lines += [f".reg .pred x{i};" for i, t in enumerate((result, *sources)) if t == "pred"]
    for i, type_ in enumerate(sources):
        address = f"[%in+{8 * ROWS * slots.index((type_, i))}]"
        if type_ == "pred":
            lines += [f"ld.global.b32 %t, {address};", f"setp.ne.b32 x{i + 1}, %t, 0;"]
        else:
            lines.append(f"ld.global.b{WIDTH[type_]} x{i + 1}, {address};")
    lines.append(f"{case_.opcode} {', '.join(f'x{i}' for i in range(1 + len(sources)))}{case_.extra};")
    if result == "pred":
        lines.append("selp.b32 %t, 1, 0, x0;")
    stored = ("b32", "%t") if result == "pred" else (f"b{WIDTH[result]}", "x0")
    lines.append(f"st.global.{stored[0]} [%out+{8 * ROWS * number}], {stored[1]};")
    return "{" + "\n".join(lines) + "}"


KERNEL = """.version 8.8
.target sm_90
.address_size 64
.visible .entry table(.param .align 8 .b8 p[16]) {{
.reg .b32 %t;
.reg .b64 %in, %out, %row;
ld.param.b64 %in, [p];
ld.param.b64 %out, [p+8];
mov.u32 %t, %tid.x;
mul.wide.u32 %row, %t, 8;
add.s64 %in, %in, %row;
add.s64 %out, %out, %row;
{}
ret;
}}
"""


@functools.cache
def results() -> tuple[list[tuple[str, int]], np.ndarray]:
    """All pools of operands, and the bits that each case gave in each row."""
    slots = sorted({(t, i) for case_ in CASES for i, t in enumerate(case_.types.split()[1:])})
    text = KERNEL.format("\n".join(code(number, case_, slots) for number, case_ in enumerate(CASES)))
    operands = np.array([pool(*slot) for slot in slots], np.uint64).view(np.int64)
    inputs = guarded(torch.from_numpy(operands))
    outputs = guarded(torch.zeros(len(CASES), ROWS, dtype=torch.int64))
    params = inputs.data_ptr().to_bytes(8, "little") + outputs.data_ptr().to_bytes(8, "little")
    load_ptx_text(text, name="table.ptx").launch("table", (1,), (ROWS,), params)
    return slots, outputs.numpy().view(np.uint64)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_instruction(number):
    case_ = CASES[number]
    result, *sources = case_.types.split()
    slots, bits = results()
    pools = [pool(type_, i) for i, type_ in enumerate(sources)]
    assert set(enumerate(sources)) <= {(i, t) for t, i in slots}
    compared = 0
    for row, operands in enumerate(zip(*pools, strict=True)):
        values = [decode(x, "u32" if t == "count" else t) for x, t in zip(operands, sources, strict=True)]
        expected = case_.expected(*values)
        if expected is None:
            continue
        actual = int(bits[number, row])
        compared += 1
        if not agrees(actual, expected, result, case_.tolerance):
            pytest.fail(f"{case_.opcode} of {values}: {decode(actual, result)}, expected {expected}")
    assert compared >= ROWS // 6


def agrees(actual: int, expected, type_: str, tolerance: float) -> bool:
    if type_.endswith("x2"):
        return all(agrees(actual >> 16 * i & 0xFFFF, part, type_[:-2], tolerance) for i, part in enumerate(expected))
    if type_ in FORMATS:
        value = decode(actual, type_)
        if math.isnan(value) or math.isnan(expected):
            return math.isnan(value) and math.isnan(expected)
        if tolerance and math.isfinite(expected):
            largest = decode(encode(math.inf, type_) - 1, type_)
            return abs(value - expected) <= tolerance * abs(expected) + decode(1, type_) or abs(expected) >= largest
    return actual == encode(expected, type_)
