"""Draws the committed results: one PNG or more for each table, beside it.

python -m benchmarks.plot [folder ...]          default: every folder of benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.command import RESULTS, has_packages


def main(arguments: list[str] | None = None) -> int:
    """Draws and says what; returns the exit status."""
    line = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw the results.")
    line.add_argument("folders", type=Path, nargs="*", help="of results (default: all in benchmarks/results)")
    folders = line.parse_args(arguments).folders or sorted(path for path in RESULTS.glob("*") if path.is_dir())
    if not has_packages("matplotlib"):
        return 1
    from benchmarks import pictures

    for folder in folders:
        for file in pictures.draw(folder):
            print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
