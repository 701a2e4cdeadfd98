"""Types of options that the commands share."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """An option's value that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
