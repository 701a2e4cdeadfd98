"""Updates of a bounded number of tokens: pairs of similar length, each pair once per epoch.

An epoch's updates depend on the seed and the epoch alone. How many processes or accumulation steps share an update
changes nothing but who computes which of its pairs, and (epoch, index) is the whole position in the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class PaddingShare(NamedTuple):
    """Shares of token places that hold no token, in [0, 1); see `TokenBatches.padding_share`."""

    padded: float
    packed: float


class TokenBatches:
    """Division of sentence pairs into updates.

    An update holds pairs whose longer sides are of similar length, at most `tokens_per_update` ids on each side. One
    update of an epoch is smaller.

    Args:
        source_lengths, target_lengths: (pairs,) integers, ids of each sentence, its end included.
        tokens_per_update: most ids of a side, over all processes and accumulation steps.
        seed: decides the order of pairs and updates.
        max_length: pairs with a longer side are left out; `num_left_out` counts them.

    Raises:
        ValueError: lengths of different shapes, no pair at all, or a pair longer than an update.

    Source: "Attention Is All You Need", section 5.1.
    """

    def __init__(
        self,
        source_lengths: ArrayLike,
        target_lengths: ArrayLike,
        tokens_per_update: int = 25_000,
        seed: int = 1,
        max_length: int | None = None,
    ) -> None:
        self.source_lengths, self.target_lengths = np.asarray(source_lengths), np.asarray(target_lengths)
        if self.source_lengths.ndim != 1 or self.source_lengths.shape != self.target_lengths.shape:
            shapes = f"{self.source_lengths.shape} and {self.target_lengths.shape}"
            raise ValueError(f"source_lengths, target_lengths: must be (pairs,) both, got {shapes}")
        longest = self._longer_side = np.maximum(self.source_lengths, self.target_lengths)
        self._pairs = np.flatnonzero(longest <= (np.inf if max_length is None else max_length))
        self.num_left_out = longest.size - self._pairs.size
        if not self._pairs.size:
            raise ValueError(f"source_lengths: no pair of at most max_length {max_length} ids among {longest.size}")
        worst = self._pairs[longest[self._pairs].argmax()]
        if longest[worst] > tokens_per_update:
            raise ValueError(
                f"tokens_per_update: must be at least {longest[worst]}, the ids of pair {worst}, got "
                f"{tokens_per_update}; or leave out long pairs with max_length"
            )
        self.tokens_per_update = tokens_per_update
        self.seed = seed

    def updates(self, epoch: int) -> list[NDArray[np.int64]]:
        """The pairs of every update of an epoch, in the order of training."""
        random = np.random.default_rng([self.seed, epoch])
        pairs = random.permutation(self._pairs)
        pairs = pairs[self._longer_side[pairs].argsort(kind="stable")]
        updates = np.split(pairs, self._cuts(pairs))
        return [updates[i] for i in random.permutation(len(updates))]

    def _cuts(self, pairs: NDArray[np.int64]) -> list[int]:
        """The places where an update ends and the next begins: as late as `tokens_per_update` allows."""
        totals = [np.append(0, lengths[pairs].cumsum(dtype=np.int64)) for lengths in self._sides()]
        cuts: list[int] = []
        start = 0
        while True:
            start = min(int(t.searchsorted(t[start] + self.tokens_per_update, side="right")) - 1 for t in totals)
            if start == pairs.size:
                return cuts
            cuts.append(start)

    def _sides(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.source_lengths, self.target_lengths

    def stream(self, epoch: int = 0, index: int = 0) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Endlessly (epoch, index, pairs of the update), from update `index` of `epoch` on.

        To go on after the update (epoch, index), start at (epoch, index + 1), also after an epoch's last one.
        """
        while True:
            updates = self.updates(epoch)
            for i in range(index, len(updates)):
                yield epoch, i, updates[i]
            epoch, index = epoch + 1, 0

    def share(self, update: NDArray[np.int64], part: int, parts: int) -> NDArray[np.int64]:
        """The pairs of an update that are part `part` of `parts`: neighbours in length, as many tokens as the others.

        Every pair is in exactly one part. A part is empty where there are fewer pairs than parts.

        Args:
            update: what `updates` or `stream` gave.
            part: in [0, parts); with accumulation, rank * steps + step.
            parts: processes times accumulation steps.

        Raises:
            ValueError: a part outside its range.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part: must lie in [0, parts {parts}), got {part}")
        tokens = self.source_lengths[update].astype(np.int64) + self.target_lengths[update]
        # A pair belongs to the part in whose share of all tokens the middle of its own falls.
        middles = tokens.cumsum() * 2 - tokens
        bounds = [int(middles.searchsorted(2 * tokens.sum() * p / parts)) for p in (part, part + 1)]
        return update[bounds[0] : bounds[1]]

    def padding_share(self, epoch: int = 0, parts: int = 1) -> PaddingShare:
        """The share of token places of an epoch that hold no token, if its batches are padded and if they are packed.

        The parts of an update are computed side by side, and the update is done when the largest part is. So each of
        its parts counts as many places as that one: (pairs) * (longest source + longest target) of a padded batch, the
        tokens of a packed one, which has no padding inside.

        Args:
            epoch: number of the epoch.
            parts: processes that share an update.
        """
        tokens = padded = packed = 0
        for update in self.updates(epoch):
            padded_sizes, packed_sizes = [], []
            for part in range(parts):
                pairs = self.share(update, part, parts)
                sides = [lengths[pairs] for lengths in self._sides()]
                padded_sizes.append(sum(pairs.size * int(side.max(initial=0)) for side in sides))
                packed_sizes.append(sum(int(side.sum(dtype=np.int64)) for side in sides))
            tokens += sum(packed_sizes)
            padded += parts * max(padded_sizes)
            packed += parts * max(packed_sizes)
        return PaddingShare(1 - tokens / padded, 1 - tokens / packed)
