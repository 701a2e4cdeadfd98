"""The CPU kernels on aarch64, cross-compiled and emulated where Debian's g++-aarch64-linux-gnu and qemu-user are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cpu_library import OPTIMIZED, build_standalone

PREFIX, EMULATOR, SYSTEM = "aarch64-linux-gnu-", "qemu-aarch64", "/usr/aarch64-linux-gnu"
CXX = f"{PREFIX}g++"
# A vector of floats times one element of another, added up: what a register tile consists of.
MULTIPLY_BY_ELEMENT = re.compile(r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[\d\]")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"needs {CXX}, Debian's g++-aarch64-linux-gnu"),
]


@pytest.fixture(scope="module")
def program() -> Path:
    return build_standalone("baseline", OPTIMIZED, cxx=CXX)


def test_products_are_vectors_times_elements(program: Path) -> None:
    listing = subprocess.run([f"{PREFIX}objdump", "-d", program], capture_output=True, text=True, check=True).stdout
    assert len(MULTIPLY_BY_ELEMENT.findall(listing)) >= 100
    assert "umull" in listing  # of the random words


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR}, Debian's qemu-user")
def test_results_under_emulation(program: Path) -> None:
    found = subprocess.run([EMULATOR, "-L", SYSTEM, program], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0 and found.stdout.endswith("right\n"), found.stdout + found.stderr
