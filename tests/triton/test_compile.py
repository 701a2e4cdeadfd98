"""The Triton kernels compiled for GPUs that are not here: what they take, and that common ones spill nothing."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from fastattn.triton_kernels import tiles

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "triton_resources.py"
TABLE = ROOT / "docs" / "triton_resources.csv"
ROWS = list(csv.DictReader(TABLE.open()))
SMEM_BYTES = 99 << 10  # of a block on the smallest of the GPUs that the rows for any GPU serve
EVERY = 19  # of the lines, which meets every kernel, dtype, head_dim and set of features; all lines take minutes


def command(script: Path, *options: str) -> subprocess.CompletedProcess:
    """The script's run, in a process of its own, because Triton may be interpreting here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, script, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.triton
@pytest.mark.skipif(
    triton.__version__ != ROWS[0]["triton"],
    reason=f"the table is that of Triton {ROWS[0]['triton']}, here is {triton.__version__}",
)
def test_the_table_is_that_of_these_kernels(request: pytest.FixtureRequest) -> None:
    result = command(SCRIPT, "--every", "1" if request.config.getoption("full") else str(EVERY))
    assert result.returncode == 0, f"{result.stdout}{result.stderr[-3000:]}\nIf this is meant: {SCRIPT.name} --write"


def test_the_lines_that_are_compared_meet_everything() -> None:
    some = ROWS[::EVERY]
    for column in ("kernel", "capability", "dtype", "head_dim", "features"):
        assert {row[column] for row in some} == {row[column] for row in ROWS}, column


@pytest.mark.triton
def test_kernels_compile_in_any_version_of_triton() -> None:
    """A difference to the table is no failure here, an error is."""
    result = command(SCRIPT, "--only", "float16", "64", "everything", "9.0", "--every", "4")
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr[-3000:]


@pytest.mark.triton
def test_a_changed_kernel_is_shown(tmp_path: Path) -> None:
    changed = tmp_path / "scripts" / SCRIPT.name
    changed.parent.mkdir()
    changed.write_text(SCRIPT.read_text())
    (tmp_path / "docs").mkdir()
    point = "fwd,8.0,float16,64,16,common"
    text, count = re.subn(rf"({point},\d+),0,", r"\1,8,", TABLE.read_text())
    assert count == 1
    (tmp_path / "docs" / TABLE.name).write_text(text)
    result = command(changed, "--only", *point.split(","))
    assert result.returncode == 1
    assert re.search(rf"^-{point},\d+,8,", result.stdout, re.M), result.stdout + result.stderr[-3000:]
    assert re.search(rf"^\+{point},\d+,", result.stdout, re.M)


# ---- the table ----


@pytest.mark.parametrize("head_dim", ["64", "128"])
def test_common_kernels_spill_no_register(head_dim: str) -> None:
    """But the gradient of a bias, which few calls need."""
    common = [row for row in ROWS if row["head_dim"] == head_dim and row["features"] == "common"]
    common = [row for row in common if row["kernel"] != "dbias"]
    assert len(common) > 20
    for row in common:
        assert row["spill_bytes"] == "0", row


def test_other_kernels_spill_little() -> None:
    """But the bias gradient of the largest heads in float32: all four of its operands are in registers."""
    for row in ROWS:
        if (row["kernel"], row["dtype"], row["head_dim"]) != ("dbias", "float32", "256"):
            assert int(row["spill_bytes"]) <= (400 if row["head_dim"] == "256" else 160), row


def test_shared_memory_suffices_everywhere() -> None:
    for row in ROWS:
        assert int(row["smem_bytes"]) <= SMEM_BYTES, row


def test_products_run_on_tensor_cores_in_the_tensors_dtype() -> None:
    names = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}
    for row in ROWS:
        assert {product.split(".")[1] for product in row["products"].split()} == {names[row["dtype"]]}, row


def test_rows_for_any_gpu_say_how_much_shared_memory_they_take() -> None:
    rows = [row for row in tiles.table() if row.capability is None]
    names = ("kernel", "dtype", "head_dim", "seqlen")
    for row in rows:
        dtype = str(row.dtype).removeprefix("torch.").removeprefix("b")  # float16 stands for bfloat16
        seqlen = "any" if row.seqlen == tiles.LONG else str(row.seqlen)
        of_row = [
            line for line in ROWS if tuple(line[n] for n in names) == (row.kernel, dtype, str(row.head_dim), seqlen)
        ]
        assert row.smem_bytes == max(int(line["smem_bytes"]) for line in of_row), row
