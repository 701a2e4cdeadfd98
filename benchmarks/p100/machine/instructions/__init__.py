"""The semantics of the instructions of sm_60, except for memory and the flow of control.

NVIDIA documents the instructions by their names only; their semantics here are what the compiler's code for known
functions requires. An instruction that is not understood is an error, never skipped.
"""

from __future__ import annotations

from ..sass import Instruction
from ..state import State, Step
from . import bits, comparisons, floats, integers, moves
from .table import not_understood

_TABLE = floats.TABLE | integers.TABLE | bits.TABLE | comparisons.TABLE | moves.TABLE


def step_of(i: Instruction, state: State) -> Step:
    """The instruction on this state, without its guard.

    Raises:
        ValueError: the operation, a modifier or an operand is not understood.
    """
    if i.op not in _TABLE:
        raise not_understood(i)
    build, known = _TABLE[i.op]
    if not known.issuperset(i.modifiers):
        raise not_understood(i)
    return build(i, state)
