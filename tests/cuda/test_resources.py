"""Resources of the kernels on every architecture: the committed table, and the limits that no kernel may pass."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastattn.cuda_kernels import images
from fastattn.cuda_kernels.sources import ELEMENTS, Arch, KernelSources, unit

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "kernel_resources.py"
ROWS = list(csv.DictReader((ROOT / "docs" / "kernel_resources.csv").open()))
ARCHITECTURES = ("sm_60", "sm_70", "sm_75", "sm_80", "sm_90")


def test_the_table_is_that_of_this_build() -> None:
    installed = images.installed()
    if installed.reason or not any(arch.kind == "sm" for arch in installed.archs):
        pytest.skip(f"there is no machine code here: {installed.reason or 'only PTX was built'}")
    if installed.nvrtc != "12.9":
        pytest.skip(f"the table is that of NVRTC 12.9, this build of {installed.nvrtc}")
    assert installed.sources == KernelSources.read(ROOT / "csrc").digest, "csrc has changed since it was built"
    result = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}\nIf this is meant: {SCRIPT.name} --write"


def test_a_changed_build_is_shown(tmp_path: Path) -> None:
    changed = tmp_path / "scripts" / SCRIPT.name
    changed.parent.mkdir()
    changed.write_text(SCRIPT.read_text())
    table = (ROOT / "docs" / "kernel_resources.csv").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kernel_resources.csv").write_text(table.replace(",0,0,", ",8,0,", 1))
    if images.installed().reason:
        pytest.skip(f"there is no machine code here: {images.installed().reason}")
    result = subprocess.run([sys.executable, changed], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout.count(",8,0,") == 1


# The fullest tile, shaped for the P100, where it takes 252: two blocks have 256 for each thread. Nothing that leaves
# the P100's machine code as it is has brought it down.
AT_THE_LIMIT = {(arch, "attention_bwd_d64_64x64", "float32") for arch in ARCHITECTURES if arch != "sm_60"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_limits(architecture: str) -> None:
    rows = [row for row in ROWS if row["architecture"] == architecture]
    assert len(rows) <= 60
    for kernel, number in Counter(row["kernel"] for row in rows).items():
        by_tensor_cores = [unit(element, Arch.parse(architecture)) is not None for element in ELEMENTS]
        is_forward, is_mma = kernel.startswith("attention_fwd"), "_mma_" in kernel
        assert number == (by_tensor_cores.count(is_mma) if is_forward else len(ELEMENTS)), kernel
    for row in rows:
        assert int(row["spilled_bytes"]) == 0 and int(row["stack_bytes"]) == 0, row
        is_known = (row["architecture"], row["kernel"], row["element"]) in AT_THE_LIMIT
        assert (int(row["registers"]) < 255) != is_known, row  # there the assembler trades speed for registers
        assert int(row["shared_bytes"]) <= 48 << 10, row  # what every architecture gives without being asked
        assert int(row["blocks_per_multiprocessor"]) >= 1, row
