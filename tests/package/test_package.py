"""What the package requires, and what it does when it is imported."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


def test_build_needs_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    requirements = ast.literal_eval(re.search(r"^requires = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    assert names == {"setuptools", "pybind11", "ninja"}


def test_versions_agree():
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert cited == project


@pytest.mark.parametrize(
    ("environment", "has_nvrtc"),
    [({}, True), ({"FASTATTN_BUILD_CUDA": "0"}, False), ({"FASTATTN_PREBUILT_KERNELS": "folder"}, False)],
    ids=str,
)
def test_the_build_asks_for_nvidias_compiler_where_it_compiles(environment: dict[str, str], has_nvrtc: bool):
    program = "import build_backend; print(*build_backend.get_requires_for_build_wheel())"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
    command, environment = [sys.executable, "-c", program], inherited | environment | {"PYTHONPATH": "scripts"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {requirement.split("=")[0] for requirement in done.stdout.split() if requirement.startswith("nvidia")}
    nvidia = {"nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}
    assert names == (nvidia if has_nvrtc and sys.platform == "linux" else set())


OPTIONAL = ("triton", "transformers", "flash_attn", "matplotlib", "sacrebleu", "tqdm")
IMPORT = f"""
import json, sys, time, torch
print("torch is there", file=sys.stderr, flush=True)
before, start = set(sys.modules), time.perf_counter()
import fastattn
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, optional=[name for name in {OPTIONAL} if name in set(sys.modules) - before])))
"""


class Import(NamedTuple):
    """One `import fastattn` after `import torch` in a new process."""

    seconds: float
    optional: list[str]  # packages loaded that fastattn does not require
    said: str  # on either stream, warnings included


def import_once() -> Import:
    command = [sys.executable, "-W", "always", "-c", IMPORT]
    result = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    *said, measured = result.stdout.splitlines()
    _, _, complaints = result.stderr.partition("torch is there\n")
    return Import(**json.loads(measured), said="".join(said) + complaints)


def test_import_is_silent_quick_and_loads_nothing_optional():
    first = import_once()
    assert (first.said, first.optional) == ("", [])
    # What runs beside it may slow it down: the best of three counts.
    assert first.seconds < 0.3 or min(import_once().seconds for _ in range(2)) < 0.3
