"""The flow of control of warps: each has an instruction, active lanes, and a stack of lanes that wait elsewhere.

SSY, PBK and CAL put the active lanes on the stack, to go on at their target or, for CAL, behind it. A branch that only
some lanes take puts these there; which side the hardware executes first is not known. Lanes that execute SYNC, BRK, RET
or EXIT are no longer active; BRK and RET take them off what has been put on the stack since PBK or CAL, EXIT off all of
it. A warp without active lanes goes on with the uppermost entry that has lanes; it is finished when there is none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sass import Instruction
from .state import WARP

DEPTH = 64
# Kinds of stack entries, and the instructions whose lanes leave them.
_PUSHED = {"SSY": 1, "PBK": 2, "CAL": 3}
_DIVERGED = 4
_LEFT_BY = {"SYNC": 1, "BRK": 2, "RET": 3}
OPERATIONS = frozenset({"BRA", "EXIT", "BAR", *_PUSHED, *_LEFT_BY})


class Warps:
    """The warps of some blocks and where each of them stands.

    Args:
        active: a bit mask for each warp: the lanes that begin.
    """

    def __init__(self, active: NDArray[Any]) -> None:
        self.next = np.zeros(len(active), np.int64)
        self.active = active.astype(np.uint32)
        self.alive = self.active.copy()
        self.is_waiting = np.zeros(len(active), bool)
        self._height = np.zeros(len(active), np.int64)
        self._kind = np.zeros((len(active), DEPTH), np.int8)
        self._target = np.zeros((len(active), DEPTH), np.int64)
        self._lanes = np.zeros((len(active), DEPTH), np.uint32)

    def group(self) -> tuple[NDArray[Any], int, int] | None:
        """The warps that are furthest behind, their instruction, and the one where others wait for them."""
        ready = np.flatnonzero((self.active != 0) & ~self.is_waiting)
        if not len(ready):
            return None
        where = self.next[ready]
        first = int(where.min())
        others = where[where > first]
        return ready[where == first], first, int(others.min()) if len(others) else 1 << 62

    def step(self, i: Instruction, warps: NDArray[Any], taken: NDArray[Any]) -> None:
        """Execute the instruction at which these warps stand with the lanes `taken`, which its guard allows."""
        behind = self.next[warps] + 1
        if i.op == "BRA":
            self._branch(i, warps, taken, behind)
        elif i.op in _PUSHED:
            if (taken != self.active[warps]).any():
                raise ValueError("only some lanes execute it")
            is_call = i.op == "CAL"
            self._push(warps, _PUSHED[i.op], behind if is_call else _target(i), taken)
            self.next[warps] = _target(i) if is_call else behind
        elif i.op == "BAR":
            self.next[warps] = behind
            if i.modifiers != ("SYNC",) or i.operands != ("0x0",):
                raise ValueError("no other barrier than BAR.SYNC 0 is understood")
            if (taken != self.alive[warps]).any():
                raise ValueError("it is executed by some of the warp's lanes and not by others")
            self.is_waiting[warps] = True
        else:
            self.next[warps] = behind
            self._leave(warps, taken, _LEFT_BY.get(i.op))

    def _branch(self, i: Instruction, warps: NDArray[Any], taken: NDArray[Any], behind: NDArray[Any]) -> None:
        rest = self.active[warps] & ~taken
        diverges = (rest != 0) & (taken != 0)
        self.next[warps] = np.where(rest == 0, _target(i), behind)
        self._push(warps[diverges], _DIVERGED, _target(i), taken[diverges])
        self.active[warps[diverges]] = rest[diverges]

    def _push(self, warps: NDArray[Any], kind: int, target: NDArray[Any] | int, lanes: NDArray[Any]) -> None:
        height = self._height[warps]
        if (height >= DEPTH).any():
            raise ValueError(f"the stack is higher than {DEPTH}")
        self._kind[warps, height], self._target[warps, height], self._lanes[warps, height] = kind, target, lanes
        self._height[warps] += 1

    def _leave(self, warps: NDArray[Any], lanes: NDArray[Any], kind: int | None) -> None:
        self.active[warps] &= ~lanes
        entries, height = np.arange(DEPTH), self._height[warps, None]
        if kind is None:
            self.alive[warps] &= ~lanes
            affected = np.ones((len(warps), DEPTH), bool)
        else:
            same = (self._kind[warps] == kind) & (entries < height)
            if not same.any(1).all():
                raise ValueError("there is nothing on the stack that it belongs to")
            affected = entries >= DEPTH - same[:, ::-1].argmax(1)[:, None]
        self._lanes[warps] = np.where(affected, self._lanes[warps] & ~lanes[:, None], self._lanes[warps])
        self._pop(warps)

    def _pop(self, warps: NDArray[Any]) -> None:
        while len(warps := warps[(self.active[warps] == 0) & (self._height[warps] > 0)]):
            self._height[warps] -= 1
            height = self._height[warps]
            self.active[warps] = self._lanes[warps, height]
            self.next[warps] = self._target[warps, height]

    def release(self) -> bool:
        """Open the barrier, once no warp can go on: those not finished wait there. True if there were any."""
        has_waited = bool(self.is_waiting.any())
        self.is_waiting[:] = False
        return has_waited


def _target(i: Instruction) -> int:
    if i.target is None:
        raise ValueError("it names no target")
    return i.target


def as_bits(holds: NDArray[Any]) -> NDArray[Any]:
    """The truth values of all lanes as one bit mask per warp."""
    return np.packbits(holds.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)[:, 0]


def as_lanes(warps: NDArray[Any], bits: NDArray[Any]) -> NDArray[Any]:
    """The numbers of the lanes whose bits are set in the masks of these warps."""
    lane = np.arange(WARP)
    return (warps[:, None] * WARP + lane)[bits[:, None] >> lane.astype(np.uint32) & np.uint32(1) != 0]
