"""The command line of every benchmark: what it names, and what it says where a package is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.command import Command, has_packages, parse, parser

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
INSTALL = 'pip install "fastattn[bench]", or from a clone pip install -e ".[bench]"'


def test_the_size_the_filter_and_the_folder():
    command = parse("x", "", ["--quick", "--device", "cpu", "--filter", "fwd", "float(16|32)", "--out", "folder"])
    assert (command.device, command.size, command.folder) == (CPU, "quick", Path("folder"))
    assert command.sized("smoke", "quick", "full") == "quick"
    assert command.wants("fwd", "float16") and not command.wants("fwd", "int8") and not command.wants("float16")
    everything = parse("x", "", ["--device", "cpu"])
    assert everything.size == "full" and everything.wants("anything") and everything.folder.parent.name == "results"


def test_a_benchmark_adds_options_and_leaves_sizes_out(capsys):
    line = parser("x", "", sizes=["quick"])
    line.add_argument("--dry-run", action="store_true")
    options = line.parse_args(["--dry-run"])
    assert options.dry_run and Command.of(options, CPU).size == "full"
    with pytest.raises(SystemExit):
        line.parse_args(["--smoke"])
    assert "--smoke" in capsys.readouterr().err


def test_only_missing_packages_are_named(capsys):
    assert has_packages("torch", "numpy") and capsys.readouterr().err == ""
    assert not has_packages("torch", "no_such_package", "nor_this")
    assert capsys.readouterr().err == f"not installed: no_such_package, nor_this; {INSTALL}\n"


RUN = """
import runpy, sys
for package in {missing}:
    sys.modules[package] = None
for name in {names}:
    sys.argv = ["", *({{"plot": [], "tune": []}}.get(name, ["--smoke"]))]
    try:
        runpy.run_module(f"benchmarks.{{name}}", run_name="__main__")
    except SystemExit as end:
        print(name, end.code)
"""


@pytest.mark.parametrize(
    "named",
    [
        {"attention": "tqdm", "plot": "matplotlib", "tune": "tqdm"},
        dict.fromkeys(("multi_head_attention", "transformer_step", "decode", "layers", "overhead"), "numpy"),
    ],
    ids=["extra", "numpy"],
)
def test_a_missing_package_is_one_line_that_names_the_extra(named):
    """A process of its own, which cannot import the packages from its start."""
    if importlib.util.find_spec("triton") is None:
        named = {name: package for name, package in named.items() if name != "tune"}
    script = RUN.format(missing=set(named.values()), names=list(named))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} 1" for name in named]
    assert done.stderr.splitlines() == [f"not installed: {package}; {INSTALL}" for package in named.values()]
