"""Loads and stores: where they go, whether they may, and what they cost.

Shared memory has 32 banks of 4 bytes, each of which gives one word per cycle to all lanes that want it. How accesses of
8 and 16 bytes are split is not documented; as measured on later GPUs, a warp's 64-bit access is made by two half warps,
one behind the other, and a 128-bit access by four quarters. Two of these (for 128 bits, those of the same half) become
one where every lane has the address of its neighbour (lane ^ 1), or every lane that of the next but one (lane ^ 2).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .operand import ZERO_REGISTER, register_number
from .sass import Instruction
from .state import WARP, Getter, Lanes, State

SECTOR = 32
BANK_BYTES = 4 * WARP
_KINDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# By modifier; 4 bytes if there is none of these.
_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "32": 4, "64": 8, "128": 16}
_WITHOUT_MEANING = {"E", "U", "CI", "CG", "CS", "CA", "LU", "CV"}  # caches, and how addresses are formed


class LaneError(ValueError):
    """A lane does what it must not."""

    def __init__(self, lane: int, message: str):
        super().__init__(message)
        self.lane = lane


class Access:
    """An instruction's memory operands: how many bytes, where, and which registers."""

    def __init__(self, i: Instruction, state: State):
        self.is_store = i.op.startswith("ST")
        sizes = [modifier for modifier in i.modifiers if modifier in _SIZES]
        if len(sizes) > 1 or {*i.modifiers} - {*sizes} - _WITHOUT_MEANING:
            raise ValueError(f"instruction: not understood: {i}")
        self.size = _SIZES[sizes[0]] if sizes else 4
        self.sign_bits = np.uint32(8 * self.size if sizes and sizes[0][0] == "S" else 0)
        register, address = (i.operands[1], i.operands[0]) if self.is_store else i.operands[:2]
        words = range(max(1, self.size // 4))
        is_zero = self.is_store and register_number(register) == ZERO_REGISTER
        self.rows = [state.registers[ZERO_REGISTER] if is_zero else state.result(register, n) for n in words]
        self.address = _address(address, "E" in i.modifiers, state)

    def check_aligned(self, lanes: np.ndarray, address: np.ndarray) -> None:
        check(address % self.size == 0, lanes, address, f"is not aligned to {self.size} bytes")

    def load(self, s: Lanes, memory: np.ndarray, offset: np.ndarray) -> None:
        """From the bytes of a memory, at these offsets, into the registers of these lanes."""
        unit = min(self.size, 4)
        view, first = memory.view(_KINDS[unit]), offset // unit
        for n, row in enumerate(self.rows):
            value = view[first + n].astype(np.uint32)
            if self.sign_bits:
                sign = np.uint32(1) << self.sign_bits - np.uint32(1)
                value = (value ^ sign) - sign
            row[s] = value

    def store(self, s: Lanes, memory: np.ndarray, offset: np.ndarray) -> None:
        """The other way; of lanes that write to the same place, the last one wins."""
        unit = min(self.size, 4)
        view, first = memory.view(_KINDS[unit]), offset // unit
        for n, row in enumerate(self.rows):
            view[first + n] = row[s]


_ADDRESS = re.compile(r"\[(?P<register>R\d+|RZ)?(?:\+?(?P<offset>-?0x[0-9a-f]+))?\]")


def _address(text: str, is_wide: bool, state: State) -> Getter:
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(f"operand: not understood: {text!r}")
    register, offset = match["register"] or "RZ", int(match["offset"] or "0", 16)
    if is_wide:
        pair = state.pair(register)
        return lambda s: pair(s).view(np.int64) + offset
    get = state.wide(register)
    return lambda s: get(s) + offset


def check(is_right: np.ndarray, lanes: np.ndarray, address: np.ndarray, what: str) -> None:
    """Raises LaneError for the first lane that is not right."""
    if not is_right.all():
        wrong = int(np.argmin(is_right))
        raise LaneError(int(lanes[wrong]), f"address {int(address[wrong]):#x} {what}")


# ---- global memory ----


class Buffer:
    """The memory of a tensor: from its first to its last element."""

    def __init__(self, tensor: Tensor, name: str, is_written: bool):
        self.name, self.is_written = name, is_written
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.begin = tensor.data_ptr()
        self.end = self.begin + (last + 1) * tensor.element_size() if tensor.numel() else self.begin
        # Whole words, so that they can be viewed as such; no access goes outside the tensor.
        self.base = self.begin // 4 * 4
        words = -(-(self.end - self.base) // 4)
        self.bytes = np.frombuffer((ctypes.c_uint32 * words).from_address(self.base), np.uint8)


class GlobalMemory:
    """The buffers of a launch."""

    def __init__(self, buffers: Sequence[tuple[Tensor, str, bool]]):
        self.buffers = [Buffer(*buffer) for buffer in buffers]

    def parts(self, access: Access, lanes: np.ndarray, address: np.ndarray) -> list[tuple[Buffer, Lanes]]:
        """Which buffer is accessed by which of the lanes; where buffers overlap, the first one.

        Raises:
            LaneError: a lane accesses what it may not.
        """
        rest, found = np.ones(len(lanes), bool), []
        for buffer in self.buffers:
            if access.is_store and not buffer.is_written:
                continue
            inside = rest & (address >= buffer.begin) & (address + access.size <= buffer.end)
            if inside.all():
                return [(buffer, slice(None))]
            if inside.any():
                found.append((buffer, np.flatnonzero(inside)))
                rest &= ~inside
        check(~rest, lanes, address, f"is in no buffer that may be {'written' if access.is_store else 'read'}")
        return found


def sectors(warps: np.ndarray, address: np.ndarray) -> np.ndarray:
    """The distinct pairs of warp and sector, as warp << 48 | sector."""
    return np.unique(warps << 48 | address // SECTOR)


# ---- shared memory ----


def wavefronts(lanes: np.ndarray, address: np.ndarray, size: int, warps: int) -> np.ndarray:
    """For every warp, the cycles that its access to shared memory takes.

    Args:
        lanes: the numbers of those that access it.
        address: of each of them, in bytes from the begin of the block's shared memory.
        size: of each access, in bytes.
        warps: how many there are.
    """
    group = lanes // WARP * 4 + (_groups(lanes, address, size, warps) if size > 4 else 0)
    size = max(size, 4)
    unit = np.unique(group << 32 | address // size)
    banks = BANK_BYTES // size
    wanted = np.bincount((unit >> 32) * banks + unit % banks, minlength=4 * warps * banks)
    return wanted.reshape(warps, 4, banks).max(2).sum(1)


def _groups(lanes: np.ndarray, address: np.ndarray, size: int, warps: int) -> np.ndarray:
    """For every lane, which part of its warp's access it belongs to."""
    part_lanes = WARP // (size // 4)
    table = np.full(warps * WARP, -1, np.int64)
    table[lanes] = address
    halves = table.reshape(-1, 2 * part_lanes)  # of which each becomes one access or remains two
    number = np.arange(2 * part_lanes)
    is_one = np.zeros(len(halves), bool)
    for distance in (1, 2):
        other = halves[:, number ^ distance]
        is_one |= ((halves == other) | (halves < 0) | (other < 0)).all(1)
    part = lanes % WARP // part_lanes
    return np.where(is_one[lanes // (2 * part_lanes)], part & ~1, part)
