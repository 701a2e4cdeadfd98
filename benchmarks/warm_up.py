"""Compiles what benchmarks.attention will time in Triton, in as many processes as there may be, before it is timed.

    python -m benchmarks.warm_up          --quick for the cases of the quick form, --smoke for tiny ones on any machine

Triton keeps what it compiled in its cache, which the next process reads. Where no case runs on Triton, nothing is done.
"""

from __future__ import annotations

import multiprocessing
import sys
from functools import partial

import torch

from benchmarks.cases import AttentionCase, every_case, quick_cases, smoke_cases
from benchmarks.command import parse
from benchmarks.parallel import processes


def run(case: AttentionCase, device: torch.device) -> str | None:
    """Runs both passes of a case on the backend that it is timed on; why that failed, or None."""
    from benchmarks.providers import Unavailable, all_providers

    (provider,) = (provider for provider in all_providers() if provider.name == "fastattn-triton")
    inputs = case.make(device)
    try:
        with provider.context():
            torch.autograd.grad(provider.prepare(inputs)(), list(inputs.leaves().values()), inputs.dout)
    except (Unavailable, NotImplementedError, RuntimeError) as error:
        return f"{case}: {error}"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Compiles; returns the exit status."""
    command = parse("warm_up", "Compile what will be timed.", arguments)
    if command is None:
        return 1
    device = command.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        print("Triton takes GPUs of capability 8.0 and newer: there is nothing to compile here")
        return 0
    cases = [case for case in command.sized(smoke_cases, quick_cases, every_case)() if command.wants(case)]
    with multiprocessing.get_context("spawn").Pool(processes(device)) as pool:
        failed = [reason for reason in pool.imap_unordered(partial(run, device=device), cases) if reason is not None]
    for reason in failed:
        print(reason, file=sys.stderr)
    print(f"{len(cases) - len(failed)} of {len(cases)} cases are compiled")
    return int(len(failed) == len(cases))


if __name__ == "__main__":
    sys.exit(main())
