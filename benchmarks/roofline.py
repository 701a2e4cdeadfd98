"""The device's own limits, measured before anything else: how fast it copies, and how fast it multiplies matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.timing import time_once

GPU_BYTES = 1 << 30  # far more than any cache
CPU_BYTES = 1 << 26
GPU_MATRIX, CPU_MATRIX = 4096, 512


class Roofline(NamedTuple):
    """Measured rates of one device."""

    copy_gb_s: float
    product_tflops: dict[torch.dtype, float]  # without dtypes that the device cannot multiply

    def share(self, flops: float, moved_bytes: float, dtype: torch.dtype, milliseconds: float) -> float:
        """The share of the speed allowed by the slower one of the two rates that was reached in that time."""
        copying_ms = moved_bytes / self.copy_gb_s * 1e-6
        products_ms = flops / self.product_tflops[dtype] * 1e-9 if dtype in self.product_tflops else 0.0
        return max(copying_ms, products_ms) / milliseconds


def measure(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Roofline:
    """The rates of a device, for products of these dtypes."""
    rates = {dtype: product_rate(device, dtype) for dtype in dtypes}
    return Roofline(copy_rate(device), {dtype: rate for dtype, rate in rates.items() if rate is not None})


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


def product_rate(device: torch.device, dtype: torch.dtype, repetitions: int = 10) -> float | None:
    """TFLOP/s of the product of two square matrices, by the median of the repetitions; None where torch has none."""
    size = GPU_MATRIX if device.type == "cuda" else CPU_MATRIX
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    try:
        time_once(lambda: left @ right, device, 2)  # warm up
    except RuntimeError:  # bfloat16 on a GPU older than that dtype
        return None
    timing = time_once(lambda: left @ right, device, repetitions)
    return 2e-9 * size**3 / timing.p50_ms
