"""The instruction mix of a kernel: in its main loops, and as executed."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import chip
from .machine.sass import Program
from .static_analysis import bank_conflicts, loops

MAIN_LOOP_FFMA = 64  # a loop with at least as many multiply-adds is a main loop
_GROUPS = {op: op for op in ("FFMA", "LDS", "STS", "SHFL", "MUFU", "LDG", "STG")}
_FLOAT = dict.fromkeys(
    ("FADD", "FMUL", "FMNMX", "FSETP", "FADD32I", "FMUL32I", "FFMA32I", "FCMP", "FSET"), "other float"
)
GROUPS = (*_GROUPS, "other float", "integer", "other")


class Mix(NamedTuple):
    """Counts of the instructions that are executed, by group."""

    counts: dict[str, int]  # keys are GROUPS
    conflicts: int  # cycles lost to register-bank conflicts
    pairs: int

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def conflicts_per_256(self) -> float:
        """Register-bank conflicts for every 256 multiply-adds."""
        return 256 * self.conflicts / max(1, self.counts["FFMA"])


def mix(program: Program, times: NDArray[Any]) -> Mix:
    """The mix of a program.

    Args:
        program: the kernel.
        times: the number of executions of each of its instructions.
    """
    counts: Counter[str] = Counter(dict.fromkeys(GROUPS, 0))
    for instruction, n in zip(program.instructions, times.tolist(), strict=True):
        counts[_group(instruction.op)] += n
    pairs = np.array([instruction.pairs_with_next for instruction in program.instructions])
    return Mix(dict(counts), int(np.array(bank_conflicts(program)) @ times), int(pairs @ times))


def _group(op: str) -> str:
    arithmetic = "integer" if chip.TIMINGS[op].unit == chip.FP32 else "other"
    return _GROUPS.get(op) or _FLOAT.get(op, arithmetic)


def main_loops(program: Program) -> dict[str, Mix]:
    """The mix of one iteration of every main loop that contains no other one, by the addresses of its ends."""
    found: dict[tuple[int, int], Mix] = {}
    for first, last in loops(program):  # inner loops come first
        times = np.zeros(len(program.instructions), int)
        times[first : last + 1] = 1
        turn = mix(program, times)
        if turn.counts["FFMA"] >= MAIN_LOOP_FFMA and not any(first <= inner and end <= last for inner, end in found):
            found[first, last] = turn
    where = program.instructions
    return {f"{where[a].pc:#x} ... {where[b].pc:#x}": turn for (a, b), turn in sorted(found.items())}


HEADER = ("", *GROUPS, "conflicts per 256 FFMA", "pairs", "share of FFMA")


def row(name: str, m: Mix) -> tuple[str, ...]:
    """The row of a mix in a table with HEADER."""
    counts = (str(m.counts[group]) for group in GROUPS)
    share = m.counts["FFMA"] / max(1, m.total)
    return (name, *counts, f"{m.conflicts_per_256:.0f}", str(m.pairs), f"{share:.2f}")
