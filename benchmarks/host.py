"""The CPU that a benchmark runs on: its model, the instruction sets in use, its load, and the memory a call takes."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastattn import backends

QUIET_LOAD = 0.3  # of the last minute; above it something else ran
CPUINFO, STATUS, CLEAR_REFS = (Path("/proc", name) for name in ("cpuinfo", "self/status", "self/clear_refs"))


def model() -> str:
    """The CPU's name, such as "AMD EPYC"; its architecture where the system does not name it."""
    return _cpuinfo().get("model name") or platform.machine()


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels run with; None where they are not part of the installation."""
    backend = backends.get("cpu")
    return None if backend.why_missing() else backend.kernels().isa()


def facts() -> dict[str, Any]:
    """What a time on this CPU depends on, in types that JSON knows."""
    known = _cpuinfo()
    return {
        "family_model_stepping": [known.get(name) for name in ("cpu family", "model", "stepping")],
        "instruction_set": instruction_set(),
        "instruction_set_of_torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def load() -> float:
    """Processes that ran or waited, in the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_note(load_before: float) -> str | None:
    """What to say of times that were taken beside other work; None if the machine was quiet."""
    if load_before <= QUIET_LOAD:
        return None
    return f"not quiet: a load of {load_before} before it began, more than {QUIET_LOAD}"


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core."""
    if not CPUINFO.exists():
        return {}
    lines = CPUINFO.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def peak_memory_mib(run: Callable[[], Any]) -> float | None:
    """MiB by which this process grew while `run` ran, at the peak: tensors and workspaces; None if not on Linux."""
    if not CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be taken again, unseen
    CLEAR_REFS.write_text("5")  # the peak starts anew
    before = _status_kib("VmRSS")
    run()
    return round((_status_kib("VmHWM") - before) / 1024, 1)


def _status_kib(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
