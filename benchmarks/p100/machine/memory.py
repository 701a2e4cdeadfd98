"""Loads and stores: their addresses, the check that they are allowed, and the cycles or sectors that they cost.

Shared memory has 32 banks of 4 bytes, each of which gives one word per cycle to all lanes that want it. How accesses of
8 and 16 bytes are split is not documented; as measured on later GPUs, a warp's 64-bit access is made by two half warps,
one behind the other, and a 128-bit access by four quarters. Two of these (for 128 bits, those of the same half) become
one where every lane has the address of its neighbour (lane ^ 1), or every lane that of the next but one (lane ^ 2).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .operand import ZERO_REGISTER, register_number
from .sass import Instruction
from .state import WARP, Getter, Lanes, State

SECTOR_BYTES = 32  # the smallest access to global memory
WARP_SHIFT = 48  # a warp's access to a sector is noted as one number: warp << WARP_SHIFT | sector
SECTOR_MASK = (1 << WARP_SHIFT) - 1
ROW_BYTES = 4 * WARP  # one word of each bank of shared memory
LOCAL, LOCAL_BYTES = "local", 1024  # the name of a thread's own memory among the buffers, and its bytes
_KINDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# Bytes by modifier; without one of these, 4.
_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "32": 4, "64": 8, "128": 16}
_CACHE_HINTS = {"E", "U", "CI", "CG", "CS", "CA", "LU", "CV"}  # and E, 64-bit addresses


class LaneError(ValueError):
    """The error that a lane accesses what it may not."""

    def __init__(self, lane: int, message: str) -> None:
        super().__init__(message)
        self.lane = lane


class Access:
    """The memory operand of an instruction: number of bytes, address, registers."""

    def __init__(self, i: Instruction, state: State) -> None:
        self.is_store = i.op.startswith("ST")
        sizes = [modifier for modifier in i.modifiers if modifier in _SIZES]
        if len(sizes) > 1 or {*i.modifiers} - {*sizes} - _CACHE_HINTS:
            raise ValueError(f"instruction: not understood: {i}")
        self.size = _SIZES[sizes[0]] if sizes else 4
        self.sign_bits = np.uint32(8 * self.size if sizes and sizes[0][0] == "S" else 0)
        register, address = (i.operands[1], i.operands[0]) if self.is_store else i.operands[:2]
        words = range(max(1, self.size // 4))
        is_zero = self.is_store and register_number(register) == ZERO_REGISTER
        self.rows = [state.registers[ZERO_REGISTER] if is_zero else state.result(register, n) for n in words]
        self.address = _address(address, "E" in i.modifiers, state)

    def check_aligned(self, lanes: NDArray[Any], address: NDArray[Any]) -> None:
        check(address % self.size == 0, lanes, address, f"is not aligned to {self.size} bytes")

    def load(self, s: Lanes, memory: NDArray[Any], offset: NDArray[Any]) -> None:
        """Load from the bytes of a memory, at these offsets, into the registers of these lanes."""
        unit = min(self.size, 4)
        view, first = memory.view(_KINDS[unit]), offset // unit
        for n, row in enumerate(self.rows):
            value = view[first + n].astype(np.uint32)
            if self.sign_bits:
                sign = np.uint32(1) << self.sign_bits - np.uint32(1)
                value = (value ^ sign) - sign
            row[s] = value

    def store(self, s: Lanes, memory: NDArray[Any], offset: NDArray[Any]) -> None:
        """Store the registers of these lanes; where several lanes write to the same place, the last one wins."""
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


def check(is_right: NDArray[Any], lanes: NDArray[Any], address: NDArray[Any], what: str) -> None:
    """Raise LaneError for the first lane whose address is not right."""
    if not is_right.all():
        wrong = int(np.argmin(is_right))
        raise LaneError(int(lanes[wrong]), f"address {int(address[wrong]):#x} {what}")


# ---- global memory ----


class Buffer:
    """The memory of a tensor: from its first to its last element."""

    def __init__(self, tensor: Tensor, name: str, is_written: bool) -> None:
        self.name, self.is_written = name, is_written
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.begin = tensor.data_ptr()
        self.end = self.begin + (last + 1) * tensor.element_size() if tensor.numel() else self.begin
        # Whole words, so that they can be viewed as such; no access goes outside the tensor.
        self.base = self.begin // 4 * 4
        words = -(-(self.end - self.base) // 4)
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint32 * words).from_address(self.base)).view(np.uint8)


class GlobalMemory:
    """The buffers of a launch."""

    def __init__(self, buffers: Sequence[tuple[Tensor, str, bool]]) -> None:
        self.buffers = [Buffer(*buffer) for buffer in buffers]

    def parts(self, access: Access, lanes: NDArray[Any], address: NDArray[Any]) -> list[tuple[Buffer, Lanes]]:
        """The buffers that are accessed, each with its lanes; where buffers overlap, the first one counts.

        Raises:
            LaneError: a lane accesses what it may not.
        """
        rest = np.ones(len(lanes), bool)
        found: list[tuple[Buffer, Lanes]] = []
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


def sectors(warps: NDArray[Any], address: NDArray[Any]) -> NDArray[Any]:
    """The distinct pairs of warp and sector, as warp << WARP_SHIFT | sector."""
    return np.unique(warps << WARP_SHIFT | address // SECTOR_BYTES)


def local_sectors(lanes: NDArray[Any], address: NDArray[Any], size: int) -> NDArray[Any]:
    """The distinct pairs of warp and sector of local memory, where a word of all lanes of a warp lies together."""
    warp, lane = np.divmod(lanes, WARP)
    words = address[:, None] // 4 + np.arange(max(1, size // 4))
    first = warp[:, None] * (LOCAL_BYTES * WARP) + words * ROW_BYTES + lane[:, None] * 4
    return np.unique(warp[:, None] << WARP_SHIFT | first // SECTOR_BYTES)


# ---- shared memory ----


def wavefronts(lanes: NDArray[Any], address: NDArray[Any], size: int, warps: int) -> NDArray[Any]:
    """The cycles that each warp's access to shared memory takes: one for every word of the bank with most.

    Args:
        lanes: the numbers of the lanes that access it.
        address: their addresses, in bytes from the begin of the block's shared memory.
        size: bytes per lane.
        warps: the number of warps.
    """
    group = lanes // WARP * 4 + (_groups(lanes, address, size, warps) if size > 4 else 0)
    size = max(size, 4)
    unit = np.unique(group << 32 | address // size)
    banks = ROW_BYTES // size
    wanted = np.bincount((unit >> 32) * banks + unit % banks, minlength=4 * warps * banks)
    return wanted.reshape(warps, 4, banks).max(2).sum(1)


def _groups(lanes: NDArray[Any], address: NDArray[Any], size: int, warps: int) -> NDArray[Any]:
    """The part of its warp's access that each lane belongs to."""
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
