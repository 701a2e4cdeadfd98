"""The pages of docs/ that teach: their blocks run, and the pages that they name are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("index.md", "tutorial.md", "old_gpus.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


BLOCKS = [(page, i) for page in PAGES for i in range(len(blocks(page)))]


def test_there_are_blocks() -> None:
    assert len(blocks("tutorial.md")) >= 7
    assert len(re.findall(r"^## \d", (DOCS / "tutorial.md").read_text(), re.MULTILINE)) == 7


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::fastattn.FastattnFallbackWarning")
@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_block_runs(page: str, number: int) -> None:
    exec(compile(blocks(page)[number], f"docs/{page}, block {number}", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page: str) -> None:
    text = (DOCS / page).read_text()
    names = [DOCS / name for name in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", text)]
    names += [DOCS.parent / name for name in re.findall(r"`((?:examples|benchmarks|docs)/[\w./]+)`", text)]
    assert names
    assert [name for name in names if not name.exists()] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="requirements-docs.txt is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").stat().st_size > 100_000
