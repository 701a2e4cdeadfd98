"""Moves: between registers, and between lanes."""

from __future__ import annotations

import numpy as np

from ..operand import TRUE_PREDICATE, Operand, register_number
from ..sass import Instruction
from ..state import WARP, Lanes, State, Step, Values
from .table import InstructionTable, not_understood

TABLE = InstructionTable()
_ALL_CODES = "0xf"  # the mask of all condition codes, whose order in it only P2R and R2P know


@TABLE.enter("MOV MOV32I I2I", "S32 U32 S16 S8")
def mov(i: Instruction, state: State) -> Step:
    """Move; or convert a signed byte to 16 bits, the only conversion between integers that is known."""
    if not {"S16", "S8"} & {*i.modifiers}:
        return state.set(i.operands[0], state.unsigned(i.operands[1]))
    if (i.op, i.modifiers) != ("I2I", ("S16", "S8")):
        raise not_understood(i)
    get = state.unsigned(i.operands[1])
    return state.set(i.operands[0], lambda s: get(s).astype(np.int8).astype(np.uint16))


@TABLE.enter("LDC", "U8")
def ldc(i: Instruction, state: State) -> Step:
    """Load a word or a byte of a constant bank."""
    constant = Operand.parse(i.operands[1])
    size, bank = (1 if i.modifiers else 4), state.constants.get(constant.number, b"")
    if constant.kind != "constant" or constant.offset + size > len(bank):
        raise not_understood(i)
    value = np.asarray(int.from_bytes(bank[constant.offset : constant.offset + size], "little"), np.uint32)
    return state.set(i.operands[0], lambda s: value)


@TABLE.enter("S2R")
def s2r(i: Instruction, state: State) -> Step:
    if i.operands[1] not in state.special:
        raise not_understood(i)
    values = state.special[i.operands[1]]
    return state.set(i.operands[0], lambda s: values[s])


@TABLE.enter("P2R")
def p2r(i: Instruction, state: State) -> Step:
    """Pack the predicates that the mask names into the bits of a register, whose others are those of another one.

    Or pack the condition codes.
    """
    what, other, mask = i.operands[1:]
    if what == "PR":
        weights = 1 << np.arange(TRUE_PREDICATE)[:, None] & int(mask, 0)
        rest = state.wide(other)
        return state.set(
            i.operands[0],
            lambda s: rest(s) & ~int(mask, 0) | (state.predicates[:TRUE_PREDICATE, s] * weights).sum(0),
        )
    if (what, other, mask) != ("CC", "RZ", _ALL_CODES):
        raise not_understood(i)
    return state.set(i.operands[0], lambda s: state.zero[s] + 2 * state.sign[s] + 4 * state.carry[s])


@TABLE.enter("R2P")
def r2p(i: Instruction, state: State) -> Step:
    """Unpack predicates that the mask names, or the condition codes, from the bits of a register or of a byte of it."""
    what, source, mask = i.operands
    source, _, byte = source.partition(".B")
    word, shift = state.wide(source), 8 * int(byte or 0)

    def bits(s: Lanes) -> Values:
        return word(s) >> shift

    def to_predicates(s: Lanes) -> None:
        for n in range(TRUE_PREDICATE):
            if int(mask, 0) >> n & 1:
                state.predicates[n, s] = bits(s) >> n & 1

    def to_condition_codes(s: Lanes) -> None:
        state.zero[s], state.sign[s], state.carry[s] = bits(s) & 1, bits(s) & 2, bits(s) >> 2

    if what == "PR":
        return to_predicates
    if (what, mask) != ("CC", _ALL_CODES):
        raise not_understood(i)
    return to_condition_codes


@TABLE.enter("SHFL", "IDX UP DOWN BFLY")
def shfl(i: Instruction, state: State) -> Step:
    """Shuffle: read the register of another lane; the predicate says whether that lane is in the segment.

    The last operand holds the last lane of a segment and, from bit 8 on, the bits that number the segments.
    """
    mode, source = i.modifiers[0], state.registers[register_number(i.operands[2])]
    valid, row = state.result_predicate(i.operands[0]), state.result(i.operands[1])
    operand, bounds = state.wide(i.operands[3]), state.wide(i.operands[4])

    def step(s: Lanes) -> None:
        own = state.lanes[s]
        lane, b, segment = own % WARP, operand(s) % WARP, bounds(s) >> 8 & 31
        last = lane & segment | bounds(s) & 31 & ~segment
        if mode == "IDX":
            other = lane & segment | b & ~segment
        else:
            other = {"UP": lane - b, "DOWN": lane + b, "BFLY": lane ^ b}[mode]
        is_valid = other >= last if mode == "UP" else other <= last
        from_lane = np.where(is_valid, own - lane + other, own)
        is_executing = np.zeros(len(state.lanes), bool)
        is_executing[s] = True
        if not is_executing[from_lane].all():
            raise ValueError("it reads from a lane that does not execute it")
        row[s] = source[from_lane]
        valid[s] = is_valid

    return step


@TABLE.enter("VOTE", "ALL ANY EQ")
def vote(i: Instruction, state: State) -> Step:
    """A ballot: one bit per lane whose predicate holds; and whether it holds for all, for any, or equally for all."""
    row, result = state.result(i.operands[0]), state.result_predicate(i.operands[1])
    holds = state.predicate(i.operands[2])

    def step(s: Lanes) -> None:
        own = state.lanes[s]
        bits, active = np.zeros((2, len(state.lanes) // WARP), np.int64)
        np.add.at(active, own // WARP, 1 << own % WARP)
        np.add.at(bits, own // WARP, np.where(holds(s), 1 << own % WARP, 0))
        is_all = bits == active
        row[s] = bits[own // WARP]
        result[s] = {"ALL": is_all, "ANY": bits != 0, "EQ": is_all | (bits == 0)}[i.modifiers[0]][own // WARP]

    return step


@TABLE.enter("NOP DEPBAR MEMBAR", "LE CTA GL SYS")
def nop(i: Instruction, state: State) -> Step:
    """Do nothing: waits and fences only concern time, and here results are available at once."""
    return lambda s: None
