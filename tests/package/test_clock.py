"""The table of seconds that scripts/test.sh ends with."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import clock
from tests.support.clock import Clock

ROOT = Path(__file__).parents[2]
pytest_plugins = ["pytester"]

CONFTEST = """
from tests.support import clock
def pytest_addoption(parser): clock.add_option(parser)
def pytest_configure(config): clock.start(config)
"""
# Half a second in a set-up, which has to count as well.
SLOW = """
import time, pytest
@pytest.fixture
def late(): time.sleep(0.5)
def test_one(late): pass
def test_two(): pass
"""


def phase(nodeid: str, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, duration=seconds)


def table(lines: list[str]) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: cells for name, *cells in rows}


def test_shares_of_the_wall_clock_beside_their_budgets():
    a_clock = Clock({"set-up": 150, "kernels": 241}, workers=2)
    for nodeid in ("tests/cuda/test_a.py::test_x[::]", "tests/cuda/test_a.py::test_y", "tests/simt/test_b.py::test_x"):
        for seconds in (1.0, 200.0, 1.0):
            a_clock.pytest_runtest_logreport(phase(nodeid, seconds))
    a_clock.pytest_runtest_logreport(phase("tests/triton/test_c.py::test_x", 6.0))
    a_clock.pytest_runtest_logreport(phase("tests/package/deep/test_d.py::test_x", 4.0))
    lines = list(a_clock.lines(wall=320.0))
    assert table(lines) == {
        "part": ["tests", "seconds", "budget"],
        "set-up": ["", "150", "180"],
        "kernels": ["", "241", "240"],
        "cuda with simt and PTX": ["3", "303", "240"],
        "- tests/cuda": ["2", "202", ""],
        "- tests/simt": ["1", "101", ""],
        "triton": ["1", "3", "120"],
        "the rest": ["1", "2", "120"],
        "- tests/package": ["1", "2", ""],
        "starting, collecting, waiting": ["", "12", ""],
        "all tests, by the wall clock": ["5", "320", ""],
    }
    assert [line for line in lines if line.startswith("Over")] == [
        "Over its budget: kernels took 241 s, not 240.",
        "Over its budget: cuda with simt and PTX took 303 s, not 240.",
    ]
    assert re.fullmatch(r"2 workers on \d+ cores, Python 3\.\d+\.\d+, torch 2\.\S+\.", lines[lines.index("") + 1])


def test_every_folder_has_one_budget():
    named = [folder for tier in clock.TIERS for folder in tier.folders]
    assert len(named) == len(set(named))
    assert [tier.name for tier in clock.TIERS if not tier.folders] == ["the rest"]
    assert clock.tier_of("a new one").name == "the rest" and clock.tier_of("simt") is clock.tier_of("cuda")


def test_the_page_has_the_same_budgets():
    page = (ROOT / "docs" / "tests_clock.md").read_text()
    rows = dict(re.findall(r"^\| ([A-Za-z0-9 -]+) \| (\d+) \|$", page, re.MULTILINE))
    assert rows == {tier.name: str(tier.minutes) for tier in clock.STEPS + clock.TIERS}


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_pytest_ends_with_it(pytester: pytest.Pytester, workers: int, monkeypatch: pytest.MonkeyPatch):
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n")
    for folder in ("cuda", "package"):
        file = pytester.path / "tests" / folder / "test_slow.py"
        file.parent.mkdir(parents=True)
        file.write_text(SLOW)
    pytester.makeconftest(CONFTEST)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (pytester.path / "seconds").write_text("set-up 181\ncheck 7\n")
    arguments = ("tests", "--import-mode=importlib", f"-n{workers}", "--clock=seconds")
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret == 0
    lines = result.outlines[[" clock " in line for line in result.outlines].index(True) :]
    rows = table(lines)
    assert rows["set-up"] == ["", "181", "180"] and rows["check"] == ["", "7", "60"]
    assert [rows[name][0] for name in ("cuda with simt and PTX", "the rest")] == ["2", "2"]
    assert lines.count("Over its budget: set-up took 181 s, not 180.") == 1
    without = pytester.runpytest_subprocess(*arguments[:-1])
    assert without.ret == 0 and "budget" not in without.stdout.str()


def test_set_up_counts(pytester: pytest.Pytester):
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n")  # the root of the names of tests
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SLOW)
    a_clock = Clock({}, workers=1)
    assert pytester.inline_run(plugins=[a_clock]).ret == 0
    assert 0.5 <= a_clock.seconds["."] < 5 and a_clock.tests["."] == {
        f"test_set_up_counts.py::{name}" for name in ("test_one", "test_two")
    }
