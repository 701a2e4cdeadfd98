"""The executor of sm_60 machine code, on small kernels: their results, their traces, and its errors."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.p100.machine import sass
from benchmarks.p100.machine.execute import ExecutionError, Index, execute
from benchmarks.p100.machine.memory import wavefronts
from benchmarks.p100.machine.trace import BlockTrace
from tests.support.p100_small_kernels import listing, small

BLOCKS, THREADS = 2, 64
LANES = BLOCKS * THREADS


def launch(
    kernel: str, out: Tensor, *arguments: Tensor | int, blocks: int = BLOCKS, threads: int = THREADS, smem: int = 0
) -> dict[Index, BlockTrace]:
    """Run a small kernel. It may write its first parameter, which is called out, and read the others, in1, in2, ..."""
    given = (out, *arguments)
    params = b"".join(struct.pack("<Q", x.data_ptr()) if isinstance(x, Tensor) else struct.pack("<i", x) for x in given)
    buffers = [(x, f"in{n}" if n else "out", n == 0) for n, x in enumerate(given) if isinstance(x, Tensor)]
    return execute(small(kernel), (blocks, 1, 1), threads, smem, params, buffers)


def test_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (LANES,), generator=generator)
    y = torch.randint(-(2**31), 2**31, (LANES,), generator=generator)
    x[:40], y[20:60] = x[:40] % 256, y[20:60] >> torch.arange(40) % 32
    x[:4], y[:4] = torch.tensor([-(2**31), 2**31 - 1, 0, -1]), torch.tensor([2, -1, 0, -(2**31)])
    out = torch.zeros(22, LANES, dtype=torch.int32)
    launch("integers", out, x.int(), y.int())
    for lane in range(LANES):
        expected = [_int32(value) for value in integers(int(x[lane]), int(y[lane]), lane)]
        assert out[:, lane].tolist() == expected, f"lane {lane}: x = {int(x[lane])}, y = {int(y[lane])}"


def integers(x: int, y: int, i: int) -> list[int]:
    ux, uy, shift = x % 2**32, y % 2**32, y % 32
    bytes_ = [*ux.to_bytes(4, "little"), *uy.to_bytes(4, "little")]
    return [
        x + y,
        x - y,
        x * y,
        x * y >> 32,
        ux * uy >> 32,
        min(x, y),
        max(ux, uy),
        x << shift,
        x >> shift,
        ux >> shift,
        x & y | ~x & i,
        x ^ y,
        0 if y == 0 else _quotient(x, 1 if y == -1 else y),
        0 if y == 0 else ux % uy,
        int.from_bytes([bytes_[1], bytes_[6], 255 * (bytes_[3] >> 7), bytes_[2]], "little"),
        (uy << 32 | ux) << 7 >> 32,
        (uy << 32 | ux) >> i % 32,
        ux >> 5 & 0x3F,
        _int32(x << 20) >> 24,
        abs(x),
        i if x < y else x,
        (x > 5) != (ux < uy),
    ]


def _int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def test_wide_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**63), 2**63 - 1, (LANES,), generator=generator)
    y = torch.randint(-(2**63), 2**63 - 1, (LANES,), generator=generator)
    x[:50], y[25:90] = x[:50] >> torch.arange(50), y[25:90] >> torch.arange(65) % 63
    x[90:100] = y[90:100] + torch.arange(-5, 5) * 2**30
    x[:5], y[:5] = torch.tensor([0, -1, 2**32, -(2**32), 2**63 - 1]), torch.tensor([0, -1, 2**32 - 1, 1, -(2**63)])
    x[100:110], y[100:110] = torch.arange(10) - 5 << 32, torch.arange(10) - 5  # signs, and lower halves of 0
    x[110:120], y[110:120] = torch.arange(10) - 5 << 16, torch.arange(10) - 5 << 16
    out = torch.zeros(20, LANES, dtype=torch.int64)
    launch("wide_integers", out, x, y)
    for lane in range(LANES):
        expected = [(v + 2**63) % 2**64 - 2**63 for v in wide_integers(int(x[lane]), int(y[lane]), lane)]
        assert out[:, lane].tolist() == expected, f"lane {lane}: x = {int(x[lane])}, y = {int(y[lane])}"


def wide_integers(x: int, y: int, i: int) -> list[int]:
    ux, uy, shift = x % 2**64, y % 2**64, y % 64
    return [
        x + y,
        x - y,
        x - y + i,
        _int32(x) * _int32(y),
        ux % 2**32 * (uy % 2**32),
        x * y,
        min(x, y),
        max(x, y),
        min(max(x, -5), 5),
        max(ux, uy),
        x << shift,
        x >> shift,
        ux >> 13,
        x < y,
        x <= y,
        x == y,
        ux > uy,
        ux // uy if y else 0,
        ux % uy if y else 0,
        3 if x != 0 and (x > y or y > 7) else 4,
    ]


def test_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3.4e38, 1.0, -2.5, 1e-38, 127.9])
    x, y, size = torch.randn(3, LANES, generator=generator)
    x *= torch.exp(20 * size).clamp(1e-30, 1e30)
    x[:12], y[:12] = special, special.roll(1)
    y[12:24], x[30:60] = x[12:24], torch.linspace(-130, 130, 30)
    out = torch.zeros(24, LANES)
    launch("floats", out, x, y)
    for n, (rounding, expected) in enumerate(floats(x, y)):
        line = f"line {n} of the kernel: "
        torch.testing.assert_close(out[n], expected, rtol=rounding, atol=0, equal_nan=True, msg=line.__add__)


def floats(x: Tensor, y: Tensor) -> list[tuple[float, Tensor]]:
    """Relative tolerance and value of every line of the kernel."""
    wide, exact, near = x.double(), 0.0, 3e-7
    clipped = wide.nan_to_num(0.0, math.inf, -math.inf)
    i = torch.arange(LANES).short()
    return [
        (exact, x + y),
        (exact, x - y.abs()),
        (exact, x * y),
        (near, (wide * y.double() + 1.5).float()),
        (exact, torch.fmin(x, y)),
        (exact, torch.fmax(-x, y)),
        (exact, (x < y).float()),
        (exact, (x >= y).float()),
        (exact, (x != y).float()),
        (exact, (x == y).float()),
        (exact, (~(x > y)).float()),
        (exact, x.isnan().float() + 2 * x.isinf()),
        (near, torch.exp2(wide).float()),
        (near, torch.log2(wide.abs()).float()),
        (near, (1 / wide).float()),
        (near, wide.abs().sqrt().float()),
        (near, wide.abs().rsqrt().float()),
        (exact, clipped.clamp(-(2.0**31), 2.0**31 - 1).trunc().float()),
        (exact, clipped.clamp(0, 2.0**32 - 1).trunc().float()),
        (exact, x.view(torch.int32).float()),
        (exact, clipped.abs().clamp(0, 2.0**64).trunc().float()),
        (exact, x.half().float()),
        (exact, i.view(torch.float16).float()),
        (exact, y.abs()),
    ]


# ---- the flow of control, lanes, memory


def test_flow_of_control_and_lanes() -> None:
    x = torch.randperm(LANES, generator=torch.Generator().manual_seed(0)).int() + 1
    out = torch.full((8, LANES), -1, dtype=torch.int32)
    traces = launch("flow", out, x, 400, smem=8)
    steps = torch.tensor([_steps(int(v), 400) for v in x])
    block, lane = x.view(BLOCKS, THREADS), torch.arange(LANES)
    warp, odd = x.view(-1, 32), x % 2 == 1
    other = [lane - 3, lane + 5, lane // 8 * 8 + (lane + 1) % 8]
    valid = [lane % 16 >= 3, lane % 32 < 27, lane >= 0]
    bits = (odd.view(-1, 32) << torch.arange(32)).sum(1)
    expected = [
        steps,
        steps.view(block.shape).sum(1).repeat_interleave(THREADS),
        *(torch.where(ok, x[n % LANES], x) for n, ok in zip(other, valid, strict=True)),
        bits.repeat_interleave(32).int(),
        ((warp > 0).all(1) + 2 * (warp > 90).any(1)).repeat_interleave(32),
        torch.where(odd, -1, x),
    ]
    for n, values in enumerate(expected):
        assert out[n].tolist() == values.tolist(), n
    # Every lane that leaves is counted: the instruction behind the last test is executed by those with even x.
    program = small("flow")
    last = max(n for n, i in enumerate(program.instructions) if i.op == "STG")
    stored = [int(t.lanes[t.index == last][0]) for trace in traces.values() for t in trace.warps]
    assert stored == (warp % 2 == 0).sum(1).tolist()


def _steps(value: int, most: int) -> int:
    steps = 0
    while value != 1 and steps != most:
        if value % 2 == 0:
            value //= 2
        else:
            steps += 100 * (value % 3)
            value = 3 * value + 1
        steps += 1
    return steps


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 8, 32])
def test_memory(stride: int) -> None:
    x = torch.randn(1024)
    bytes_ = torch.arange(190, 256, dtype=torch.int64).to(torch.uint8)
    out = torch.zeros(256)
    trace = launch("memory", out, x, bytes_, stride, blocks=1, threads=32, smem=4096)[0, 0, 0]
    lane = torch.arange(32)
    for begin, width in ((0, 1), (32, 2), (96, 4)):
        expected = x[(width * stride * lane % 1024)[:, None] + torch.arange(width)]
        assert torch.equal(out[begin : begin + 32 * width].view(32, width), expected)
    whole = bytes_[:64].int()
    short = (whole[::2] + 256 * whole[1::2]).short().int()
    assert torch.equal(out[224:].view(torch.int32), whole[:32] + 3 * bytes_[:32].view(torch.int8).int() + 5 * short)

    # What it cost. In units of its own size, an access conflicts where lanes want different units of the same bank.
    (warp,) = trace.warps
    loads = [n for n, i in enumerate(small("memory").instructions) if i.op == "LDS"]
    cycles = [int(warp.smem_cycles[warp.index == n][0]) for n in loads]
    parts = [(1, 32), (2, 16), (4, 8)] if stride else [(1, 1), (1, 1), (2, 1)]
    assert cycles == [number * math.gcd(stride or 1, banks) for number, banks in parts]
    assert sum(warp.smem_cycles > 0) == 32 + len(loads)  # and 32 stores of 128 bytes
    assert warp.sectors[warp.index == 0].tolist() == [0]
    assert {name: len(found) for name, found in trace.read.items()} == {"in1": 128, "in2": 2}
    assert {name: len(found) for name, found in trace.written.items()} == {"out": 32}


# A lane's address, in units of what it accesses; whether the lane is active; cycles for units of 8 and of 16 bytes.
SHARED = {
    "consecutive": (lambda lane: lane, lambda lane: lane >= 0, 2, 4),
    "neighbours share": (lambda lane: lane // 2, lambda lane: lane >= 0, 1, 2),
    "the next but one shares": (lambda lane: lane % 2 + lane // 4 * 2, lambda lane: lane >= 0, 1, 2),
    "four apart share": (lambda lane: lane % 4 + lane // 8 * 4, lambda lane: lane >= 0, 2, 4),
    "sharing, but in one bank": (lambda lane: lane // 2 * 16, lambda lane: lane >= 0, 16, 16),
    "one of two": (lambda lane: lane, lambda lane: lane % 2 == 0, 2, 4),
    "one of four": (lambda lane: lane // 4, lambda lane: lane % 4 == 0, 1, 2),
}


@pytest.mark.parametrize("name", SHARED)
def test_wavefronts(name: str) -> None:
    unit, is_active, *expected = SHARED[name]
    lanes = np.arange(32)[is_active(np.arange(32))]
    for size, cycles in zip((8, 16), expected, strict=True):
        assert wavefronts(32 + lanes, size * unit(lanes), size, warps=3).tolist() == [0, cycles, 0]


# ---- what must not be


def run_memory(
    text: str | None = None, *, inputs: int = 1024, size: int = 64, shift: int = 0, smem: int = 4096
) -> set[str]:
    """The names of the buffers that the kernel `memory` writes to."""
    program = sass.parse(text or listing(), "memory")
    x, out, bytes_ = torch.zeros(1100)[:inputs], torch.zeros(256), torch.zeros(64, dtype=torch.uint8)[:size]
    params = struct.pack("<QQQi", out.data_ptr(), x.data_ptr() + shift, bytes_.data_ptr(), 1)
    buffers = [(out, "out", True), (x, "x", False), (bytes_, "bytes", False)]
    (block,) = execute(program, (1, 1), 32, smem, params, buffers).values()
    return {name for name, sectors in block.written.items() if len(sectors)}


def test_without_defect() -> None:
    assert run_memory() == {"out"}


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (
            {"inputs": 1023},
            r"memory 0x\w+: LDG\.E R\d+, .*: thread 31 of block \(0, 0, 0\): address \w+ is in no buffer",
        ),
        ({"size": 63}, r"LDG\.E\.S16 .*: thread 31 of block .*: address \w+ is in no buffer"),
        ({"shift": 2}, r"LDG\.E .*: thread 0 of block .*: address \w+ is not aligned to 4 bytes"),
        ({"smem": 4092}, r"STS .*: thread 31 of block .*: address 0xffc is not in the 4092 bytes of shared memory"),
    ],
    ids=str,
)
def test_access_that_is_not_allowed(defect: dict[str, int], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        run_memory(**defect)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("STG.E.64 ", "STG.E.65 ", r"memory 0x\w+: STG\.E\.65 .*: not understood"),
        ("LOP32I.AND", "LOP32I.NAND", "LOP32I.NAND .*: not understood"),
        ("SHL R", "SHILLY R", "SHILLY .*: not understood"),
        ("S2R R0, SR_TID.X", "S2R R0, SR_CLOCK", "SR_CLOCK.*: not understood"),
        ("c[0x0][0x140]", "c[0x0][0x1400]", r"c\[0x0\]\[0x1400\] is not in the bank"),
        ("  BAR.SYNC 0x0", "  @P6 BAR.SYNC 0x0", "BAR.SYNC 0x0: it is executed by some"),
        ("  BAR.SYNC 0x0", "  BAR.ARV 0x0, 0x40", "BAR.ARV 0x0, 0x40: no other barrier"),
    ],
)
def test_what_is_not_understood_is_an_error(old: str, new: str, message: str) -> None:
    begin = listing().index("\n.text.memory:")
    assert old in listing()[begin:]
    with pytest.raises(ExecutionError, match=message):
        run_memory(listing()[:begin] + listing()[begin:].replace(old, new))


def test_store_to_an_input_is_an_error() -> None:
    x = torch.zeros(8 * THREADS, dtype=torch.int32)
    with pytest.raises(ExecutionError, match="is in no buffer that may be written"):
        execute(
            small("flow"), (1, 1), THREADS, 8, struct.pack("<QQi", x.data_ptr(), x.data_ptr(), 1), [(x, "x", False)]
        )
