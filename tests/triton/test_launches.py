"""Triton's own launcher on a stub of libcuda: what reaches the driver, what is compiled, what is launched again."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import stub_cuda

ROOT = Path(__file__).parents[2]
# Forward and backward: five classes of lengths, with one mask or band or the other; masks by the alignment of rows.
MOST_COMPILATIONS = {"padded": 30, "packed": 22}
LAST_UPDATE = {"padded": 91, "packed": 17}
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="Triton's launcher needs gcc"),
]


def on_stub(what: str, folder: Path, **variables: str) -> Any:
    """What the process found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment |= variables
    command = [sys.executable, "-m", "tests.support.triton_on_stub", what, str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_every_parameter_reaches_the_driver(tmp_path: Path) -> None:
    found = on_stub("parameters", tmp_path)
    assert found["differences"] == []
    kernels = {"attention_fwd_kernel", "attention_bwd_kernel", "attention_bwd_dq_kernel"}
    assert found["launched"].keys() == kernels | {"attention_bwd_dkdv_kernel", "attention_bwd_dbias_kernel"}


def test_no_launch_is_repeated_with_a_kernel_that_triton_would_not_choose(tmp_path: Path) -> None:
    """Among them aligned tensors and views that are not, strides of 1, of multiples of 16 and others."""
    found = on_stub("keys", tmp_path)
    assert found["mixed"] == []
    assert found["kernels"] > 500 and found["keys"] < 1.2 * found["kernels"]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_training_compiles_each_kernel_early(tmp_path: Path, layout: str) -> None:
    first = on_stub("compilations", tmp_path)[layout]
    assert 0 < len(first) <= MOST_COMPILATIONS[layout]
    assert max(first) <= LAST_UPDATE[layout], first


@pytest.mark.parametrize("has_compiler", [True, False])
def test_without_a_compiler_triton_is_not_chosen(tmp_path: Path, has_compiler: bool) -> None:
    stub_cuda.build(tmp_path / "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache")} | ({} if has_compiler else {"PATH": "", "CC": ""})
    found = on_stub("choice", tmp_path, **variables)
    if has_compiler:
        assert found == {"backend": "triton", "refusals": {}}
    else:
        assert found["backend"] != "triton"
        assert found["refusals"]["triton"][0].startswith("cannot launch: Triton needs gcc and Python.h when it runs (")


def test_boolean_operators_are_not_chained() -> None:
    """Triton 3.3, which torch 2.7 brings, compiles no `a or b or c`."""
    folder = ROOT / "fastattn/triton_kernels"
    for name in ("kernels.py", "scores.py", "bias_gradient.py"):
        for function in ast.parse((folder / name).read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.decorator_list:
                chains = [node for node in ast.walk(function) if isinstance(node, ast.BoolOp) and len(node.values) > 2]
                assert not chains, f"{name}, line {chains[0].lineno}"
