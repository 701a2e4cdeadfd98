"""What of a block's traffic reaches DRAM: its share of L2 as a list of the sectors used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class CacheShare:
    """Keeps the sectors used last; a sector written stays until it is pushed out, and is written to DRAM then.

    Args:
        sectors: how many it holds.
    """

    def __init__(self, sectors: int) -> None:
        self._capacity = sectors
        self._is_written: OrderedDict[int, bool] = OrderedDict()  # the one used last comes last

    def read(self, sectors: Iterable[int]) -> list[int]:
        """Those that have to be read from DRAM."""
        return [sector for sector in sectors if not self._use(sector)]

    def write(self, sectors: Iterable[int]) -> list[int]:
        """Those that will be written to DRAM once more because of this; whole sectors are written, nothing is read."""
        again = []
        for sector in sectors:
            self._use(sector)
            if not self._is_written[sector]:
                self._is_written[sector] = True
                again.append(sector)
        return again

    def _use(self, sector: int) -> bool:
        """Whether it was here; it is now."""
        was_here = sector in self._is_written
        self._is_written[sector] = self._is_written.pop(sector, False)
        if len(self._is_written) > self._capacity:
            self._is_written.popitem(last=False)
        return was_here
