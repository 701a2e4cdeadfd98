"""Times the matrix products that training consists of, where a GPU has no fast attention of others to compare with.

    python -m benchmarks.products          --quick for a quarter of the repetitions, --smoke for tiny ones anywhere

On GPUs below compute capability 8.0 four fifths of a training step are products. Here they are with the sizes of the
paper's models on an update of 25,000 tokens: float32, and float16 with sums in float32 or, where torch can ask for
them, in float16. Writes products.csv and products.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from benchmarks.command import parse
from benchmarks.gate import off_by
from benchmarks.result_table import ResultTable
from benchmarks.timing import time_once

COLUMNS = ("model", "product", "m", "n", "k", "dtype", "sums", "p50_ms", "p20_ms", "p80_ms", "tflops", "error")
TOKENS, VOCABULARY = 25_000, 37_000
LOGITS_TOKENS = 4_096  # of a chunk of the loss
MODELS = {"base": (512, 2048), "big": (1024, 4096)}  # width, and width inside the feed-forward network
SUMS = ((torch.float32, "float32"), (torch.float16, "float32"), (torch.float16, "float16"))
CHECKED_ROWS = 64


class Product(NamedTuple):
    """(m, k) times (k, n)."""

    name: str
    m: int
    n: int
    k: int


def products(width: int, inner: int, tokens: int) -> list[Product]:
    """The products of a layer and of the logits, forward."""
    return [
        Product("q, k, v", tokens, 3 * width, width),
        Product("out", tokens, width, width),
        Product("feed-forward in", tokens, inner, width),
        Product("feed-forward out", tokens, width, inner),
        Product("logits", min(tokens, LOGITS_TOKENS), VOCABULARY if tokens == TOKENS else 2 * tokens, width),
    ]


@contextmanager
def float16_sums(wanted: bool) -> Iterator[None]:
    """Inside, cuBLAS may add up in float16 or must not, and takes no TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation, matmul.allow_tf32
    matmul.allow_fp16_accumulation, matmul.allow_tf32 = wanted, False
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation, matmul.allow_tf32 = before


def measure(product: Product, dtype: torch.dtype, sums: str, device: torch.device, repetitions: int) -> dict[str, str]:
    """Times of a product, and how far some of its rows are from those in float64."""
    left = torch.randn(product.m, product.k, device=device).to(dtype)
    right = (torch.randn(product.k, product.n, device=device) / product.k**0.5).to(dtype)
    with float16_sums(sums == "float16"):
        out = left @ right
        time_once(lambda: left @ right, device, 2)
        time = time_once(lambda: left @ right, device, repetitions)
    rows = slice(min(CHECKED_ROWS, product.m))
    error = off_by(out[rows], left[rows].double() @ right.double())
    numbers = {name: f"{milliseconds:.4f}" for name, milliseconds in time._asdict().items()}
    tflops = 2e-9 * product.m * product.n * product.k / time.p50_ms
    return numbers | {"tflops": f"{tflops:.2f}", "error": f"{error:.1e}"}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("products", "Time the matrix products of training.", arguments)
    if command is None:
        return 1
    with ResultTable(command, "products", COLUMNS) as table:
        for model, (width, inner) in MODELS.items():
            width, inner, tokens = command.sized((16, 64, 40), (width, inner, TOKENS), (width, inner, TOKENS))
            for product in products(width, inner, tokens):
                for dtype, sums in SUMS:
                    short = str(dtype).removeprefix("torch.")
                    if command.wants(model, product.name, short, sums):
                        numbers = measure(product, dtype, sums, command.device, command.sized(2, 5, 20))
                        described = {"model": model, "product": product.name, "dtype": short, "sums": sums}
                        table.add(**described, m=product.m, n=product.n, k=product.k, **numbers)
                        print(f"{model:<5}{product.name:<18}{short:<9}{sums:<9}{numbers['p50_ms']:>10} ms", end="")
                        print(f"{numbers['tflops']:>9} TFLOP/s, off by {numbers['error']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
