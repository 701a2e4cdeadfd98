"""Times attention: fastattn's backends, torch's, FlexAttention, plain matrix products, and other libraries.

    python -m benchmarks.attention          on a GPU; --quick for two minutes, --smoke for tiny cases on any machine

Each provider is first compared with the float64 reference; one that is wrong or unavailable gets a row with the reason
and no numbers. What limits attention at the lengths of sentences is bandwidth: beside the times stand the bytes that
any attention has to move, their share of the rate of a plain copy, and the share of what that rate and the rate of a
matrix product together allow, both measured first. Writes attention.csv and attention.json; prints who wins at last.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import published, roofline
from benchmarks.cases import DTYPES, Case, every_case, quick_cases, short, smoke_cases
from benchmarks.command import Command, parse
from benchmarks.comparison import comparisons, print_comparisons
from benchmarks.gate import Gate, Wrong
from benchmarks.provenance import device_name
from benchmarks.providers import Provider, Unavailable, all_providers
from benchmarks.report import Table
from benchmarks.roofline import Roofline
from benchmarks.timing import Timing, peak_memory_mib, time_for
from fastattn.peaks import peak_tflops

CASE_COLUMNS = ("suite", "workload", "layout", "batch", "nheads", "seqlen_q", "seqlen_k", "head_dim", "mask", "dtype")
COLUMNS = (
    *CASE_COLUMNS,
    *("provider", "pass", "p50_ms", "p20_ms", "p80_ms", "tflops", "percent_of_peak", "gb_s", "percent_of_copy"),
    *("percent_of_roofline", "peak_memory_mib", "published_fused_ms", "published_vanilla_ms", "note"),
    "no_numbers_because",
)


def measure(
    case: Case, provider: Provider, gate: Gate, device: torch.device, roof: Roofline, seconds: float
) -> list[dict[str, Any]]:
    """The columns that are not the case's: one row per pass, or one with the reason why there are no numbers."""
    try:
        call = gate.admit(provider)
    except Unavailable as error:
        return [{"no_numbers_because": f"unavailable: {error}"}]
    except Wrong as error:
        return [{"no_numbers_because": f"wrong: {error}"}]
    problem = gate.problem
    leaves = list(problem.leaves().values())

    def backward(out: torch.Tensor) -> None:
        torch.autograd.grad(out, leaves, problem.dout)

    with provider.context():
        timings = time_for(call, backward, device, seconds)
        memory = peak_memory_mib(lambda: backward(call()), device)
    note = provider.describe(problem)
    return [
        {"pass": which, "peak_memory_mib": memory, "note": note}
        | numbers(case, problem.bytes(which), device, which, timing, roof)
        for which, timing in timings.items()
    ]


def numbers(case: Case, moved: int, device: torch.device, which: str, timing: Timing, roof: Roofline) -> dict[str, Any]:
    """The columns of one pass; none but the reason if it seems faster than the device can be."""
    flops = case.flops(which)
    tflops = flops / timing.p50_ms * 1e-9
    peak = peak_tflops(device_name(device), case.dtype)
    if peak is not None and tflops > peak:
        return {"no_numbers_because": f"wrong: {tflops:.1f} TFLOP/s, the device's peak is {peak}"}
    gb_s = moved / timing.p50_ms * 1e-6
    theirs = published.times(which, (case.batch, case.nheads, case.seqlen_q, case.head_dim), case.dtype)
    is_published = theirs is not None and case.suite == "published"
    return {
        **{name: f"{milliseconds:.4f}" for name, milliseconds in timing._asdict().items()},
        "tflops": f"{tflops:.3f}",
        "percent_of_peak": None if peak is None else f"{100 * tflops / peak:.1f}",
        "gb_s": f"{gb_s:.1f}",
        "percent_of_copy": f"{100 * gb_s / roof.copy_gb_s:.1f}",
        "percent_of_roofline": f"{100 * roof.share(flops, moved, case.dtype, timing.p50_ms):.1f}",
        **({f"published_{name}": value for name, value in theirs._asdict().items()} if is_published else {}),
    }


def rows(command: Command, chosen: list[tuple[Case, Provider]], roof: Roofline) -> Iterator[dict[str, Any]]:
    """Every row, as it is measured; a line per case and provider goes to the terminal."""
    seconds = command.sized(0.0, 0.08, 0.5)
    gate = last = None
    with tqdm(chosen, unit="row", disable=None) as bar:
        for case, provider in bar:
            if case is not last:
                gate = None  # before the next one's tensors are made
                gate, last = Gate(case, command.device), case
                bar.write(f"\n{case}")
            is_quick = command.size == "quick" and provider.compiles
            if is_quick and (case.dtype != torch.bfloat16 or case.layout == "packed"):
                measured = [{"no_numbers_because": "left out: in the quick form it compiles for padded bfloat16 only"}]
            else:
                measured = measure(case, provider, gate, command.device, roof, seconds)
            bar.write(f"  {provider.name:<16} {_line(measured)}")
            yield from (case.columns() | {"provider": provider.name} | row for row in measured)


def _line(measured: list[dict[str, Any]]) -> str:
    timed = [
        f"{row['pass']} {row['p50_ms']} ms ({row['percent_of_roofline']} %)" for row in measured if "p50_ms" in row
    ]
    return "  ".join([*timed, measured[0].get("note", "")]) if timed else measured[0]["no_numbers_because"]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("attention", "Time attention.", arguments)
    if command is None:
        return 1
    warnings.filterwarnings("ignore", category=UserWarning)  # of kernels that refuse; the rows say it
    cases = command.sized(smoke_cases, quick_cases, every_case)()
    chosen = [(case, provider) for case in cases for provider in all_providers() if command.wants(case, provider.name)]
    dtypes = tuple(dtype for dtype in DTYPES if any(case.dtype == dtype for case, _ in chosen))
    roof = roofline.measure(command.device, dtypes)
    rates = {short(dtype): round(rate, 3) for dtype, rate in roof.product_tflops.items()}
    print(f"a copy moves {roof.copy_gb_s:.0f} GB/s, matrix products do {rates} TFLOP/s; shares below are of these")
    measured = {"copy_gb_s": round(roof.copy_gb_s, 1), "product_tflops": rates}
    with Table(command, "attention", COLUMNS, **measured) as table:
        for row in rows(command, chosen, roof):
            table.add(**row)
    print_comparisons(comparisons(table.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
