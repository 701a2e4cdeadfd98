"""docs/architecture.md: its map names every module and kernel file, and whatever it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def the_map() -> str:
    found = re.search(r"^## Map\n\n```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group(1)


def named_in(text: str) -> list[str]:
    """The paths of a map: unindented folders, and below them two spaces deep what is in them."""
    names, folder = [], ""
    for line in text.splitlines():
        if found := re.match(r"(?:  )?([\w./]+)", line):
            folder = folder if line.startswith("  ") else found.group(1)
            names.append(folder + found.group(1) * line.startswith("  "))
    return names


def missing_from(text: str, files: list[str]) -> list[str]:
    """The files that the map names neither by themselves nor by a folder around them."""
    names = named_in(text)
    folders = tuple(name for name in names if name.count("/") > 1 and name.endswith("/"))
    return [file for file in files if file not in names and not file.startswith(folders)]


def files_of_the_house() -> list[str]:
    python = [*(ROOT / "fastattn").rglob("*.py")]
    kernels = [file for end in ("*.cu", "*.cuh", "*.h", "*.cpp") for file in (ROOT / "csrc").rglob(end)]
    return [str(file.relative_to(ROOT)) for file in sorted(python + kernels)]


def test_the_map_is_of_what_is_there():
    names = named_in(the_map())
    assert {"fastattn/functional.py", "csrc/cpu/forward.h", "tests/support/cases.py", "scripts/"} <= {*names}
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_map_is_complete():
    assert len(files_of_the_house()) > 60
    assert missing_from(the_map(), files_of_the_house()) == []


@pytest.mark.parametrize("line", ["  functional.py", "  cpu/forward.h", "  nmt/"])
def test_a_line_that_is_missing_is_seen(line: str):
    without = "\n".join(row for row in the_map().splitlines() if not row.startswith(line))
    assert missing_from(without, files_of_the_house()) != []


def test_files_named_elsewhere_are_there():
    names = re.findall(r"`((?:fastattn|csrc|tests|benchmarks|examples|scripts)/[\w./]+)`", PAGE)
    names += [f"docs/{name}" for name in re.findall(r"\]\(([\w./]+)\)", PAGE)]
    assert len({*names}) > 40
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_operation_has_its_columns():
    rows = re.findall(r"^\| .* \|$", PAGE.partition("## Where is")[2], re.MULTILINE)
    assert len(rows) > 10
    for row in rows[1:]:  # below the header
        assert all(f"*{column}* " in row for column in ("oracle", "tests")), row


def test_pictures_are_closed():
    assert PAGE.count("```mermaid") == 5
    assert PAGE.count("```") % 2 == 0
