"""README.md: its commands run, its tables are current, and the files that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import backends, info

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    """Every command of a bash block, without its comment."""
    lines = "".join(blocks("bash")).splitlines()
    return [command for line in lines if (command := line.partition("#")[0].strip())]


@pytest.mark.long
@pytest.mark.parametrize("code", blocks("python"), ids=["function", "module", "patch"])
def test_python_blocks_run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_first_block_explains_itself() -> None:
    code = blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("cpu: " if backends.get("cpu").why_missing() is None else "torch: ")


@pytest.mark.long
def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        program, *arguments = command.split()
        if program == "make":
            assert arguments[0] in targets, command
        elif program == "pip":
            assert arguments == ["install", "."], command  # tests/install runs it
        else:
            assert program in ("python", ".venv/bin/python"), command
            is_module = arguments[0] == "-m"
            path = arguments[1].replace(".", "/") + ".py" if is_module else arguments[0]
            assert (ROOT / path).exists(), command
            done = subprocess.run(
                [sys.executable, *arguments[: 1 + is_module], "--help"], cwd=ROOT, capture_output=True
            )
            assert done.returncode == 0, command
    assert {"make demo", "make test", "pip install ."} <= set(commands())


def test_files_named_are_there() -> None:
    names = re.findall(r"\]\(([\w./-]+)\)", README)
    names += [name for name in re.findall(r"`((?:tests|examples|benchmarks)/[\w./]+\.py)`", README)]
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_support_table_is_the_generated_one() -> None:
    table = re.search(r"<!-- support -->\n(.*?)\n<!-- /support -->", README, re.DOTALL)
    assert table is not None and table.group(1) == info.support_table()


def test_length() -> None:
    assert len(README.splitlines()) <= 160
