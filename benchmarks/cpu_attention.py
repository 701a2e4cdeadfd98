"""Times attention on a CPU: all ways to compute a case in turns, with one thread and with two.

    python -m benchmarks.attention --device cpu     a quarter of an hour; --quick for three minutes, --smoke for seconds

With one thread a time is what the thread worked, with more it is what passed. The padded and the packed batch of the
same sentences take turns, too. Batches of sentences are timed once more with everything held to AVX2, in a process of
its own; that part alone is python -m benchmarks.cpu_attention, in an environment that names the instruction sets.
Times stand in attention.csv, ratios that had to be reached in attention_targets.csv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import cpu_cases, cpu_rates, cpu_targets, host
from benchmarks.attention_columns import COLUMNS, line, numbers
from benchmarks.cases import AttentionCase, AttentionInputs
from benchmarks.command import Command, parse
from benchmarks.comparison import comparisons, print_comparisons
from benchmarks.cpu_rates import CPU, Rates, using_threads
from benchmarks.gate import Gate, Wrong
from benchmarks.providers import Call, Provider, Unavailable, cpu_providers
from benchmarks.result_table import ResultTable, read
from benchmarks.timing import TimedCall, cpu_clock, time_in_turns

CPU_COLUMNS = (*COLUMNS, "cpu", "isa", "threads", "clock", "load_before")
THREADS = (1, 2)
HELD_TO = "avx2"
ENVIRONMENT = {
    "FASTATTN_CPU_ISA": HELD_TO,
    "ATEN_CPU_CAPABILITY": HELD_TO,
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
# Of a suite that not every provider is timed on.
PROVIDERS = {
    "decode": ("fastattn-cpu", "fastattn", "torch-default"),
    "memory": ("fastattn-cpu", "torch-flash", "torch-math"),
}
PROVIDERS_OF_OTHERS = ("fastattn-cpu", "fastattn", "torch-flash", "torch-math", "torch-products")
FORWARD_ONLY = "decode"  # the suite without gradients
MEMORY_GATE_SEQLEN = 512  # at which the reference can judge a provider


class Entry(NamedTuple):
    """A case and a provider that takes it."""

    case: AttentionCase
    provider: Provider
    gate: Gate
    call: Call

    def timed(self) -> TimedCall:
        """The passes as they are timed."""
        if self.case.suite == FORWARD_ONLY:
            return TimedCall(self.call, None, partial(without_gradient, self.provider.context))
        return TimedCall(self.call, partial(_backward, self.gate), self.provider.context)


@contextmanager
def without_gradient(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside the context there is no graph."""
    with context(), torch.no_grad():
        yield


def _backward(gate: Gate, out: Tensor) -> None:
    torch.autograd.grad(out, list(gate.inputs.leaves().values()), gate.inputs.dout)


def key_of_turns(case: AttentionCase) -> tuple[object, ...]:
    """Neighbours with the same key are timed in turns: padded and packed batches of the same sentences."""
    return case.batch_of() if case.lengths_q else (case,)


def in_turns(
    cases: Iterable[AttentionCase], command: Command, threads: Iterable[int], rates: dict[int, Rates]
) -> Iterator[dict[str, Any]]:
    """The rows of the cases; their lines go to the terminal."""
    ordered = sorted(cases, key=lambda case: [str(part) for part in key_of_turns(case)])
    for _, group in groupby(ordered, key=key_of_turns):
        entries: list[Entry] = []
        for case in group:
            gate = Gate(case, CPU)
            for provider in providers_of(case):
                if not command.wants(case, provider.name):
                    continue
                try:
                    entries.append(Entry(case, provider, gate, gate.admit(provider)))
                except (Unavailable, Wrong) as error:
                    kind = "wrong" if isinstance(error, Wrong) else "unavailable"
                    reason = {"no_numbers_because": f"{kind}: {error}"}
                    yield case.columns() | {"provider": provider.name} | reason
        for count in threads:
            if entries:
                yield from rows_of(entries, command, count, rates[count])


def providers_of(case: AttentionCase) -> list[Provider]:
    """The ways that a case is timed in; only ours take packed sentences."""
    known = cpu_providers()
    names = PROVIDERS.get(case.suite, PROVIDERS_OF_OTHERS)
    return [known[name] for name in names if case.layout != "packed" or name.startswith("fastattn")]


def rows_of(entries: list[Entry], command: Command, threads: int, rates: Rates) -> Iterator[dict[str, Any]]:
    """The rows of calls that take turns, with a number of threads."""
    seconds, least = command.sized((0.0, 2), (0.8, 4), (3.0, 7))
    calls = {i: entry.timed() for i, entry in enumerate(entries)}
    with using_threads(threads):
        times = time_in_turns(calls, cpu_clock(threads), seconds, least)
    for i, (case, provider, gate, _) in enumerate(entries):
        note = provider.describe(gate.inputs)
        measured = [
            {"pass": which, "note": note}
            | numbers(case, gate.inputs.bytes(which), which, time, rates.roof(), rates.peak_of(case.dtype))
            for which, time in times[i].items()
        ]
        print(f"{case}, {threads} threads  {provider.name:<16} {line(measured)}", flush=True)
        described = case.columns() | {"provider": provider.name} | columns_of_host(threads)
        yield from (described | row for row in measured)


