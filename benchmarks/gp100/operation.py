"""The table of what instructions mean: each operation is a function from an instruction to a step on the state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .sass import Instruction
from .state import Getter, State, Step

Build = Callable[[Instruction, State], Step]
OPERATIONS: dict[str, tuple[Build, frozenset[str]]] = {}


def operation(names: str, modifiers: str = "") -> Callable[[Build], Build]:
    """Enters a function for these operations, and the modifiers it understands."""

    def enter(build: Build) -> Build:
        for name in names.split():
            OPERATIONS[name] = build, frozenset(modifiers.split())
        return build

    return enter


def step_of(instruction: Instruction, state: State) -> Step:
    """The instruction on this state, without its guard.

    Raises:
        ValueError: the operation, a modifier or an operand is not understood.
    """
    build, known = OPERATIONS.get(instruction.op, (None, frozenset()))
    unknown = [modifier for modifier in instruction.modifiers if modifier not in known]
    if build is None or unknown:
        raise ValueError(f"instruction: not understood: {instruction}")
    return build(instruction, state)


# ---- what several of them share ----

COMPARISONS = "F LT EQ LE GT NE GE T NUM LTU EQU LEU GTU NEU GEU NAN AND OR XOR"


def comparison(modifiers: tuple[str, ...]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The comparison that the modifiers name; U means: or one of them is NaN."""
    (name,) = (modifier for modifier in modifiers if modifier in _COMPARE)
    return _COMPARE[name]


def _not(compare: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda a, b: ~compare(a, b)


def _ordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == a) & (b == b)


_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "F": lambda a, b: np.zeros(np.broadcast(a, b).shape, bool),
    "T": lambda a, b: np.ones(np.broadcast(a, b).shape, bool),
    "LT": np.less,
    "EQ": np.equal,
    "LE": np.less_equal,
    "GT": np.greater,
    "NE": lambda a, b: (a != b) & _ordered(a, b),
    "GE": np.greater_equal,
    "NUM": _ordered,
    "NAN": _not(_ordered),
    "LTU": _not(np.greater_equal),
    "EQU": lambda a, b: (a == b) | ~_ordered(a, b),
    "LEU": _not(np.greater),
    "GTU": _not(np.less_equal),
    "NEU": np.not_equal,
    "GEU": _not(np.less),
}
LOGIC = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def set_predicates(i: Instruction, state: State, holds: Getter) -> Step:
    """Two predicates: whether it holds, and whether it does not, each combined with the last operand."""
    combine = LOGIC[i.modifiers[-1]]
    yes, no, other = (*map(state.result_predicate, i.operands[:2]), state.predicate(i.operands[-1]))

    def step(s):
        result, given = holds(s), other(s)
        yes[s] = combine(result, given)
        no[s] = combine(~result, given)

    return step


def set_register(i: Instruction, state: State, holds: Getter) -> Step:
    """All bits of a register, or with BF the float 1, where it holds, combined with the last operand."""
    combine, other, row = LOGIC[i.modifiers[-1]], state.predicate(i.operands[-1]), state.result(i.operands[0])
    true, false = np.uint32(0x3F800000 if "BF" in i.modifiers else 0xFFFFFFFF), np.uint32(0)

    def step(s):
        value = np.where(combine(holds(s), other(s)), true, false)
        row[s] = value
        if i.operands[0].endswith(".CC"):
            state.set_flags(s, value.astype(np.int64))

    return step
