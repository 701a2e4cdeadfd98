"""The rates of this CPU by number of threads, measured before anything else: copies, matrix products, multiply-adds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks import host, roofline
from benchmarks.cases import short
from benchmarks.cpu_peak import peak_tflops
from benchmarks.roofline import Roofline
from benchmarks.shared_library import BuildError

CPU = torch.device("cpu")


class Rates(NamedTuple):
    """The rates with one number of threads."""

    measured: Roofline  # of torch
    peak: float | None  # TFLOP/s of float32 multiply-adds; None without a compiler

    def roof(self) -> Roofline:
        """The measured one with the peak as the rate of float32 products: torch's library may not use every unit."""
        if self.peak is None:
            return self.measured
        return self.measured._replace(product_tflops=self.measured.product_tflops | {torch.float32: self.peak})

    def peak_of(self, dtype: torch.dtype) -> float | None:
        """TFLOP/s that nothing with operands of this dtype exceeds; None where they are not known."""
        return self.peak if dtype == torch.float32 else None


def measure(dtypes: Iterable[torch.dtype], threads: Iterable[int]) -> dict[int, Rates]:
    """The rates by number of threads, with products of these dtypes."""
    one = _peak()
    rates = {}
    for count in threads:
        with using_threads(count):
            rates[count] = Rates(roofline.measure(CPU, tuple(dtypes)), None if one is None else count * one)
    return rates


def _peak() -> float | None:
    try:
        return peak_tflops(host.instruction_set())
    except BuildError as error:
        print(f"{error}; no share of the peak is known", file=sys.stderr)
        return None


def as_json(rates: dict[int, Rates]) -> dict[str, Any]:
    """The rates as the JSON beside a table has them."""
    tflops = {
        f"{short(dtype)}, threads: {count}": round(rate, 3)
        for count, one in rates.items()
        for dtype, rate in one.measured.product_tflops.items()
    }
    peaks = {f"threads: {count}": round(one.peak, 3) for count, one in rates.items() if one.peak is not None}
    copy = rates[max(rates)].measured.copy_gb_s
    return {"copy_gb_s": round(copy, 1), "product_tflops": tflops, "float32_peak_tflops": peaks}


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Inside, torch and the kernels work with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
