"""The parts of make gpu that are no benchmarks, as far as a machine without a GPU goes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import parallel, products, provenance

ROOT = Path(__file__).parents[2]
SKIPPED = """import pytest
@pytest.mark.skip(reason="no reason")
def test_skipped():
    pass
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("more", "status"), [("", 5), ("def test_ran():\n    pass\n", 0)], ids=["none", "one"])
def test_a_session_in_which_no_test_ran_fails(tmp_path, workers, more, status):
    (tmp_path / "conftest.py").write_text(
        "from tests.support import must_run\npytest_addoption, pytest_configure = must_run.add_option, must_run.start\n"
    )
    (tmp_path / "test_it.py").write_text(SKIPPED + more)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--must-run", "-n", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout
    assert ("no test ran" in result.stdout) == (status != 0)


def test_sanitized_calls_are_compared_with_what_was_made_before(tmp_path):
    from fastattn import backends

    backend = "reference" if backends.get("cpu").why_missing() else "cpu"
    file, command = tmp_path / "expected", [sys.executable, "-m", "tests.support.sanitized_calls"]
    subprocess.run([*command, "make", file], cwd=ROOT, check=True)
    result = subprocess.run([*command, "run", file, backend], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "3 cases are right\n"), result.stderr
    (exact, eager, rounding), *others = torch.load(file)
    changed = [x | {"dq": 1.1 * x["dq"]} for x in (exact, eager)]
    torch.save([(*changed, rounding), *others], file)
    result = subprocess.run([*command, "run", file, backend], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "dq" in result.stderr


def test_products_are_measured_and_right(tmp_path):
    assert products.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    with (tmp_path / "products.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5 * 3
    assert {(row["dtype"], row["sums"]) for row in rows} == {(str(d).split(".")[1], sums) for d, sums in products.SUMS}
    assert all(float(row["error"]) < (1e-5 if row["dtype"] == "float32" else 1e-2) for row in rows)


def test_processes_are_bounded_by_cores_and_memory(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(192)))
    assert parallel.processes(torch.device("cpu")) == 16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, most in ((141 << 30, 16), (16 << 30, 5), (1 << 30, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert parallel.processes(torch.device("cuda", 0)) == most
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (141 << 30, 141 << 30))
    assert parallel.processes(torch.device("cuda", 0)) == 2


def test_what_a_benchmark_writes_makes_no_tree_dirty(monkeypatch):
    asked = []
    monkeypatch.setattr(provenance, "_git", lambda *arguments: asked.append(arguments) or "")
    origin = provenance.provenance(torch.device("cpu"))
    assert origin["dirty"] is False and len(origin["tiles"]) == 16
    (status,) = (arguments for arguments in asked if arguments[0] == "status")
    assert {":!benchmarks/results", ":!fastattn/triton_kernels/tiles.csv"} <= set(status)


def test_a_gpu_that_triton_does_not_take_has_nothing_to_tune_or_compile(monkeypatch, capsys):
    from benchmarks import tune, warm_up

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "V100")
    assert tune.main(["--quick"]) == 0 and warm_up.main(["--quick"]) == 0
    assert capsys.readouterr().out.count("8.0 and newer: there is nothing to ") == 2
