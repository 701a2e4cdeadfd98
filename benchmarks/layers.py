"""The paper's Table 1, measured: what one layer costs as sequences get longer.

    python -m benchmarks.layers          on a GPU; --smoke for tiny cases on any machine

Self-attention, O(n^2 d), recurrent (nn.LSTM), O(n d^2), convolutional (nn.Conv1d), O(k n d^2), and self-attention
restricted to a window, O(r n d), each from width d to width d on the same number of tokens, forward and backward; the
attentions with their projections. On a CPU a window is a mask, which saves no work there. Writes layers.csv and .json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from benchmarks.cases import precisions, short
from benchmarks.command import Command, parse
from benchmarks.gate import MAX_ROUNDINGS, MAX_SUM_OFF, off_by
from benchmarks.result_table import ResultTable
from benchmarks.timing import peak_memory_mib, time_for

COLUMNS = (
    *("layer", "dtype", "batch", "seqlen", "width", "p50_ms", "p20_ms", "p80_ms", "peak_memory_mib", "note"),
    "no_numbers_because",
)
HEAD_DIM = 64
KERNEL_WIDTH = 3  # k
WINDOW = 128  # r: each position sees half of it on either side


def self_attention(width: int) -> fastattn.MultiHeadAttention:
    """The paper's self-attention."""
    return fastattn.MultiHeadAttention(width, max(1, width // HEAD_DIM), batch_first=True)


def restricted(attention: fastattn.MultiHeadAttention, x: Tensor) -> Tensor:
    """Self-attention within a window."""
    q, k, v = (
        project(x).transpose(1, 2)
        for project in (attention.project_query, attention.project_key, attention.project_value)
    )
    attend: Callable[..., Any] = fastattn.scaled_dot_product_attention
    return attention.project_output(attend(q, k, v, window=(WINDOW // 2, WINDOW // 2)).transpose(1, 2))


# How each is made of its width, and run on (batch, seqlen, width), which gives the same shape.
LAYERS: dict[str, tuple[Callable[[int], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "self-attention": (self_attention, lambda layer, x: layer(x, x, x, need_weights=False)[0]),
    "recurrent": (lambda width: nn.LSTM(width, width, batch_first=True), lambda layer, x: layer(x)[0]),
    "convolutional": (
        lambda width: nn.Conv1d(width, width, KERNEL_WIDTH, padding="same"),
        lambda layer, x: layer(x.transpose(1, 2)).transpose(1, 2),
    ),
    "restricted self-attention": (self_attention, restricted),
}


def why_wrong(name: str, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compares the layer on a few short sequences with itself in float64 on the reference."""
    make, run = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(width).to(device), torch.randn(2, 2 * WINDOW, width, device=device)
    with fastattn.use_backend("reference"), torch.no_grad():
        expected = run(layer.double(), x.double())
    with torch.no_grad():
        actual = run(layer.to(dtype), x.to(dtype))
    off, allowed = off_by(actual, expected), MAX_ROUNDINGS * torch.finfo(dtype).eps + MAX_SUM_OFF
    return None if off <= allowed else f"wrong: off by {off:.1e} of the norm, allowed are {allowed:.1e}"


def measure(name: str, x: Tensor, command: Command) -> dict[str, Any]:
    """The columns with numbers, forward and backward together."""
    make, run = LAYERS[name]
    layer = make(x.shape[-1]).to(x.device, x.dtype)
    leaves, dout = [x, *layer.parameters()], torch.randn_like(x)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, leaves, dout)

    timing = time_for(lambda: run(layer, x), backward, x.device, command.sized(0.0, 0.2, 0.5))["both"]
    memory = peak_memory_mib(lambda: backward(run(layer, x)), x.device)
    note = _backend(layer, x) if isinstance(layer, fastattn.MultiHeadAttention) else ""
    return {name: f"{ms:.4f}" for name, ms in timing._asdict().items()} | {"peak_memory_mib": memory, "note": note}


def _backend(layer: fastattn.MultiHeadAttention, x: Tensor) -> str:
    """The backend that the attention ran on."""
    q = layer.project_query(x[:, :1]).transpose(1, 2)
    return fastattn.explain(q, q, q).backend


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("layers", "Time one layer of each kind.", arguments)
    if command is None:
        return 1
    torch.backends.cudnn.allow_tf32 = False  # in the recurrent and the convolutional layer, too, float32 means float32
    on_gpu = command.device.type == "cuda"
    tokens, width = command.sized((64, 16), *[(16_384, 512) if on_gpu else (2_048, 512)] * 2)
    lengths = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384) if n <= tokens]
    with ResultTable(command, "layers", COLUMNS, kernel_width=KERNEL_WIDTH, window=WINDOW) as table:
        for dtype in precisions(command.device):
            wrong = {name: why_wrong(name, width, dtype, command.device) for name in LAYERS}
            for seqlen, name in product(lengths[:: command.sized(1, 2, 1)], LAYERS):
                if not command.wants(name, short(dtype), seqlen):
                    continue
                sizes = {"batch": tokens // seqlen, "seqlen": seqlen, "width": width}
                x = torch.randn(*sizes.values(), device=command.device, dtype=dtype).requires_grad_()
                row = {"no_numbers_because": wrong[name]} if wrong[name] else measure(name, x, command)
                table.add(layer=name, dtype=short(dtype), **sizes, **row)
                result = wrong[name] or f"{row['p50_ms']} ms"
                print(f"{short(dtype):<9}{name:<27}{seqlen:>6}  {result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
