"""The execution of a kernel's machine code, block by block, on the memory of CPU tensors.

Results are right up to what instructions/floats.py says. Nothing here knows about time: the model of the chip replays
the traces. All warps of some blocks are executed together: the group furthest behind, until it reaches the next one.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import control
from .atomics import Atomic, turns
from .control import Warps, as_bits, as_lanes
from .instructions import step_of
from .memory import (
    LOCAL,
    LOCAL_BYTES,
    SECTOR_MASK,
    WARP_SHIFT,
    Access,
    GlobalMemory,
    LaneError,
    check,
    local_sectors,
    sectors,
    wavefronts,
)
from .sass import Instruction, Program
from .state import WARP, Lanes, State, Step
from .trace import BlockTrace, TraceRecorder

Index = tuple[int, int, int]  # blockIdx: x, y, z

WARPS_AT_ONCE = 64
PARAMETERS = 0x140  # where the kernel's parameters begin in constant bank 0


class ExecutionError(RuntimeError):
    """The error that a kernel does what is not allowed or not understood; it names the instruction and the thread."""


def execute(
    program: Program,
    grid: Sequence[int],
    block_threads: int | tuple[int, int],
    smem_bytes: int,
    params: bytes,
    buffers: Sequence[tuple[Tensor, str, bool]],
    blocks: Iterable[Index] | None = None,
) -> dict[Index, BlockTrace]:
    """Run blocks of a launch and return their traces.

    Args:
        program: the kernel.
        grid: the grid size in x and, where they are given, y and z.
        block_threads: the block size in x, or in x and y.
        smem_bytes: shared memory per block, static and dynamic.
        params: the kernel's parameters.
        buffers: all memory that it may access: CPU tensors, their names, and whether they may be written.
        blocks: which blocks run; by default, all of them.

    Raises:
        ExecutionError: an access outside the buffers or shared memory, or not aligned; a barrier that not all lanes
            reach; an instruction that is not understood.
    """
    x, y, z = (*grid, 1, 1)[:3]
    chosen: Iterator[Index] = iter(itertools.product(range(x), range(y), range(z)) if blocks is None else blocks)
    side, other = block_threads if isinstance(block_threads, tuple) else (block_threads, 1)
    warps_per_block = -(-side * other // WARP)
    memory = GlobalMemory(buffers)
    header = struct.pack("<8x7i", side, other, 1, x, y, z, LOCAL_BYTES)
    constants = {0: header.ljust(PARAMETERS, b"\0") + params, 2: program.constants}
    traces: dict[Index, BlockTrace] = {}
    while batch := [*itertools.islice(chosen, max(1, WARPS_AT_ONCE // warps_per_block))]:
        execution = Execution(program, batch, (side, other), smem_bytes, constants, memory)
        with np.errstate(all="ignore"):
            execution.run()
        traces.update(execution.traces())
    return traces


class Execution:
    """Blocks that are executed together, with their registers and memory."""

    def __init__(
        self,
        program: Program,
        blocks: list[Index],
        threads: tuple[int, int],
        smem_bytes: int,
        constants: dict[int, bytes],
        memory: GlobalMemory,
    ) -> None:
        self.program, self.blocks, self.memory, self.smem_bytes = program, blocks, memory, smem_bytes
        count = threads[0] * threads[1]
        self.warps_per_block = -(-count // WARP)
        per_block = self.warps_per_block * WARP
        thread = np.tile(np.arange(per_block, dtype=np.uint32), len(blocks))
        special = {"SR_TID.Z": np.zeros_like(thread), "SR_LANEID": thread % WARP}
        special["SR_TID.Y"], special["SR_TID.X"] = np.divmod(thread, np.uint32(threads[0]))
        for side, numbers in zip("XYZ", np.array(blocks, np.uint32).T, strict=True):
            special[f"SR_CTAID.{side}"] = np.repeat(numbers, per_block)
        self.state = State(len(thread), constants, special)
        self.warps = Warps(as_bits(thread < count))
        self.recorder = TraceRecorder(len(blocks) * self.warps_per_block)
        self.stride = -(-smem_bytes // 16) * 16
        self.shared = np.full(self.stride * len(blocks), 0xFF, np.uint8)  # NaN, until it is written
        self.block_of = self.state.lanes // per_block
        self._local_memory: NDArray[Any] | None = None
        self.accessed: list[tuple[str, bool, NDArray[Any]]] = []
        self._steps: list[Step | None] = [None] * len(program.instructions)

    def run(self) -> None:
        """Execute all warps to their end."""
        while True:
            while group := self.warps.group():
                self._advance(*group)
            if not self.warps.release():
                return

    def _advance(self, warps: NDArray[Any], first: int, limit: int) -> None:
        """Execute these warps up to the limit, or up to the first instruction of the flow of control, included."""
        instructions, end = self.program.instructions, first
        while end < limit and instructions[end].op not in control.OPERATIONS:
            end += 1
        is_flow = end < limit
        bits = self.warps.active[warps]
        self.recorder.begin(warps, first, end - first + is_flow, _popcount(bits))
        lanes = as_lanes(warps, bits)
        s: Lanes = slice(None) if len(lanes) == len(self.state.lanes) else lanes
        index = first
        try:
            for index in range(first, end):
                (self._steps[index] or self._prepare(index))(s)
            self.warps.next[warps] = end
            if is_flow:
                index = end
                self._flow(instructions[end], end, warps)
        except ValueError as error:
            raise ExecutionError(self._report(instructions[index], error)) from error

    def _flow(self, i: Instruction, index: int, warps: NDArray[Any]) -> None:
        taken = self.warps.active.copy()
        if i.guard:
            taken &= as_bits(self.state.predicate(i.guard)(slice(None)))
        if i.op != "BAR":
            for operand in i.operands:
                taken &= as_bits(self.state.condition(operand))
        self.recorder.note("lanes", index, _popcount(taken))
        self.warps.step(i, warps, taken[warps])

    # ---- instructions become steps when they are first executed

    def _prepare(self, index: int) -> Step:
        i = self.program.instructions[index]
        if i.op in ("LDG", "STG", "LD", "ST"):
            step = self._global(i, index)
        elif i.op in ("LDS", "STS"):
            step = self._shared(i, index)
        elif i.op == "ATOMS":
            step = self._atomic(i, index)
        elif i.op in ("LDL", "STL"):
            step = self._local(i, index)
        else:
            step = step_of(i, self.state)
        self._steps[index] = step = self._guarded(step, i.guard, index) if i.guard else step
        return step

    def _guarded(self, step: Step, guard: str, index: int) -> Step:
        holds, lanes = self.state.predicate(guard), self.state.lanes

        def guarded(s: Lanes) -> None:
            chosen = holds(s)
            if chosen.all():
                step(s)
                return
            some = lanes[s][chosen]
            self.recorder.note("lanes", index, self._per_warp(some))
            if len(some):
                step(some)

        return guarded

    def _per_warp(self, lanes: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(lanes // WARP, minlength=len(self.warps.active))

    def _global(self, i: Instruction, index: int) -> Step:
        access, state = Access(i, self.state), self.state
        move = access.store if access.is_store else access.load

        def step(s: Lanes) -> None:
            lanes, address = state.lanes[s], access.address(s)
            access.check_aligned(lanes, address)
            parts = self.memory.parts(access, lanes, address)
            touched = sectors(lanes // WARP, address)
            self.recorder.note("sectors", index, np.bincount(touched >> WARP_SHIFT, minlength=len(self.warps.active)))
            for buffer, part in parts:
                is_all = isinstance(part, slice)
                move(s if is_all else lanes[part], buffer.bytes, address[part] - buffer.base)
                own = touched if is_all else sectors(lanes[part] // WARP, address[part])
                self.accessed.append((buffer.name, access.is_store, own))

        return step

    def _shared(self, i: Instruction, index: int) -> Step:
        access = Access(i, self.state)
        move, base = access.store if access.is_store else access.load, self.block_of * self.stride

        def step(s: Lanes) -> None:
            lanes, address = self._shared_address(access, s)
            cycles = wavefronts(lanes, address, access.size, len(self.warps.active))
            self.recorder.note("smem_cycles", index, cycles)
            move(s, self.shared, address + base[s])

        return step

    def _shared_address(self, access: Access, s: Lanes) -> tuple[NDArray[Any], NDArray[Any]]:
        lanes, address = self.state.lanes[s], access.address(s)
        access.check_aligned(lanes, address)
        inside = (address >= 0) & (address + access.size <= self.smem_bytes)
        check(inside, lanes, address, f"is not in the {self.smem_bytes} bytes of shared memory")
        return lanes, address

    def _atomic(self, i: Instruction, index: int) -> Step:
        atomic, base = Atomic(i, self.state), self.block_of * self.stride

        def step(s: Lanes) -> None:
            lanes, address = self._shared_address(atomic, s)
            self.recorder.note("smem_cycles", index, turns(lanes, address, len(self.warps.active)))
            atomic.apply(s, self.shared, address + base[s])

        return step

    def _local(self, i: Instruction, index: int) -> Step:
        access, state = Access(i, self.state), self.state
        move = access.store if access.is_store else access.load
        if self._local_memory is None:
            self._local_memory = np.full(LOCAL_BYTES * len(state.lanes), 0xFF, np.uint8)
        memory = self._local_memory

        def step(s: Lanes) -> None:
            lanes, address = state.lanes[s], access.address(s)
            access.check_aligned(lanes, address)
            inside = (address >= 0) & (address + access.size <= LOCAL_BYTES)
            check(inside, lanes, address, f"is not in the {LOCAL_BYTES} bytes of local memory")
            touched = local_sectors(lanes, address, access.size)
            self.recorder.note("sectors", index, np.bincount(touched >> WARP_SHIFT, minlength=len(self.warps.active)))
            self.accessed.append((LOCAL, access.is_store, touched))
            move(s, memory, address + LOCAL_BYTES * lanes)

        return step

    # ---- what comes out

    def _report(self, i: Instruction, error: ValueError) -> str:
        where = ""
        if isinstance(error, LaneError):
            block, thread = divmod(error.lane, self.warps_per_block * WARP)
            where = f"thread {thread} of block {self.blocks[block]}: "
        return f"{self.program.name} {i}: {where}{error}"

    def traces(self) -> Iterator[tuple[Index, BlockTrace]]:
        """Each block's index and trace."""
        warps = self.recorder.traces()
        accessed = _by_block(self.accessed, self.warps_per_block, len(self.blocks))
        for n, block in enumerate(self.blocks):
            own = warps[n * self.warps_per_block : (n + 1) * self.warps_per_block]
            yield block, BlockTrace(own, self._accesses(n), accessed[n, False], accessed[n, True])

    def _accesses(self, block: int) -> list[tuple[str, bool, NDArray[Any]]]:
        first, after = (n * self.warps_per_block << WARP_SHIFT for n in (block, block + 1))
        parts = (
            (name, is_store, keys[(keys >= first) & (keys < after)] - first) for name, is_store, keys in self.accessed
        )
        return [part for part in parts if len(part[2])]


def _by_block(
    accessed: list[tuple[str, bool, NDArray[Any]]], warps_per_block: int, blocks: int
) -> dict[tuple[int, bool], dict[str, NDArray[Any]]]:
    """The sectors of every buffer, by block and whether they were written."""
    result: dict[tuple[int, bool], dict[str, NDArray[Any]]] = {
        key: {} for key in itertools.product(range(blocks), (False, True))
    }
    for name, is_store in sorted({entry[:2] for entry in accessed}):
        keys = np.concatenate([keys for *which, keys in accessed if which == [name, is_store]])
        block_of, sector = (keys >> WARP_SHIFT) // warps_per_block, keys & SECTOR_MASK
        for block in np.unique(block_of):
            result[int(block), is_store][name] = np.unique(sector[block_of == block])
    return result


def _popcount(bits: NDArray[Any]) -> NDArray[Any]:
    return np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1).sum(1)
