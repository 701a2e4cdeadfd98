"""How many processes may share a GPU."""

from __future__ import annotations

import os

import torch

MOST_PROCESSES, BYTES_OF_PROCESS = 16, 3 << 30


def processes(device: torch.device) -> int:
    """As many as this process may use cores, and as the GPU has memory for their contexts and float64 references."""
    cores = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    if device.type != "cuda" or not torch.cuda.is_available():
        return cores
    return max(1, min(cores, torch.cuda.mem_get_info(device)[0] // BYTES_OF_PROCESS))
