"""Instructions that move numbers: between registers, predicates and lanes."""

from __future__ import annotations

import numpy as np

from .operand import register_number
from .operation import LOGIC, operation, set_predicates, set_register
from .sass import Instruction
from .state import WARP, Getter, State, Step


@operation("MOV MOV32I")
def mov(i: Instruction, state: State) -> Step:
    return _copy(i, state, state.unsigned(i.operands[1]))


@operation("I2I", "S32 U32")
def i2i(i: Instruction, state: State) -> Step:
    return _copy(i, state, state.unsigned(i.operands[1]))


@operation("S2R")
def s2r(i: Instruction, state: State) -> Step:
    if i.operands[1] not in state.special:
        raise ValueError(f"instruction: not understood: {i}")
    values = state.special[i.operands[1]]
    return _copy(i, state, lambda s: values[s])


def _copy(i: Instruction, state: State, value: Getter) -> Step:
    row = state.result(i.operands[0])

    def step(s):
        row[s] = value(s)

    return step


@operation("SEL")
def sel(i: Instruction, state: State) -> Step:
    a, b, chosen = (*map(state.unsigned, i.operands[1:3]), state.predicate(i.operands[3]))
    return _copy(i, state, lambda s: np.where(chosen(s), a(s), b(s)))


@operation("PSETP", "AND OR XOR")
def psetp(i: Instruction, state: State) -> Step:
    return set_predicates(i, state, _combined(i, state, i.operands[2:4]))


@operation("PSET", "AND OR XOR BF")
def pset(i: Instruction, state: State) -> Step:
    return set_register(i, state, _combined(i, state, i.operands[1:3]))


def _combined(i: Instruction, state: State, operands: tuple[str, ...]) -> Getter:
    combine = LOGIC[next(modifier for modifier in i.modifiers if modifier in LOGIC)]
    a, b = map(state.predicate, operands)
    return lambda s: combine(a(s), b(s))


@operation("SHFL", "IDX UP DOWN BFLY")
def shfl(i: Instruction, state: State) -> Step:
    """The third operand's value in another lane of the warp; the predicate says whether that lane is in the segment.

    The last operand holds the last lane of a segment and, from bit 8 on, the bits that number the segments.
    """
    valid, row, source = (
        state.result_predicate(i.operands[0]),
        state.result(i.operands[1]),
        state.registers[register_number(i.operands[2])],
    )
    b, c = state.wide(i.operands[3]), state.wide(i.operands[4])

    def step(s):
        own = state.lanes[s]
        lane, distance, bounds = own % WARP, b(s) % WARP, c(s)
        segment = bounds >> 8 & 31
        first, last = lane & segment, lane & segment | bounds & 31 & ~segment
        other = {
            "IDX": lambda: first | distance & ~segment,
            "UP": lambda: lane - distance,
            "DOWN": lambda: lane + distance,
            "BFLY": lambda: lane ^ distance,
        }[i.modifiers[0]]()
        is_valid = other >= last if i.modifiers[0] == "UP" else other <= last
        from_lanes = np.where(is_valid, own - lane + other, own)
        executing = np.zeros(len(state.lanes), bool)
        executing[s] = True
        if not executing[from_lanes].all():
            raise ValueError("it reads a lane that does not execute it")
        row[s] = source[from_lanes]
        valid[s] = is_valid

    return step


@operation("VOTE", "ALL ANY EQ")
def vote(i: Instruction, state: State) -> Step:
    """A register with a bit for every lane, and a predicate: all, any or equally many of the warp's active lanes hold it."""
    row, predicate, holds = (
        state.result(i.operands[0]),
        state.result_predicate(i.operands[1]),
        state.predicate(i.operands[2]),
    )

    def step(s):
        own = state.lanes[s]
        bits, active = (np.zeros(len(state.lanes) // WARP, np.int64) for _ in range(2))
        np.add.at(active, own // WARP, 1 << own % WARP)
        np.add.at(bits, own // WARP, (1 << own % WARP) * holds(s))
        results = {"ANY": bits != 0, "ALL": bits == active, "EQ": (bits == 0) | (bits == active)}
        row[s] = bits[own // WARP]
        predicate[s] = results[i.modifiers[0]][own // WARP]

    return step


@operation("NOP DEPBAR MEMBAR", "LE CTA GL SYS")
def nothing(i: Instruction, state: State) -> Step:
    """What only concerns time: results are there at once."""
    return lambda s: None
