"""The CPU kernels and memory: any offset, any strides, and nothing read or written beside the tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.arguments import attention_params, draw_seed
from fastattn.cpu_kernels import attention as cpu
from fastattn.params import Backward, Forward
from tests.support.cpu_checks import check_keys_apart
from tests.support.cpu_runs import assert_same_bits, each_isa, on_cpu, results

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = -77.0


def framed(x: Tensor, around: float = torch.nan) -> tuple[Tensor, Tensor]:
    """The memory, in which `around` lies on all sides of every row, and the view of it that holds x's values."""
    memory = torch.full([n + 3 for n in x.shape], around, dtype=x.dtype)
    view = memory
    for dim, n in enumerate(x.shape):
        view = view.narrow(dim, 1, n)
    view.copy_(x)
    return memory, view


def problem(
    dtype: torch.dtype, seqlens: tuple[int, int] = (19, 23), dims: tuple[int, int] = (13, 9)
) -> tuple[Tensor, ...]:
    """q, k, v, bias and mask of two sequences."""
    (seqlen_q, seqlen_k), (d, dv) = seqlens, dims
    q, k, v = (torch.randn(2, heads, n, x) for heads, n, x in ((4, seqlen_q, d), (2, seqlen_k, d), (2, seqlen_k, dv)))
    bias, mask = torch.randn(2, 4, seqlen_q, seqlen_k), torch.rand(2, 4, seqlen_q, seqlen_k) > 0.2
    return *(x.to(dtype) for x in (q, k, v, bias)), mask


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlens", [(3, 23), (19, 23), (60, 270)])
def test_nothing_beside_the_tensors_matters_or_changes(seqlens: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    """Inputs lie among NaN at odd addresses, results among numbers that have to stay."""
    q, k, v, bias, mask = problem(dtype, seqlens)
    dout = torch.randn(*q.shape[:-1], v.size(-1)).to(dtype)
    found = []
    for is_framed in (False, True):
        place = (lambda x: framed(x)[1]) if is_framed else (lambda x: x)
        p = attention_params(
            *(place(x) for x in (q, k, v)), mask, attn_bias=place(bias), dropout_p=0.2, enable_gqa=True, is_causal=True
        )
        if is_framed:
            mask_memory = torch.ones([n + 3 for n in mask.shape], dtype=torch.bool)
            p = p.replace(mask=mask_memory[1:-2, 1:-2, 1:-2, 1:-2].copy_(mask))
        torch.manual_seed(1)
        found.append(_filled(draw_seed(p), place(dout), isa))
    assert_same_bits(found[1], found[0])


def _filled(p: Any, dout: Tensor, isa: str) -> dict[str, Tensor]:
    """The results of both passes, written into frames that have to stay as they are."""
    shapes = {"out": (p.q, dout.shape), "dq": (p.q, p.q.shape), "dk": (p.q, p.k.shape), "dv": (p.q, p.v.shape)}
    frames = {name: framed(like.new_full(shape, torch.nan), GUARD) for name, (like, shape) in shapes.items()}
    rows = torch.full((3, *p.q.shape[:3]), GUARD)  # lse is contiguous
    lse, dlse = rows[1].fill_(torch.nan), torch.randn(p.q.shape[:3], generator=torch.Generator().manual_seed(4))
    dbias = torch.full(p.bias.shape, torch.nan, dtype=p.bias.dtype)
    views = {name: view for name, (_, view) in frames.items()}
    with cpu.on(isa):
        cpu.attention_fwd(Forward(views["out"], lse), p)
        cpu.attention_bwd(Backward(views["out"], lse, dout, dlse, views["dq"], views["dk"], views["dv"], dbias), p)
    found = {name: x.clone() for name, x in views.items()} | {"lse": lse.clone(), "dbias": dbias}
    assert not any(x.isnan().any() for x in found.values())
    for memory, view in frames.values():
        view.fill_(GUARD)
        assert (memory == GUARD).all()
    assert (rows[0] == GUARD).all() and (rows[2] == GUARD).all()
    return found


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address(dtype: torch.dtype, isa: str) -> None:
    q, k, v, bias, mask = problem(dtype, dims=(32, 16))

    def moved(x: Tensor, by: int) -> Tensor:
        return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)

    with on_cpu(isa):
        expected = results(q, k, v, bias, attn_mask=mask, enable_gqa=True)
        for by in (1, 2, 3, 5):
            inputs = [moved(x, by) for x in (q, k, v, bias)]
            assert inputs[0].storage_offset() == by
            assert_same_bits(results(*inputs, attn_mask=moved(mask, by), enable_gqa=True), expected)


@each_isa
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_dimensions(order: tuple[int, ...], isa: str) -> None:
    """Batch, heads and rows lie in every order; those of mask and bias in every order of four."""
    q, k, v, bias, mask = problem(torch.float32)
    dout = torch.randn(2, 4, 19, 9)

    def laid(x: Tensor, *order: int) -> Tensor:
        back = sorted(range(4), key=order.__getitem__)
        return x.permute(order).contiguous().permute(back)

    with on_cpu(isa):
        expected = results(q, k, v, bias, dout, attn_mask=mask, enable_gqa=True)
        inputs = [laid(x, *order, 3) for x in (q, k, v)]
        scores = [laid(x, 3, *order) for x in (bias, mask)]
        assert scores[0].stride(3) > 1
        actual = results(*inputs, scores[0], laid(dout, *order, 3), attn_mask=scores[1], enable_gqa=True)
    assert_same_bits(actual, expected)


@each_isa
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "rows"])
def test_elements_that_share_memory(dim: int, isa: str) -> None:
    q, k, v, bias, mask = problem(torch.float32)
    shared = [x.narrow(dim, 0, 1).expand_as(x) for x in (q, k, v, bias, mask)]
    dout = torch.randn(2, 4, 19, 9).narrow(dim, 0, 1).expand(2, 4, 19, 9)
    with on_cpu(isa):
        actual = results(*shared[:4], dout, attn_mask=shared[4], enable_gqa=True)
        copies = [x.contiguous() for x in shared]
        expected = results(*copies[:4], dout.contiguous(), attn_mask=copies[4], enable_gqa=True)
    expected["dbias"] = expected["dbias"].expand_as(actual["dbias"])
    torch.testing.assert_close(actual.pop("dbias"), expected.pop("dbias"), rtol=1e-5, atol=1e-5)
    assert_same_bits(actual, expected)


@each_isa
def test_keys_of_mask_and_bias_that_lie_apart(isa: str) -> None:
    with on_cpu(isa):
        check_keys_apart()


@each_isa
def test_a_last_dimension_with_a_stride(isa: str) -> None:
    q, k, v, _, _ = problem(torch.float32)
    dout = torch.randn(2, 4, 19, 9)
    with on_cpu(isa):
        expected = results(q, k, v, dout=dout, enable_gqa=True)
        spread = [torch.stack([x, x * 2], -1)[..., 0] for x in (q, k, v, dout)]
        assert_same_bits(results(*spread[:3], dout=spread[3], enable_gqa=True), expected)
        ones = results(q, k, v, dout=torch.ones(()).expand(2, 4, 19, 9), enable_gqa=True)
        assert_same_bits(ones, results(q, k, v, dout=torch.ones(2, 4, 19, 9), enable_gqa=True))
