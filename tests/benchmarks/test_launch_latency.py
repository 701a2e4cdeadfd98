"""The benchmark of the host's part runs without a GPU and times every layer."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastattn._launcher", reason="fastattn._launcher is not built: it takes a C++ compiler")
ROOT = Path(__file__).parents[2]


def test_smoke(tmp_path):
    """A process of its own, whose driver is the stub."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.launch_latency", "--smoke", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "launch_latency.csv").open() as file:
        rows = {row.pop("op"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    assert all(0 < row["min_us"] <= row["p50_us"] <= row["p80_us"] for row in rows.values())
    for inner, outer in (("pack", "launch"), ("launch", "operator"), ("operator", "forward, fastattn")):
        assert rows[inner]["min_us"] < 2 * rows[outer]["min_us"], (inner, outer)
    if importlib.util.find_spec("triton"):
        assert rows["Triton's kernel choice and launch"]["min_us"] > 0
        assert rows["Triton's kernel choice and launch, backward"]["min_us"] > 0
    origin = json.loads((tmp_path / "launch_latency.json").read_text())
    assert origin["versions"]["torch"] and origin["size"] == "smoke"
