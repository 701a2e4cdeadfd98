"""What every benchmark's command line has: the device, how much is measured, what is left out, where it is written."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from benchmarks.provenance import folder_name

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")


class Command(NamedTuple):
    """One call of a benchmark."""

    device: torch.device
    size: str  # "smoke", "quick" or "full"
    pattern: re.Pattern[str]
    folder: Path  # for results

    def sized(self, smoke: T, quick: T, full: T) -> T:
        """What belongs to the size."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.size]

    def wants(self, *names: object) -> bool:
        """Whether what these describe is to be measured."""
        return self.pattern.search(" ".join(map(str, names))) is not None


def parse(name: str, description: str, arguments: list[str] | None) -> Command | None:
    """The command line of benchmarks.<name>; None, with a word on stderr, if there is nothing to measure on."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few cases, in about two minutes")
    size.add_argument("--smoke", action="store_true", help="tiny cases, on any machine, in seconds")
    parser.add_argument("--filter", type=re.compile, default="", metavar="REGEX", help="measure only what it finds")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU; --smoke takes what is there")
    parser.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results/<device>)")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and options.device != "cpu" and not (options.smoke and options.device is None):
        hint = "see python -m fastattn.info, or give --device cpu"
        print(f"no CUDA device that torch can use: {hint}; nothing was measured", file=sys.stderr)
        return None
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    chosen = "smoke" if options.smoke else "quick" if options.quick else "full"
    return Command(device, chosen, re.compile(options.filter), options.out or RESULTS / folder_name(device))
