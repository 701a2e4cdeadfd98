"""Times what a call costs the host: every public function on tensors so small that little else is left.

    python -m benchmarks.overhead          on a GPU; --device cpu, or --smoke for a few calls on any machine

Each beside what torch has for it, measured by pytest-benchmark in turns, so that both see the same machine. The limits:
a function may take 15 us more than F.scaled_dot_product_attention; a module no longer than nn.MultiheadAttention in
training, and 1.5 times its fast path in evaluation. Minima decide. Writes overhead.csv and overhead.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from benchmarks.command import Command, parse
from benchmarks.report import Table

COLUMNS = ("op", "min_us", "p50_us", "peer", "peer_min_us", "peer_p50_us", "limit_us", "verdict")
EXTRA_US, EVAL_FACTOR = 15.0, 1.5
SHAPE = (1, 1, 8, 8)
BATCH, LENGTH, WIDTH, HEADS = 2, 8, 64, 4
SDPA, MODULE = "F.scaled_dot_product_attention", "nn.MultiheadAttention"

Call = Callable[[], Any]


class Op(NamedTuple):
    """One call of ours and torch's for it."""

    name: str
    ours: Call
    peer: str = ""
    theirs: Call | None = None
    extra_us: float | None = None  # beyond the peer's time
    factor: float | None = None  # of the peer's time


def function_ops(device: torch.device) -> Iterator[Op]:
    """The functions."""
    q, k, v = torch.randn(3, *SHAPE, device=device).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(SHAPE, device=device)
    mask = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool, device=device)
    ours, theirs = fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention

    def and_back(attend: Callable[..., Any]) -> Call:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)

    name = "scaled_dot_product_attention"
    yield Op(name, lambda: ours(q, k, v), SDPA, lambda: theirs(q, k, v), EXTRA_US)
    yield Op(f"{name}, mask", lambda: ours(q, k, v, mask), SDPA, lambda: theirs(q, k, v, mask), EXTRA_US)
    yield Op(f"{name}, gradient", lambda: ours(*leaves), SDPA, lambda: theirs(*leaves), EXTRA_US)
    yield Op(f"{name}, gradient and backward", and_back(ours), SDPA, and_back(theirs))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, SHAPE[2]], dtype=torch.int32, device=device)
    lengths = (cu_seqlens, cu_seqlens, SHAPE[2], SHAPE[2])
    yield Op("varlen_attention", lambda: fastattn.varlen_attention(*packed, *lengths))
    yield Op("explain", lambda: fastattn.explain(q, k, v))


def module_ops(device: torch.device) -> Iterator[Op]:
    """The module, in training and in evaluation."""
    x = torch.randn(BATCH, LENGTH, WIDTH, device=device)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=device)

    def modules(is_training: bool) -> tuple[nn.Module, nn.Module]:
        kinds = fastattn.MultiHeadAttention, nn.MultiheadAttention
        ours, theirs = (kind(WIDTH, HEADS, batch_first=True, device=device).train(is_training) for kind in kinds)
        return ours, theirs

    def call(module: nn.Module, **options: Any) -> Call:
        return lambda: module(x, x, x, need_weights=False, **options)[0]

    def and_back(module: nn.Module) -> Call:
        parameters, dout = list(module.parameters()), torch.randn_like(x)
        return lambda: torch.autograd.grad(module(x, x, x, need_weights=False)[0], parameters, dout)

    def without_gradient(call: Call) -> Call:
        return torch.no_grad()(call)

    ours, theirs = modules(True)
    name = "MultiHeadAttention"
    mask = {"key_padding_mask": padding}
    yield Op(f"{name}, training", call(ours), MODULE, call(theirs), factor=1.0)
    yield Op(f"{name}, training, padding", call(ours, **mask), MODULE, call(theirs, **mask), factor=1.0)
    yield Op(f"{name}, training and backward", and_back(ours), MODULE, and_back(theirs), factor=1.0)
    ours, theirs = (module.requires_grad_(False) for module in modules(False))
    calls = [without_gradient(call(module)) for module in (ours, theirs)]
    yield Op(f"{name}, evaluation", calls[0], MODULE, calls[1], factor=EVAL_FACTOR)


