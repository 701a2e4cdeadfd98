"""How fast the device moves memory: the floor of every kernel at short sequences."""

from __future__ import annotations

import torch

from benchmarks.timing import time_once

GPU_BYTES = 1 << 30  # far more than any cache
CPU_BYTES = 1 << 26


def copy_rate(device: torch.device, repetitions: int = 20) -> float:
    """GB/s of a plain copy, bytes read and bytes written both counted; the median of the repetitions.

    Args:
        device: which.
        repetitions: at least 2.
    """
    source = torch.ones(GPU_BYTES if device.type == "cuda" else CPU_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time_once(lambda: target.copy_(source), device, 2)  # warm up
    timing = time_once(lambda: target.copy_(source), device, repetitions)
    return 2e-6 * source.numel() / timing.p50_ms
