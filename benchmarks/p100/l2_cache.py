"""A block's share of the L2 cache, which decides how much of the block's traffic reaches DRAM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class CacheShare:
    """A write-back cache with least-recently-used replacement: a written sector goes to DRAM when it is evicted.

    Args:
        sectors: its capacity.
    """

    def __init__(self, sectors: int) -> None:
        self._capacity = sectors
        self._is_dirty: OrderedDict[int, bool] = OrderedDict()  # the most recently used comes last

    def read(self, sectors: Iterable[int]) -> list[int]:
        """Read sectors and return the misses, which come from DRAM."""
        return [sector for sector in sectors if not self._use(sector)]

    def write(self, sectors: Iterable[int]) -> list[int]:
        """Write whole sectors and return those that this makes dirty: each will be written back to DRAM once."""
        made_dirty = []
        for sector in sectors:
            self._use(sector)
            if not self._is_dirty[sector]:
                self._is_dirty[sector] = True
                made_dirty.append(sector)
        return made_dirty

    def _use(self, sector: int) -> bool:
        """Make it the most recently used sector; true if it was a hit."""
        is_hit = sector in self._is_dirty
        self._is_dirty[sector] = self._is_dirty.pop(sector, False)
        if len(self._is_dirty) > self._capacity:
            self._is_dirty.popitem(last=False)
        return is_hit
