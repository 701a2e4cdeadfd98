"""Graphs for any sizes: lengths of query and key that know nothing of each other, lengths that are read from data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import fastattn

LENGTHS = ((5, 5), (5, 9), (9, 5), (2, 3))  # of query and key, when the program runs


class Attention(nn.Module):
    """One call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return fastattn.scaled_dot_product_attention(query, key, value, mask, **self.options)


def tensors(batch: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, ...]:
    """Query, key, value and a mask that lets every query see a key."""
    shapes = (batch, 2, seqlen_q, 8), (batch, 2, seqlen_k, 8), (batch, 2, seqlen_k, 8)
    mask = torch.rand(seqlen_q, seqlen_k) < 0.7
    return *(torch.randn(shape) for shape in shapes), mask


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-left": {"is_causal": True},
    "bottom-right": {"is_causal": True, "causal_align": "bottom-right"},
    "lse": {"return_lse": True, "window": (2, None), "causal_align": "bottom-right"},
}


QUICK = {(False, (5, 5), "plain")}  # lengths that are the same only in the example


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("is_auto", [False, True], ids=["named", "auto"])
@pytest.mark.parametrize(
    ("strict", "lengths", "options"),
    [
        pytest.param(strict, lengths, options, marks=() if (strict, lengths, options) in QUICK else pytest.mark.long)
        for strict in (False, True)
        for lengths in ((5, 5), (5, 9))
        for options in OPTIONS
    ],
)
def test_an_exported_program_takes_any_two_lengths(
    strict: bool, lengths: tuple[int, int], options: str, is_auto: bool, masked: bool
) -> None:
    module = Attention(**OPTIONS[options])
    batch, seqlen_q, seqlen_k = (
        (Dim.AUTO,) * 3 if is_auto else (Dim("batch", max=64), *(Dim(name, min=2, max=64) for name in ("n", "m")))
    )
    mask_dims = {0: seqlen_q, 1: seqlen_k} if masked else None
    dims = ({0: batch, 2: seqlen_q}, {0: batch, 2: seqlen_k}, {0: batch, 2: seqlen_k}, mask_dims)

    def example(batch: int, lengths: tuple[int, int]) -> tuple[Tensor | None, ...]:
        *attended, mask = tensors(batch, *lengths)
        return *attended, mask if masked else None

    program = export(module, example(2, lengths), dynamic_shapes=dims, strict=strict).module()
    for other in LENGTHS:
        inputs = example(3, other)
        torch.testing.assert_close(program(*inputs), module(*inputs))


@pytest.mark.parametrize("with_mask", [pytest.param(False, marks=pytest.mark.long), True])
def test_max_seqlen_may_be_read_from_data_in_a_graph(with_mask: bool) -> None:
    def attend(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        longest = int(cu_seqlens.diff().max())
        mask = x[:2, :1, :1, None] > 0 if with_mask else None
        return fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, longest, longest, attn_mask=mask)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        for edges in ([0, 2, 7], [0, 6, 7]):
            x, cu_seqlens = torch.randn(7, 2, 8), torch.tensor(edges, dtype=torch.int32)
            torch.testing.assert_close(compiled(x, cu_seqlens), attend(x, cu_seqlens))
