"""What warps have executed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FIELDS = {"index": np.int32, "lanes": np.int8, "smem_cycles": np.int16, "sectors": np.int16}


@dataclass(frozen=True)
class Trace:
    """A warp's instructions in the order of their execution; the arrays are equally long."""

    index: np.ndarray  # int32, into the program's instructions
    lanes: np.ndarray  # int8, how many lanes did it: active and not kept from it by the guard
    smem_cycles: np.ndarray  # int16, of a load from shared memory or a store to it; else 0
    sectors: np.ndarray  # int16, how many sectors of 32 bytes of global memory were accessed; else 0


@dataclass(frozen=True)
class BlockTrace:
    """A block's warps, and the sectors of 32 bytes that it read and wrote, by the name of the buffer."""

    warps: list[Trace]
    accesses: list[tuple[str, bool, np.ndarray]]  # in order: buffer, whether written, (warp << 48 | sector) of each
    read: dict[str, np.ndarray]  # sorted, the address of each divided by 32
    written: dict[str, np.ndarray]


class Recorder:
    """Writes the traces of many warps at once."""

    def __init__(self, warps: int):
        self._length = np.zeros(warps, np.int64)
        self._log = {name: np.zeros((warps, 1024), kind) for name, kind in _FIELDS.items()}
        self._warps, self._begin, self._first = np.arange(warps), self._length, 0

    def begin(self, warps: np.ndarray, first: int, count: int, lanes: np.ndarray) -> None:
        """These warps execute instructions, one behind the other, with so many lanes."""
        self._warps, self._begin, self._first = warps, self._length[warps], first
        self._length[warps] += count
        longest, room = int(self._length.max()), self._log["index"].shape[1]
        if longest > room:
            more = ((0, 0), (0, max(room, longest - room)))
            self._log = {name: np.pad(log, more) for name, log in self._log.items()}
        where = warps[:, None], self._begin[:, None] + np.arange(count)
        self._log["index"][where] = np.arange(first, first + count)
        self._log["lanes"][where] = lanes[:, None]

    def note(self, field: str, index: int, values: np.ndarray) -> None:
        """What is special about one of these instructions, for every warp there is."""
        self._log[field][self._warps, self._begin + index - self._first] = values[self._warps]

    def traces(self) -> list[Trace]:
        """Of every warp."""
        return [
            Trace(**{name: log[warp, :length].copy() for name, log in self._log.items()})
            for warp, length in enumerate(self._length)
        ]
