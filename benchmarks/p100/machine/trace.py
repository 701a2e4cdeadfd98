"""The record of what warps execute: instructions, lanes, accesses to memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIELDS = {"index": np.int32, "lanes": np.int8, "smem_cycles": np.int16, "sectors": np.int16}


@dataclass(frozen=True)
class WarpTrace:
    """A warp's instructions in the order of their execution; the arrays are equally long."""

    index: NDArray[np.int32]  # into the program's instructions
    lanes: NDArray[np.int8]  # the number of lanes that execute it: active, and not excluded by the guard
    smem_cycles: NDArray[np.int16]  # cycles of a load from shared memory or a store to it; else 0
    sectors: NDArray[np.int16]  # number of sectors of global memory accessed; else 0


@dataclass(frozen=True)
class BlockTrace:
    """The traces of a block's warps, and the sectors of global memory that it read and wrote, by the buffer's name."""

    warps: list[WarpTrace]
    # In the order of execution: the buffer, whether it is written, and warp << WARP_SHIFT | sector of each access.
    accesses: list[tuple[str, bool, NDArray[Any]]]
    read: dict[str, NDArray[Any]]  # sorted numbers of sectors
    written: dict[str, NDArray[Any]]


class TraceRecorder:
    """A recorder of the traces of many warps at once."""

    def __init__(self, warps: int) -> None:
        self._length = np.zeros(warps, np.int64)
        self._log: dict[str, NDArray[Any]] = {name: np.zeros((warps, 1024), kind) for name, kind in _FIELDS.items()}
        self._warps, self._begin, self._first = np.arange(warps), self._length, 0

    def begin(self, warps: NDArray[Any], first: int, count: int, lanes: NDArray[Any]) -> None:
        """Note that these warps execute `count` instructions from `first` on, each with so many lanes."""
        self._warps, self._begin, self._first = warps, self._length[warps], first
        self._length[warps] += count
        longest, room = int(self._length.max()), self._log["index"].shape[1]
        if longest > room:
            more = ((0, 0), (0, max(room, longest - room)))
            self._log = {name: np.pad(log, more) for name, log in self._log.items()}
        where = warps[:, None], self._begin[:, None] + np.arange(count)
        self._log["index"][where] = np.arange(first, first + count)
        self._log["lanes"][where] = lanes[:, None]

    def note(self, field: str, index: int, values: NDArray[Any]) -> None:
        """Note another number about one of these instructions; `values` has one for every warp there is."""
        self._log[field][self._warps, self._begin + index - self._first] = values[self._warps]

    def traces(self) -> list[WarpTrace]:
        """The traces of all warps."""
        return [
            WarpTrace(**{name: log[warp, :length].copy() for name, log in self._log.items()})
            for warp, length in enumerate(self._length)
        ]
