"""Times the module: fastattn.MultiHeadAttention against torch.nn.MultiheadAttention, on batches of WMT's lengths.

    python -m benchmarks.multi_head_attention          on a GPU; --smoke for tiny cases on any machine

Both have the same parameters, projections included, and run forward and backward as in training, without weights;
fastattn's also without padding, by forward_packed. Output and gradients are first compared with torch's module in
float64. Writes multi_head_attention.csv and multi_head_attention.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import AttentionCase, of_updates, precisions, short
from benchmarks.command import Command, parse
from benchmarks.gate import MAX_ROUNDINGS, MAX_SUM_OFF, off_by
from benchmarks.lengths import Lengths, updates
from benchmarks.result_table import ResultTable
from benchmarks.timing import peak_memory_mib, time_for
from fastattn import MultiHeadAttention

COLUMNS = (
    *("workload", "provider", "batch", "nheads", "seqlen_q", "seqlen_k", "mask", "dtype", "pass"),
    *("p50_ms", "p20_ms", "p80_ms", "peak_memory_mib", "no_numbers_because"),
)
PROVIDERS = ("torch", "fastattn", "fastattn-packed")


class ModuleInputs(NamedTuple):
    """The padded inputs of a module."""

    query: Tensor  # (batch, seqlen_q, width)
    key: Tensor  # the same one for self-attention
    is_query: Tensor  # (batch, seqlen_q) bool, False at padding
    is_key: Tensor
    dout: Tensor  # (tokens of the queries, width)


def make_inputs(case: AttentionCase, device: torch.device) -> ModuleInputs:
    """The inputs of a case, with the same values every time."""
    generator = torch.Generator(device).manual_seed(0)
    width = case.nheads * case.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(case.dtype)

    is_query, is_key = (
        torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        for lengths in (case.lengths_q, case.lengths_k)
    )
    query = normal(*is_query.shape, width).requires_grad_()
    key = normal(*is_key.shape, width).requires_grad_() if case.workload.startswith("cross") else query
    return ModuleInputs(query, key, is_query, is_key, normal(sum(case.lengths_q), width))


def make_module(provider: str, case: AttentionCase, device: torch.device) -> nn.Module:
    """The provider's module, in training mode; all have the same parameters."""
    kind = nn.MultiheadAttention if provider == "torch" else MultiHeadAttention
    torch.manual_seed(0)
    return kind(case.nheads * case.head_dim, case.nheads, batch_first=True).to(device, case.dtype)


class Prepared(NamedTuple):
    """One provider on a batch."""

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    dout: Tensor  # like the output; 0 at padding


def prepare(provider: str, case: AttentionCase, module: nn.Module, batch: ModuleInputs) -> Prepared:
    """The provider's call on the batch, as it is timed."""
    parameters = list(module.parameters())
    is_causal, device = case.mask == "causal", batch.query.device
    if provider == "fastattn-packed":
        assert isinstance(module, MultiHeadAttention)
        packed = replace(case, layout="packed").make(device)
        sizes = (packed.cu_seqlens_q, packed.cu_seqlens_k, packed.max_seqlen_q, packed.max_seqlen_k)
        forward: Callable[..., Tensor] = module.forward_packed
        query = batch.query.detach()[batch.is_query].requires_grad_()
        key = query if batch.key is batch.query else batch.key.detach()[batch.is_key].requires_grad_()
        leaves = [query, *([] if key is query else [key]), *parameters]
        return Prepared(lambda: forward(query, key, key, *sizes, is_causal=is_causal), leaves, batch.dout)
    options: dict[str, Any] = {"need_weights": False, "is_causal": is_causal, "key_padding_mask": ~batch.is_key}
    if is_causal:  # padding is on the right, where no query of a token looks
        band = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device).triu(1)
        options |= {"attn_mask": band, "key_padding_mask": None}
    dout = torch.zeros_like(batch.query).masked_scatter(batch.is_query[..., None], batch.dout)
    leaves = [batch.query, *([] if batch.key is batch.query else [batch.key]), *parameters]
    return Prepared(lambda: module(batch.query, batch.key, batch.key, **options)[0], leaves, dout)


def results(provider: str, case: AttentionCase, device: torch.device) -> dict[str, Tensor]:
    """The output at tokens and the gradients of the parameters."""
    module, batch = make_module(provider, case, device), make_inputs(case, device)
    prepared = prepare(provider, case, module, batch)
    out = prepared.call()
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, list(named.values()), prepared.dout)
    out = out.detach() if provider == "fastattn-packed" else out.detach()[batch.is_query]
    return {"out": out} | dict(zip(named, gradients, strict=True))


def why_wrong(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """The first result that is further from the expected than rounding brings it; None if all are right."""
    allowed = MAX_ROUNDINGS * torch.finfo(dtype).eps + MAX_SUM_OFF
    for name, exact in expected.items():
        off = off_by(actual[name], exact)
        if not off <= allowed:
            return f"wrong: {name} is off by {off:.1e} of its norm, allowed are {allowed:.1e}"
    return None


def measure(case: AttentionCase, provider: str, expected: dict[str, Tensor], command: Command) -> list[dict[str, Any]]:
    """A row for each pass, or one with the reason why there are no numbers."""
    device = command.device
    if reason := why_wrong(results(provider, case, device), expected, case.dtype):
        return [{"no_numbers_because": reason}]
    module, batch = make_module(provider, case, device), make_inputs(case, device)
    prepared = prepare(provider, case, module, batch)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, prepared.leaves, prepared.dout)

    timings = time_for(prepared.call, backward, device, command.sized(0.0, 0.15, 0.5))
    memory = peak_memory_mib(lambda: backward(prepared.call()), device)
    return [
        {"pass": which, "peak_memory_mib": memory} | {name: f"{ms:.4f}" for name, ms in timing._asdict().items()}
        for which, timing in timings.items()
    ]


def cases(command: Command) -> list[AttentionCase]:
    """Padded batches; the packed form is made of the same sentences."""
    if command.size == "smoke":
        every = of_updates([Lengths((3, 9, 5), (4, 2, 7))], [torch.float32], nheads=2)
    else:
        tokens = 25_000 if command.device.type == "cuda" else 1_000
        every = of_updates(updates(command.sized(1, 1, 3), tokens), precisions(command.device))
    return [case for case in every if case.layout == "padded"]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("multi_head_attention", "Time the module.", arguments)
    if command is None:
        return 1
    with ResultTable(command, "multi_head_attention", COLUMNS) as table:
        for case in cases(command):
            chosen = [provider for provider in PROVIDERS if command.wants(case, provider)]
            if chosen:
                print(f"\n{case}")
                expected = results("torch", replace(case, dtype=torch.float64), command.device)
            for provider in chosen:
                described = {**case.columns(), "dtype": short(case.dtype), "provider": provider}
                described = {name: value for name, value in described.items() if name in COLUMNS}
                measured = measure(case, provider, expected, command)
                for row in measured:
                    table.add(**described, **row)
                timed = [f"{row['pass']} {row['p50_ms']} ms" for row in measured if "p50_ms" in row]
                print(f"  {provider:<16} {'  '.join(timed) or measured[0]['no_numbers_because']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