# ---- what pytest runs ----


class Plugin:
    """Gives pytest the device and the number of calls."""

    def __init__(self, command: Command) -> None:
        self.device = command.device
        self.repeats = command.sized(1, 3, 7)
        self.options = {"rounds": command.sized(3, 30, 50), "iterations": command.sized(5, 50, 50), "warmup_rounds": 3}
        self.ops = {op.name: op for op in (*function_ops(self.device), *module_ops(self.device))}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Ours, theirs, and again."""
        metafunc.parametrize("repeat", range(self.repeats))
        sides = [(op.name, side) for op in self.ops.values() for side in ("ours", "theirs") if getattr(op, side)]
        metafunc.parametrize(("op", "side"), sides)

    @pytest.fixture
    def timed(self, benchmark: Any) -> Callable[[str, str], None]:
        """Runs one side of an op."""

        def run(op: str, side: str) -> None:
            benchmark.extra_info.update(op=op, side=side)
            benchmark.pedantic(getattr(self.ops[op], side), **self.options)
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return run


def test_call(timed: Callable[[str, str], None], op: str, side: str, repeat: int) -> None:
    timed(op, side)


def run_pytest(plugin: Plugin) -> dict[tuple[str, str], tuple[float, float]]:
    """The minimum and the median, in microseconds, of each op's sides."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", f"--benchmark-json={file}"]
        with contextlib.redirect_stdout(said):
            status = pytest.main([__file__, *options], plugins=[plugin])
        if status != 0:
            raise RuntimeError(f"pytest-benchmark failed:\n{said.getvalue()}")
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for entry in json.loads(file.read_text())["benchmarks"]:
            found.setdefault((entry["extra_info"]["op"], entry["extra_info"]["side"]), []).append(entry["stats"])
    return {
        key: (1e6 * min(s["min"] for s in stats), 1e6 * statistics.median(s["median"] for s in stats))
        for key, stats in found.items()
    }


# ---- import time ----

IMPORT = """
import time
import torch
start = time.perf_counter()
import fastattn
print(1e6 * (time.perf_counter() - start))
"""


def import_us(repetitions: int) -> tuple[float, float]:
    """Minimum and median microseconds of `import fastattn` after torch, in fresh processes."""
    times = []
    for _ in range(repetitions):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    return min(times), statistics.median(times)


# ---- the table ----


def row(op: Op, times: dict[tuple[str, str], tuple[float, float]]) -> dict[str, Any]:
    """One op's columns."""
    columns: dict[str, Any] = {"op": op.name, "peer": op.peer}
    columns |= dict(zip(("min_us", "p50_us"), (f"{us:.2f}" for us in times[op.name, "ours"]), strict=True))
    if op.theirs is None:
        return columns
    theirs = times[op.name, "theirs"]
    columns |= dict(zip(("peer_min_us", "peer_p50_us"), (f"{us:.2f}" for us in theirs), strict=True))
    if op.extra_us is not None or op.factor is not None:
        limit = theirs[0] * (op.factor or 1.0) + (op.extra_us or 0.0)
        columns |= {"limit_us": f"{limit:.2f}", "verdict": "ok" if times[op.name, "ours"][0] <= limit else "over"}
    return columns


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("overhead", "Time the host's part of every public function.", arguments)
    if command is None:
        return 1
    torch.set_num_threads(1)
    plugin = Plugin(command)
    plugin.ops = {name: op for name, op in plugin.ops.items() if command.wants(name)}
    times = run_pytest(plugin)
    print(f"{'':<46}{'min':>9}{'median':>9}{'peer min':>10}{'limit':>9}  microseconds")
    with Table(command, "overhead", COLUMNS) as table:
        for op in plugin.ops.values():
            table.add(**row(op, times))
        table.add(op="import fastattn, after torch", **{
            name: f"{us:.0f}" for name, us in zip(("min_us", "p50_us"), import_us(command.sized(1, 3, 5)), strict=True)
        })  # fmt: skip
        for r in table.rows:
            print(
                f"{r['op']:<46}{r['min_us']:>9}{r['p50_us']:>9}{r['peer_min_us']:>10}{r['limit_us']:>9}  {r['verdict']}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
