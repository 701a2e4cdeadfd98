"""Times what a call costs the host: every public function on tensors so small that little else is left.

    python -m benchmarks.overhead          on a GPU; --device cpu, or --smoke for a few calls on any machine

Each beside what torch has for it, in turns, so that both see the same machine; on a CPU a time is what the one thread
worked. The limits: a function may take 15 us more than F.scaled_dot_product_attention, on a CPU forward and backward 40
us more; a module no longer than nn.MultiheadAttention in training, and 1.5 times its fast path in evaluation. Minima
decide. Writes overhead.csv and overhead.json.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from benchmarks.command import Command, parse
from benchmarks.host_timing import HostCall, HostTime, time_in_turns
from benchmarks.result_table import ResultTable

COLUMNS = ("op", "min_us", "p50_us", "peer", "peer_min_us", "peer_p50_us", "limit_us", "verdict")
EXTRA_US, EXTRA_BOTH_US, EVAL_FACTOR = 15.0, 40.0, 1.5
SHAPE = (1, 1, 8, 8)
BATCH, LENGTH, WIDTH, HEADS = 2, 8, 64, 4
SDPA, MODULE = "F.scaled_dot_product_attention", "nn.MultiheadAttention"


class ComparedCall(NamedTuple):
    """One call of ours and torch's for it."""

    name: str
    ours: HostCall
    peer: str = ""
    theirs: HostCall | None = None
    extra_us: float | None = None  # beyond the peer's time
    factor: float | None = None  # of the peer's time


def function_calls(device: torch.device) -> Iterator[ComparedCall]:
    """The calls of the public functions."""
    q, k, v = torch.randn(3, *SHAPE, device=device).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(SHAPE, device=device)
    mask = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool, device=device)
    ours: Callable[..., Any] = fastattn.scaled_dot_product_attention
    theirs: Callable[..., Any] = F.scaled_dot_product_attention

    def and_back(attend: Callable[..., Any]) -> HostCall:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)

    name = "scaled_dot_product_attention"
    yield ComparedCall(name, lambda: ours(q, k, v), SDPA, lambda: theirs(q, k, v), EXTRA_US)
    yield ComparedCall(f"{name}, mask", lambda: ours(q, k, v, mask), SDPA, lambda: theirs(q, k, v, mask), EXTRA_US)
    yield ComparedCall(f"{name}, gradient", lambda: ours(*leaves), SDPA, lambda: theirs(*leaves), EXTRA_US)
    # On a GPU the backward pass runs in another thread, and waits for the device.
    extra_us = EXTRA_BOTH_US if device.type == "cpu" else None
    yield ComparedCall(f"{name}, gradient and backward", and_back(ours), SDPA, and_back(theirs), extra_us)
    packed_q, packed_k, packed_v = (x[0].transpose(0, 1) for x in (q, k, v))
    cu_seqlens = torch.tensor([0, SHAPE[2]], dtype=torch.int32, device=device)
    varlen = partial(fastattn.varlen_attention, packed_q, packed_k, packed_v)
    yield ComparedCall("varlen_attention", lambda: varlen(cu_seqlens, cu_seqlens, SHAPE[2], SHAPE[2]))
    yield ComparedCall("explain", lambda: fastattn.explain(q, k, v))


def module_calls(device: torch.device) -> Iterator[ComparedCall]:
    """The calls of the module, in training and in evaluation."""
    x = torch.randn(BATCH, LENGTH, WIDTH, device=device)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=device)

    def modules(is_training: bool) -> tuple[nn.Module, nn.Module]:
        kinds = fastattn.MultiHeadAttention, nn.MultiheadAttention
        ours, theirs = (kind(WIDTH, HEADS, batch_first=True, device=device).train(is_training) for kind in kinds)
        return ours, theirs

    def call(module: nn.Module, **options: Any) -> HostCall:
        return lambda: module(x, x, x, need_weights=False, **options)[0]

    def and_back(module: nn.Module) -> HostCall:
        parameters, dout = list(module.parameters()), torch.randn_like(x)
        return lambda: torch.autograd.grad(module(x, x, x, need_weights=False)[0], parameters, dout)

    def without_gradient(call: HostCall) -> HostCall:
        return torch.no_grad()(call)

    ours, theirs = modules(True)
    name = "MultiHeadAttention"
    mask = {"key_padding_mask": padding}
    yield ComparedCall(f"{name}, training", call(ours), MODULE, call(theirs), factor=1.0)
    yield ComparedCall(f"{name}, training, padding", call(ours, **mask), MODULE, call(theirs, **mask), factor=1.0)
    yield ComparedCall(f"{name}, training and backward", and_back(ours), MODULE, and_back(theirs), factor=1.0)
    ours, theirs = (module.requires_grad_(False) for module in modules(False))
    calls = [without_gradient(call(module)) for module in (ours, theirs)]
    yield ComparedCall(f"{name}, evaluation", calls[0], MODULE, calls[1], factor=EVAL_FACTOR)


# ---- what is measured ----

Side = tuple[str, str]  # a call's name, and "ours" or "theirs"


def measure(compared: list[ComparedCall], command: Command) -> dict[Side, HostTime]:
    """The times of both sides of each call."""
    sides: dict[Side, HostCall] = {}
    for call in compared:
        sides[call.name, "ours"] = call.ours
        if call.theirs is not None:
            sides[call.name, "theirs"] = call.theirs
    return time_in_turns(sides, command.sized(3, 90, 350), command.sized(5, 50, 50), command.device)


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


def row(call: ComparedCall, times: dict[Side, HostTime]) -> dict[str, Any]:
    """The columns of one call."""
    ours = times[call.name, "ours"]
    columns = {"op": call.name, "peer": call.peer, "min_us": f"{ours.min_us:.2f}", "p50_us": f"{ours.p50_us:.2f}"}
    if call.theirs is None:
        return columns
    theirs = times[call.name, "theirs"]
    columns |= {"peer_min_us": f"{theirs.min_us:.2f}", "peer_p50_us": f"{theirs.p50_us:.2f}"}
    if call.extra_us is not None or call.factor is not None:
        limit = theirs.min_us * (call.factor or 1.0) + (call.extra_us or 0.0)
        columns |= {"limit_us": f"{limit:.2f}", "verdict": "ok" if ours.min_us <= limit else "over"}
    return columns


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("overhead", "Time the host's part of every public function.", arguments)
    if command is None:
        return 1
    compared = [*function_calls(command.device), *module_calls(command.device)]
    compared = [call for call in compared if command.wants(call.name)]
    times = measure(compared, command)
    print(f"{'':<46}{'min':>9}{'median':>9}{'peer min':>10}{'limit':>9}  microseconds")
    with ResultTable(command, "overhead", COLUMNS) as table:
        for call in compared:
            table.add(**row(call, times))
        least, median = import_us(command.sized(1, 3, 5))
        table.add(op="import fastattn, after torch", min_us=f"{least:.0f}", p50_us=f"{median:.0f}")
        for r in table.rows:
            numbers = f"{r['min_us']:>9}{r['p50_us']:>9}{r['peer_min_us']:>10}{r['limit_us']:>9}"
            print(f"{r['op']:<46}{numbers}  {r['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
