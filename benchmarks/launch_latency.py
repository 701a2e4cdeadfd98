"""Times the host's part of a call: from Python to cuLaunchKernel's return, on any machine.

    python -m benchmarks.launch_latency          with --smoke in a second

A stub stands in for libcuda and does nothing, so that what is left is fastattn's own time and torch's. A call on a GPU
also asks torch for the current stream and the driver for the launch itself. The tensors are tiny: the same call through
F.scaled_dot_product_attention on the CPU shows what torch needs. Writes launch_latency.csv and, with where the numbers
come from, launch_latency.json.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import fastattn
from benchmarks.provenance import folder_name, provenance
from fastattn import backends, functional

STUB = Path(__file__).with_name("stub_cuda.cpp")
SHAPE = (1, 1, 8, 8)
COLUMNS = ("op", "min_us", "p50_us", "p80_us")


def build_stub(folder: Path) -> ctypes.CDLL:
    """The stub, compiled, in the place of libcuda; it records nothing and has device 0's context current."""
    library = folder / "libcuda.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", STUB, "-o", library], check=True)
    os.environ["FASTATTN_LIBCUDA"] = str(library)
    stub = ctypes.CDLL(str(library))
    stub.stub_record(0)
    stub.stub_make_current(0)
    return stub


@contextmanager
def cuda_backend_on_cpu_tensors() -> Iterator[None]:
    """Every attention call inside launches the CUDA kernels on the first device, whatever the tensors' device."""
    from fastattn import _launcher
    from fastattn.cuda_kernels import attention as cuda

    def launch(kernel: str, element: str, grid: tuple[int, int, int], *tuples: Any) -> None:
        _launcher.launch(kernel, element, 0, 0, grid, *tuples)

    _launcher.set_image_source(lambda element, capability: b"")
    anywhere = [dataclasses.replace(b, min_capability=None) if b.name == "cuda" else b for b in backends.BACKENDS]
    with (
        mock.patch.object(backends, "BACKENDS", tuple(anywhere)),
        mock.patch.object(cuda, "launch", launch),
        mock.patch.object(cuda, "multiprocessors", lambda device: 56),
        fastattn.use_backend("cuda"),
    ):
        yield


def operations() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed: the launcher, then the call around it layer by layer, then the yardsticks."""
    from fastattn import _launcher
    from fastattn.cuda_kernels import attention as cuda

    q, k, v = torch.randn(3, *SHAPE).unbind()
    p = functional.attention_params(q, k, v)
    out, lse = torch.empty_like(q), torch.empty(SHAPE[:-1])
    buffers = cuda.Buffers(out, lse)
    backward = cuda.Buffers(out, lse, out, lse, lse, q, k, v)
    grid, kernel = (1, 1, 1), cuda._kernel("attention_fwd", *cuda._sizes(p)).name

    yield "pack", lambda: _launcher.pack("float32", p, buffers)
    yield "pack, backward", lambda: _launcher.pack("float32", p, backward)
    yield "launch", lambda: _launcher.launch(kernel, "float32", 0, 0, grid, p, buffers)
    yield "kernel choice and launch", lambda: cuda.attention_fwd(out, lse, p)
    yield "operator", lambda: torch.ops.fastattn.attention_fwd(*p, "cuda")
    yield "checks of the arguments", lambda: functional.attention_params(q, k, v)
    yield "choice of the backend", lambda: backends.choose(backends.traits(p, False))
    yield from calls("forward", "fastattn", fastattn.scaled_dot_product_attention)
    yield from calls("forward", "torch on the CPU", F.scaled_dot_product_attention)
    yield "two torch.empty", lambda: (torch.empty(SHAPE), torch.empty(SHAPE[:-1]))


def calls(what: str, whose: str, attend: Callable[..., torch.Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A function of q, k and v: without gradient, with it, and with the backward pass."""
    q, k, v = torch.randn(3, *SHAPE).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(SHAPE)
    yield f"{what}, {whose}", lambda: attend(q, k, v)
    yield f"{what} with gradient, {whose}", lambda: attend(*leaves)
    yield f"{what} and backward, {whose}", lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def summary(times: list[float]) -> dict[str, str]:
    """The columns of one row, from microseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    numbers = {"min_us": min(times), "p50_us": statistics.median(times), "p80_us": fifths[3]}
    return {name: f"{microseconds:.2f}" for name, microseconds in numbers.items()}


def measure(repetitions: int, number: int) -> list[dict[str, str]]:
    """All rows, which are printed; each repetition of a row is the mean of `number` calls.

    The rows take turns, so that whatever slows the machine for a while slows all of them.
    """
    with tempfile.TemporaryDirectory() as folder, cuda_backend_on_cpu_tensors():
        build_stub(Path(folder))
        calls = dict(operations())
        times: dict[str, list[float]] = {op: [] for op in calls}
        for call in calls.values():
            call()
        for _ in range(repetitions):
            for op, call in calls.items():
                times[op].append(1e6 * timeit.timeit(call, number=number) / number)
    rows = [{"op": op} | summary(times[op]) for op in calls]
    print(f"{'':<44}{'min':>9}{'p50':>9}{'p80':>9}  microseconds")
    for row in rows:
        print(f"{row['op']:<44}" + "".join(f"{row[column]:>9}" for column in COLUMNS[1:]))
    return rows


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    """Writes the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = provenance(torch.device("cpu"))
    (folder / "launch_latency.json").write_text(json.dumps(origin, indent=2) + "\n")
    with (folder / "launch_latency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_latency", description="Time the host's part.")
    parser.add_argument("--smoke", action="store_true", help="a few calls of each")
    parser.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results/<cpu>)")
    options = parser.parse_args(arguments)
    if missing := backends.get("cuda").why_missing():
        print(f"the cuda backend {missing}; nothing was measured", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    folder = options.out or Path(__file__).parent / "results" / folder_name(torch.device("cpu"))
    write(folder, measure(*((3, 20) if options.smoke else (400, 100))))
    print(f"\nwrote {folder}/launch_latency.csv and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
