"""Times attention: fastattn's backends, torch's, FlexAttention, plain matrix products, and other libraries.

    python -m benchmarks.attention          on a GPU; --quick for two minutes, --smoke for tiny cases on any machine

On a CPU it is benchmarks.cpu_attention that times.

Each provider is first compared with the float64 reference; one that is wrong or unavailable gets a row with the reason
and no numbers. What limits attention at the lengths of sentences is bandwidth: beside the times stand the bytes that
any attention has to move, their share of the rate of a plain copy, and the share of what that rate and the rate of a
matrix product together allow, both measured first. Times are of the kernels alone: what the host needs to queue them
has a column, and a note where that is more. Writes attention.csv and attention.json; finally prints who wins.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from benchmarks import cpu_attention, roofline
from benchmarks.attention_columns import COLUMNS, line, numbers, of_host
from benchmarks.cases import DTYPES, AttentionCase, every_case, quick_cases, short, smoke_cases
from benchmarks.command import Command, parse
from benchmarks.comparison import comparisons, print_comparisons
from benchmarks.gate import Gate, Wrong
from benchmarks.provenance import device_name
from benchmarks.providers import Provider, Unavailable, all_providers
from benchmarks.result_table import ResultTable
from benchmarks.roofline import Roofline
from benchmarks.timing import host_times, peak_memory_mib, time_for
from fastattn.peaks import peak_tflops

HOST_REPETITIONS = 10


def measure(
    case: AttentionCase, provider: Provider, gate: Gate, device: torch.device, roof: Roofline, seconds: float
) -> list[dict[str, Any]]:
    """The columns that are not the case's: a row for each pass, or one with the reason why there are no numbers."""
    try:
        call = gate.admit(provider)
    except Unavailable as error:
        return [{"no_numbers_because": f"unavailable: {error}"}]
    except Wrong as error:
        return [{"no_numbers_because": f"wrong: {error}"}]
    inputs = gate.inputs
    leaves = list(inputs.leaves().values())

    def backward(out: torch.Tensor) -> None:
        torch.autograd.grad(out, leaves, inputs.dout)

    with provider.context():
        times = time_for(call, backward, device, seconds)
        host_ms = host_times(call, backward, device, HOST_REPETITIONS)
        memory = peak_memory_mib(lambda: backward(call()), device)
    note, peak = provider.describe(inputs), peak_tflops(device_name(device), case.dtype)
    return [
        {"pass": which, "peak_memory_mib": memory}
        | of_host(host_ms[which], time.p50_ms, note)
        | numbers(case, inputs.bytes(which), which, time, roof, peak)
        for which, time in times.items()
    ]


def rows(command: Command, chosen: list[tuple[AttentionCase, Provider]], roof: Roofline) -> Iterator[dict[str, Any]]:
    """Every row, as it is measured; a line for each case and provider goes to the terminal."""
    from tqdm import tqdm  # parse() says what to install where it is missing

    seconds = command.sized(0.0, 0.08, 0.5)
    with tqdm(total=len(chosen), unit="row", disable=None) as bar:
        for case, providers in groupby(chosen, key=itemgetter(0)):
            bar.write(f"\n{case}")
            gate = Gate(case, command.device)
            for _, provider in providers:
                is_quick = command.size == "quick" and provider.compiles
                if is_quick and (case.dtype != torch.bfloat16 or case.layout == "packed"):
                    reason = "left out: in the quick form it compiles for padded bfloat16 only"
                    measured = [{"no_numbers_because": reason}]
                else:
                    measured = measure(case, provider, gate, command.device, roof, seconds)
                bar.write(f"  {provider.name:<16} {line(measured)}")
                yield from (case.columns() | {"provider": provider.name} | row for row in measured)
                bar.update()
            del gate  # before the next one's tensors are made


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("attention", "Time attention.", arguments, packages=["tqdm"])
    if command is None:
        return 1
    if command.device.type == "cpu":
        return cpu_attention.run(command)
    return one_after_another(command)


def one_after_another(command: Command) -> int:
    """Measures provider after provider, prints and writes; returns the exit status."""
    warnings.filterwarnings("ignore", category=UserWarning)  # kernels that refuse warn of it; the rows say it
    cases = command.sized(smoke_cases, quick_cases, every_case)()
    chosen = [(case, provider) for case in cases for provider in all_providers() if command.wants(case, provider.name)]
    dtypes = tuple(dtype for dtype in DTYPES if any(case.dtype == dtype for case, _ in chosen))
    roof = roofline.measure(command.device, dtypes)
    rates = {short(dtype): round(rate, 3) for dtype, rate in roof.product_tflops.items()}
    print(f"a copy moves {roof.copy_gb_s:.0f} GB/s, matrix products do {rates} TFLOP/s; shares below are of these")
    measured = {"copy_gb_s": round(roof.copy_gb_s, 1), "product_tflops": rates}
    with ResultTable(command, "attention", COLUMNS, **measured) as table:
        for row in rows(command, chosen, roof):
            table.add(**row)
    print_comparisons(comparisons(table.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
