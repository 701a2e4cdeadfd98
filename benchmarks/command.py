"""The command line that all benchmarks share: device, size, what is left out, where results are written."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from benchmarks.provenance import folder_name

RESULTS = Path(__file__).parent / "results"
INSTALL = 'pip install "fastattn[bench]", or from a clone pip install -e ".[bench]"'
SIZES = {"quick": "few cases, in about two minutes", "smoke": "tiny cases, on any machine, in seconds"}
T = TypeVar("T")


class Command(NamedTuple):
    """One call of a benchmark."""

    device: torch.device
    size: str  # "smoke", "quick" or "full"
    patterns: tuple[re.Pattern[str], ...]
    folder: Path  # for results

    def sized(self, smoke: T, quick: T, full: T) -> T:
        """The argument that belongs to the size."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.size]

    def wants(self, *names: object) -> bool:
        """True if the text of these names has all patterns, and is to be measured."""
        text = " ".join(map(str, names))
        return all(pattern.search(text) for pattern in self.patterns)

    @classmethod
    def of(cls, options: argparse.Namespace, device: torch.device) -> Command:
        """The call that these options of `parser` mean on a device."""
        folder = options.out or RESULTS / folder_name(device)
        return cls(device, options.size, tuple(options.filter), folder)


def parser(name: str, description: str, sizes: Iterable[str] = SIZES) -> argparse.ArgumentParser:
    """The options of benchmarks.<name> that do not name a device; the benchmark may add its own."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    size = options.add_mutually_exclusive_group()
    for flag in sizes:
        size.add_argument(f"--{flag}", dest="size", action="store_const", const=flag, default="full", help=SIZES[flag])
    options.add_argument(
        "--filter", nargs="+", type=re.compile, default=[], metavar="REGEX", help="measure only what all of them find"
    )
    options.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results/<device>)")
    return options


def has_packages(*names: str) -> bool:
    """False, with a line on stderr that names the extra to install, if one of the packages is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; {INSTALL}", file=sys.stderr)
    return not missing


def parse(name: str, description: str, arguments: list[str] | None, packages: Iterable[str] = ()) -> Command | None:
    """The command line of benchmarks.<name>; None, with a line on stderr, if nothing can be measured.

    Args:
        name: of the module.
        description: for --help.
        arguments: of the command line; None for those of this process.
        packages: what the benchmark imports, when it runs, besides torch, numpy and the standard library.
    """
    line = parser(name, description)
    line.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU; --smoke takes what is there")
    options = line.parse_args(arguments)
    if not has_packages("numpy", *packages):
        return None
    has_gpu = torch.cuda.is_available()
    if not has_gpu and options.device != "cpu" and not (options.size == "smoke" and options.device is None):
        hint = "see python -m fastattn.info, or give --device cpu"
        print(f"no CUDA device that torch can use: {hint}; nothing was measured", file=sys.stderr)
        return None
    return Command.of(options, torch.device(options.device or ("cuda" if has_gpu else "cpu")))
