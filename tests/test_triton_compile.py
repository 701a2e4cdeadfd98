"""The Triton kernels compiled for GPUs that are not here: no register is spilled, and shared memory suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]
SMEM_LIMIT = 99 << 10  # of a block on the smallest of the GPUs that the table's row for any GPU serves
SIZES = "heads=4x2,seqlens=128x127"
CALLS = {
    "causal": f"band=causal,packed=True,{SIZES}",
    "dropout": f"mask=padding,dropout_p=0.3,{SIZES}",
    "bias": f"bias=full,{SIZES}",
}
EVERYTHING = f"mask=random,bias=full,band=window-bottom-right,dropout_p=0.3,packed=True,{SIZES}"


def compiled(arch: int, *cases: str) -> list[dict]:
    """What every kernel of the cases takes; in a process of its own, because Triton may be interpreting here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, ROOT / "tests" / "triton_compile.py", str(arch), *cases]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@pytest.mark.triton
@pytest.mark.skipif(OLDER, reason=f"Triton {triton.__version__} has an assembler that spills a few registers more")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_common_kernels_spill_no_register(dtype: str, head_dim: int, arch: int) -> None:
    cases = [f"dtype={dtype},dims={head_dim}x{head_dim},{call}" for call in CALLS.values()]
    kernels = compiled(arch, *cases)
    assert len(kernels) == 3 * len(cases) + 1  # the gradient of the bias
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["shared"] <= SMEM_LIMIT, kernel


@pytest.mark.triton
@pytest.mark.parametrize("arch", [80, 90])
def test_everything_at_once_compiles(arch: int) -> None:
    shapes = ("bfloat16,dims=64x64", "bfloat16,dims=256x256", "float32,dims=256x256")
    kernels = compiled(arch, *(f"dtype={shape},{EVERYTHING}" for shape in shapes))
    assert len(kernels) == 4 * len(shapes)
    for kernel in kernels:
        assert kernel["shared"] <= SMEM_LIMIT, kernel
