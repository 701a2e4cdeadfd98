"""The clock of the tests: what each folder of tests takes of the wall clock, beside what it may take.

`pytest --clock=FILE` prints it at the end, as a table in Markdown. FILE has lines such as "set-up 143": the seconds of
what scripts did before the tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Tier:
    """What has one budget: a step of the scripts of that name, or folders of tests; without folders, all other ones."""

    name: str
    minutes: float  # of the wall clock, on two idle cores and from nothing
    folders: tuple[str, ...] = ()


STEPS = (Tier("set-up", 3), Tier("kernels", 4), Tier("check", 1))
TIERS = (
    Tier("attention and cpu", 2, ("attention", "cpu")),
    Tier("cuda with simt and PTX", 4, ("cuda", "simt")),
    Tier("triton", 2, ("triton",)),
    Tier("nmt and wmt14", 2, ("nmt", "wmt14")),
    Tier("the rest", 2),
)


def tier_of(folder: str) -> Tier:
    """The tier whose budget the folder of tests is on."""
    return next((tier for tier in TIERS if folder in tier.folders), TIERS[-1])


class Clock:
    """A pytest plugin that adds up what the tests take and prints it."""

    def __init__(self, steps: Mapping[str, float], workers: int) -> None:
        self.steps, self.workers = steps, workers
        self.begun = time.monotonic()
        self.seconds: Counter[str] = Counter()  # by folder, over all workers
        self.tests: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for the set-up, the call and the teardown of each test, of every worker."""
        folder = folder_of(report.nodeid)
        self.seconds[folder] += report.duration
        self.tests.setdefault(folder, set()).add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        wall = time.monotonic() - self.begun
        terminalreporter.section("clock", sep="=")
        for line in self.lines(wall):
            terminalreporter.write_line(line)

    def lines(self, wall: float) -> Iterator[str]:
        """The table, what it was measured on, and the budgets that are passed."""
        shares = {folder: seconds / self.workers for folder, seconds in self.seconds.items()}
        counts = {folder: len(tests) for folder, tests in self.tests.items()}
        passed = []

        def row(name: str, tests: int | str, seconds: float, minutes: float | None = None) -> str:
            if minutes is not None and seconds > 60 * minutes:
                passed.append(f"Over its budget: {name} took {seconds:.0f} s, not {60 * minutes:.0f}.")
            return f"| {name} | {tests} | {seconds:.0f} | {f'{60 * minutes:.0f}' if minutes is not None else ''} |"

        yield "| part | tests | seconds | budget |"
        yield "|---|---:|---:|---:|"
        for step in STEPS:
            if step.name in self.steps:
                yield row(step.name, "", self.steps[step.name], step.minutes)
        for tier in TIERS:
            folders = sorted(folder for folder in shares if tier_of(folder) is tier)
            if folders:
                total = sum(shares[folder] for folder in folders)
                yield row(tier.name, sum(counts[folder] for folder in folders), total, tier.minutes)
            for folder in folders if folders != [tier.name] else ():
                yield row(f"- tests/{folder}", counts[folder], shares[folder])
        yield row("starting, collecting, waiting", "", max(0.0, wall - sum(shares.values())))
        yield row("all tests, by the wall clock", sum(counts.values()), wall)
        yield ""
        yield f"{self.machine()}."
        yield from passed

    def machine(self) -> str:
        """What the seconds are of."""
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        torch = importlib.metadata.version("torch")
        return f"{workers} on {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch}"


def folder_of(nodeid: str) -> str:
    """The folder of tests/ that a test is in: "cuda" for "tests/cuda/test_build.py::test_that"."""
    folders = Path(nodeid.partition("::")[0]).parts[:-1]
    return folders[1] if len(folders) > 1 else "."


def read_steps(lines: Iterable[str]) -> dict[str, float]:
    """Seconds by step."""
    pairs = (line.rpartition(" ") for line in lines)
    return {name: float(seconds) for name, _, seconds in pairs if name}


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--clock", type=Path, metavar="FILE", help="seconds by folder at the end, those of FILE before them"
    )


def start(config: pytest.Config) -> None:
    """Starts the clock where results come together: not in the workers of xdist."""
    file: Path | None = config.getoption("clock")
    if file is not None and not hasattr(config, "workerinput"):
        steps = read_steps(file.read_text().splitlines() if file.exists() else ())
        config.pluginmanager.register(Clock(steps, len(config.getoption("tx", None) or [""])), "clock")
