"""Training and test sentences that never meet: the English side's checksum decides on which side a pair falls."""

from __future__ import annotations

import zlib
from random import Random

from .sentences import sample_sentence

TEST_SHARE = 50  # one sentence in 50 is kept for testing


def is_test_sentence(english: str) -> bool:
    """True for the sentences that no training set contains."""
    return zlib.crc32(english.encode()) % TEST_SHARE == 0


def draw_pairs(count: int, seed: int, test: bool = False) -> list[tuple[str, str]]:
    """Draws `count` different (English, German) pairs.

    Args:
        count: int, number of pairs.
        seed: int; the same seed draws the same pairs.
        test: bool, draw from the sentences kept for testing instead of the training sentences.
    """
    rng = Random(f"{seed} {test}")
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        english, german = sample_sentence(rng)
        if is_test_sentence(english) == test:
            pairs[english] = german
    return list(pairs.items())
