"""Times attention at the shapes of WMT training: torch's own backends, and fastattn's.

    python -m benchmarks.torch_backends          on a GPU; with --smoke tiny cases on any machine

Each provider is first compared with the float64 reference; one that is wrong or unavailable gets a row with the reason
and no numbers. What limits attention at these lengths is bandwidth: beside the times stand the bytes that any attention
has to move, and their share of the rate of a plain copy, which is measured first. Writes torch_backends.csv and, with
where the numbers come from, torch_backends.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks.bandwidth import copy_rate
from benchmarks.provenance import folder_name, peak_tflops, provenance
from benchmarks.timing import Timing, peak_memory_mib, time_passes
from fastattn.backends import BACKENDS

WARM_UP = 3
# This only has to tell a wrong result (a mask or a scale missing) from a right one; the tests judge the last digits. A
# correct backend is off by 1-4 roundings in the root of the mean square, a wrong one by a good part of the norm.
MAX_ROUNDINGS = 16
MASKS = ("none", "padding", "causal")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Problem(NamedTuple):
    """The tensors of a case and the other arguments."""

    inputs: list[Tensor]  # q, k, v
    dout: Tensor
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Self-attention of one layer on a batch of sentences."""

    batch: int
    nheads: int
    seqlen: int
    head_dim: int
    mask: str
    dtype: torch.dtype

    def make(self, device: torch.device) -> Problem:
        """Tensors of (batch, nheads, seqlen, head_dim), and a mask with a key in every row."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (4, self.batch, self.nheads, self.seqlen, self.head_dim)
        q, k, v, dout = torch.randn(shape, generator=generator, device=device).to(self.dtype).unbind()
        arguments: dict[str, Any] = {"is_causal": self.mask == "causal"}
        if self.mask == "padding":
            filled = torch.rand((self.batch, 1, 1, 1), generator=generator, device=device).add(1) / 2
            arguments["attn_mask"] = torch.arange(self.seqlen, device=device) < filled * self.seqlen
        return Problem([x.requires_grad_() for x in (q, k, v)], dout, arguments)

    def flops(self, which: str) -> float:
        """Of the two matrix products forward (half of them if causal) and the five backward."""
        forward = 4.0 * self.batch * self.nheads * self.seqlen**2 * self.head_dim
        forward /= 2 if self.mask == "causal" else 1
        return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]

    def bytes(self, which: str) -> float:
        """That any attention moves: forward q, k, v, out; backward those and dout, dq, dk, dv; lse with both."""
        rows = self.batch * self.nheads * self.seqlen
        tensors = {"forward": 4, "backward": 8, "both": 12}[which]
        return rows * (tensors * self.head_dim * self.dtype.itemsize + (8 if which == "both" else 4))


CASES = [Case(512, 8, n, 64, mask, dtype) for dtype in DTYPES for mask in MASKS for n in (16, 32, 64, 82, 128)]
SMOKE_CASES = [Case(2, 2, 9, 16, mask, torch.float32) for mask in MASKS]


class Provider(NamedTuple):
    """A way to compute attention: a function, and the context in which it is the one that runs."""

    name: str
    attend: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]]


def providers() -> Iterator[Provider]:
    """torch's backends, then fastattn's."""
    for name, backend in {
        "torch-math": SDPBackend.MATH,
        "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "torch-flash": SDPBackend.FLASH_ATTENTION,
        "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    }.items():
        yield Provider(name, F.scaled_dot_product_attention, partial(sdpa_kernel, backend))
    for record in BACKENDS:
        if not record.on_request_only:
            context = partial(fastattn.use_backend, record.name)
            yield Provider(f"fastattn-{record.name}", fastattn.scaled_dot_product_attention, context)


# ---- correctness before speed ----


def results(attend: Callable[..., Any], problem: Problem) -> list[Tensor]:
    """out, dq, dk, dv."""
    out = attend(*problem.inputs, **problem.arguments)
    return [out.detach(), *torch.autograd.grad(out, problem.inputs, problem.dout)]


def expect(case: Case, device: torch.device) -> list[Tensor]:
    """out, dq, dk, dv by the reference in float64."""
    inputs, dout, arguments = case.make(device)
    exact = Problem([x.detach().double().requires_grad_() for x in inputs], dout.double(), arguments)
    with fastattn.use_backend("reference"):
        return results(fastattn.scaled_dot_product_attention, exact)


def why_no_numbers(provider: Provider, case: Case, device: torch.device, expected: list[Tensor]) -> str | None:
    """Why the provider cannot be timed on the case: unavailable, or wrong."""
    with warnings.catch_warnings(record=True) as caught, provider.context():
        warnings.simplefilter("always")
        try:
            actual = results(provider.attend, case.make(device))
        except (RuntimeError, NotImplementedError) as error:
            # torch's error says only that there is no kernel; its warnings say why.
            said = [str(w.message).split(" (Triggered")[0] for w in caught] or [str(error)]
            return "unavailable: " + " ".join(" ".join(said).split())
    allowed = MAX_ROUNDINGS * torch.finfo(case.dtype).eps
    for name, x, exact in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        off = float((x.double() - exact).norm() / exact.norm())
        if not off <= allowed:
            return f"wrong: {name} is off by {off:.1e} of its norm, allowed are {allowed:.1e}"
    return None


# ---- the table ----

COLUMNS = (
    *("op", "provider", "batch", "nheads", "seqlen", "head_dim", "mask", "dtype", "pass"),
    *("p50_ms", "p20_ms", "p80_ms", "tflops", "percent_of_peak", "gb_s", "percent_of_copy", "peak_memory_mib"),
    "no_numbers_because",
)


def measure(
    case: Case, provider: Provider, device: torch.device, repetitions: int, copy_gb_s: float
) -> list[dict[str, Any]]:
    """The columns with numbers, one row per pass."""
    problem = case.make(device)

    def forward() -> Tensor:
        return provider.attend(*problem.inputs, **problem.arguments)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, problem.inputs, problem.dout)

    with provider.context():
        time_passes(forward, backward, device, WARM_UP)
        timings = time_passes(forward, backward, device, repetitions)
        memory = peak_memory_mib(lambda: backward(forward()), device)
    return [
        {"pass": which, "peak_memory_mib": memory} | numbers(case, device, which, timing, copy_gb_s)
        for which, timing in timings.items()
    ]


def numbers(case: Case, device: torch.device, which: str, timing: Timing, copy_gb_s: float) -> dict[str, Any]:
    """The columns of one pass; none but the reason if it seems faster than the device can be."""
    tflops = case.flops(which) / timing.p50_ms * 1e-9
    peak = peak_tflops(device, case.dtype)
    if peak is not None and tflops > peak:
        return {"no_numbers_because": f"wrong: {tflops:.1f} TFLOP/s, the device's peak is {peak}"}
    share = None if peak is None else f"{100 * tflops / peak:.1f}"
    times = {name: f"{milliseconds:.4f}" for name, milliseconds in timing._asdict().items()}
    gb_s = case.bytes(which) / timing.p50_ms * 1e-6
    moved = {"gb_s": f"{gb_s:.1f}", "percent_of_copy": f"{100 * gb_s / copy_gb_s:.1f}"}
    return times | {"tflops": f"{tflops:.3f}", "percent_of_peak": share} | moved


def rows(cases: list[Case], device: torch.device, repetitions: int) -> Iterator[dict[str, Any]]:
    """Every row, as it is measured; prints one line per case and provider."""
    copy_gb_s = copy_rate(device)
    print(f"a copy moves {copy_gb_s:.0f} GB/s")
    for case in cases:
        described = asdict(case) | {"op": "attention", "dtype": str(case.dtype).removeprefix("torch.")}
        floor = [f"{which} {1e-6 * case.bytes(which) / copy_gb_s:.4f} ms" for which in ("forward", "backward", "both")]
        print("\n{batch} x {nheads} x {seqlen} x {head_dim} {dtype}, mask: {mask}".format(**described))
        print(f"  {'floor by a copy':<16} {'  '.join(floor)}")
        expected = expect(case, device)
        for provider in providers():
            reason = why_no_numbers(provider, case, device, expected)
            measured = (
                [{"no_numbers_because": reason}] if reason else measure(case, provider, device, repetitions, copy_gb_s)
            )
            summary = [f"{row['pass']} {row['p50_ms']} ms" for row in measured if "p50_ms" in row]
            print(f"  {provider.name:<16} {'  '.join(summary) or measured[0]['no_numbers_because']}", flush=True)
            yield from (described | {"provider": provider.name} | row for row in measured)


def write(folder: Path, measured: Iterator[dict[str, Any]], device: torch.device) -> None:
    """Writes the two files; the rows as they come, so that an interrupted run keeps what it measured."""
    origin = provenance(device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "torch_backends.json").write_text(json.dumps(origin, indent=2) + "\n")
    with (folder / "torch_backends.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measured:
            writer.writerow(row)
            file.flush()


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_backends", description="Time attention.")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, on any machine, in seconds")
    parser.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results/<gpu>)")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("no CUDA device that torch can use: see python -m fastattn.info; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.out or Path(__file__).parent / "results" / folder_name(device)
    cases, repetitions = (SMOKE_CASES, 3) if options.smoke else (CASES, 50)
    write(folder, rows(cases, device, repetitions), device)
    print(f"\nwrote {folder}/torch_backends.csv and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