def columns_of_host(threads: int) -> dict[str, Any]:
    """The columns that say where a time was taken."""
    clock = "cpu" if threads == 1 else "wall"
    return {"cpu": host.model(), "isa": host.instruction_set(), "threads": threads, "clock": clock}


# ---- memory ----


def memory_rows(command: Command) -> Iterator[dict[str, Any]]:
    """What a forward and backward pass of a long row takes at its peak."""
    case = cpu_cases.memory(command.sized(256, cpu_cases.MEMORY_SEQLEN, cpu_cases.MEMORY_SEQLEN))
    gate = Gate(cpu_cases.memory(min(case.seqlen_k, MEMORY_GATE_SEQLEN)), CPU)
    for provider in providers_of(case):
        if not command.wants(case, provider.name):
            continue
        described = case.columns() | {"provider": provider.name, "pass": "both"} | columns_of_host(1)
        try:
            gate.admit(provider)
        except (Unavailable, Wrong) as error:
            yield described | {"no_numbers_because": f"unavailable: {error}"}
            continue
        peak = peak_of(provider, case.make(CPU))
        print(f"{case}  {provider.name:<16} {peak} MiB beyond the inputs", flush=True)
        yield described | {"peak_memory_mib": peak, "note": f"all scores would take {scores_mib(case):.0f} MiB"}


def peak_of(provider: Provider, inputs: AttentionInputs) -> float | None:
    """MiB of a forward and backward pass, with one thread."""
    leaves = list(inputs.leaves().values())
    with using_threads(1), provider.context():
        call = provider.prepare(inputs)
        return host.peak_memory_mib(lambda: torch.autograd.grad(call(), leaves, inputs.dout))


def scores_mib(case: AttentionCase) -> float:
    """MiB of a float32 matrix of a case's scores."""
    return 4 * case.batch * case.nheads * case.seqlen_q * case.seqlen_k / 2**20


# ---- another instruction set, in a process of its own ----


def held_run(command: Command) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The table of `main` in a process whose libraries are all held to AVX2; empty where that is the best anyway."""
    if host.instruction_set() in (None, "baseline", HELD_TO) or not held_cases(command):
        return [], {}
    with tempfile.TemporaryDirectory() as folder:
        options = [] if command.size == "full" else [f"--{command.size}"]
        filters = ["--filter", *(pattern.pattern for pattern in command.patterns)] if command.patterns else []
        line = [sys.executable, "-m", "benchmarks.cpu_attention", "--device", "cpu", *options, "--out", folder]
        subprocess.run([*line, *filters], check=True, env=os.environ | ENVIRONMENT)
        return read(Path(folder, "attention.csv"))


def held_cases(command: Command) -> list[AttentionCase]:
    """The cases of that process."""
    cases = cpu_cases.held_to(HELD_TO, every_case(command))
    return [case for case in cases if any(command.wants(case, p.name) for p in providers_of(case))]


# ---- the command ----


def every_case(command: Command) -> list[AttentionCase]:
    """The cases of the size."""
    return command.sized(cpu_cases.smoke_cases, cpu_cases.quick_cases, cpu_cases.every_case)()


def dtypes_of(cases: Iterable[AttentionCase]) -> list[torch.dtype]:
    """The dtypes among the cases."""
    return list(dict.fromkeys(case.dtype for case in cases))


def run(command: Command) -> int:
    """Measures everything, prints and writes; returns the exit status."""
    cases = every_case(command)
    threads = [count for count in THREADS if count <= (os.cpu_count() or 1)]
    load = host.load()
    rates = cpu_rates.measure(dtypes_of(cases), threads)
    origin = cpu_rates.as_json(rates) | {"load_before": load}
    with ResultTable(command, "attention", CPU_COLUMNS, **origin) as table:
        for row in in_turns(cases, command, threads, rates):
            table.add(**row, load_before=load)
        for row in memory_rows(command):
            table.add(**row, load_before=load)
        held, held_origin = held_run(command)
        for row in held:
            table.add(**row)
    print_comparisons(comparisons(table.rows))
    found = cpu_targets.verdicts(table.rows) + cpu_targets.memory_verdicts(table.rows)
    origin = {"load_before": load, f"held_to_{HELD_TO}": held_origin}
    with ResultTable(command, "attention_targets", cpu_targets.COLUMNS, **origin) as targets:
        for verdict in found:
            targets.add(**verdict._asdict())
    cpu_targets.print_verdicts(found)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Times the batches of sentences with one thread as the environment has it; returns the exit status."""
    command = parse("cpu_attention", "Time attention with one instruction set.", arguments)
    if command is None:
        return 1
    cases = held_cases(command)
    load, rates = host.load(), cpu_rates.measure(dtypes_of(cases), [1])
    origin = cpu_rates.as_json(rates) | {"load_before": load}
    with ResultTable(command, "attention", CPU_COLUMNS, **origin) as table:
        for row in in_turns(cases, command, [1], rates):
            table.add(**row, load_before=load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
