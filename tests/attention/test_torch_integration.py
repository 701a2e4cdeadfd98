"""Demands of torch on an operator: opcheck, compile, autocast, layouts, checkpointing, threads, derivatives."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import reference
from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from fastattn.params import AttentionParams, Backward, Forward
from tests.support.cases import Case, cumulative
from tests.support.contract import call, leaf
from tests.support.stand_in import stand_in

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [
    Case(),
    Case(mask="random", bias="per-head", band="causal-window", dropout_p=0.3, heads=(4, 2), layout="heads-inner"),
    Case(dtype=torch.bfloat16, bias="full", dims=(8, 12), layout="expanded"),
    Case(packed=True, mask="padding", bias="per-key", dropout_p=0.3, dims=(8, 12)),
    Case(seqlens=(5, 0)),
]


def operator_arguments(case: Case) -> tuple[list[Any], list[Any]]:
    """Arguments of attention_fwd and attention_bwd."""
    (q, k, v, bias), arguments = case.make()
    del arguments["return_lse"], arguments["sinks"]
    params = varlen_attention_params if case.packed else attention_params
    p = draw_seed(params(q, k, v, attn_bias=bias, **arguments))
    out, lse = torch.ops.fastattn.attention_fwd(*p, "torch")
    results = (out, lse, torch.randn_like(out), torch.randn_like(lse), bias is not None)
    return [*p, "torch"], [*p, *results, "torch"]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    forward, backward = operator_arguments(case)
    for operator, arguments in (("attention_fwd", forward), ("attention_bwd", backward)):
        report = torch.library.opcheck(getattr(torch.ops.fastattn, operator), tuple(arguments), test_utils=OPCHECKS)
        assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_results_have_the_real_strides(case: Case) -> None:
    forward, backward = operator_arguments(case)
    for operator, arguments in (("attention_fwd", forward), ("attention_bwd", backward)):
        real = getattr(torch.ops.fastattn, operator)(*arguments)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
            fake = getattr(torch.ops.fastattn, operator)(*faked)
        for x, y in zip(real, fake, strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def grads(function: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    result = function(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype) for x in results]
    return (*results, *torch.autograd.grad(results, [x for x in inputs if x is not None], upstream))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "case", [*CASES, Case(band="causal", return_lse=False), Case(mask="random", return_lse=False)], ids=str
)
def test_compile_makes_one_graph(backend: str, case: Case) -> None:
    tensors, arguments = case.make()
    dtype = torch.float64 if case.dtype == torch.float32 else case.dtype
    inputs = tuple(None if x is None else leaf(x, dtype) for x in tensors)
    torch._dynamo.reset()
    with fastattn.use_backend(backend):
        eager = grads(lambda *x: call(x, arguments), inputs)
        compiled = grads(torch.compile(lambda *x: call(x, arguments), fullgraph=True, backend="aot_eager"), inputs)
    for x, y in zip(eager, compiled, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.long
def test_compile_takes_one_tensor_in_several_roles() -> None:
    torch._dynamo.reset()
    x, cu_seqlens = torch.randn(7, 2, 8, requires_grad=True), cumulative([3, 4])
    dense = torch.randn(2, 2, 7, 8, requires_grad=True)

    def packed(x: Tensor) -> Tensor:
        return fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 4, 4)

    def keys_are_values(x: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.scaled_dot_product_attention(x + 1, x, x, return_lse=True)

    def all_one(x: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.scaled_dot_product_attention(x, x, x, return_lse=True)

    for function, inputs in ((packed, (x,)), (keys_are_values, (dense,)), (all_one, (dense,))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(grads(function, inputs), grads(compiled, inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.long
def test_compile_with_dynamic_sizes_and_another_backend() -> None:
    torch._dynamo.reset()
    function = torch.compile(fastattn.scaled_dot_product_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (5, 9, 12):
        q = torch.randn(2, 2, seqlen, 8)
        mask = torch.rand(seqlen, seqlen) > 0.3
        for backend in ("torch", "reference"):
            with fastattn.use_backend(backend):
                expected = fastattn.scaled_dot_product_attention(q, q, q, mask, is_causal=True)
                torch.testing.assert_close(function(q, q, q, mask, is_causal=True), expected)


@pytest.mark.long
def test_inductor() -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(9, 9) > 0.3

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fastattn.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
        return out + fastattn.scaled_dot_product_attention(q, k, v)

    for x, y in zip(grads(function, (q, k, v)), grads(torch.compile(function, fullgraph=True), (q, k, v)), strict=True):
        torch.testing.assert_close(x, y)


LOWER = torch.ones(5, 5, dtype=torch.bool).tril(1)
AUTOCAST = {"plain": {}, "masked": {"is_causal": True, "attn_mask": LOWER}, "with lse": {"return_lse": True}}


@pytest.mark.parametrize("kwargs", AUTOCAST.values(), ids=AUTOCAST)
def test_autocast_casts_as_torch_does(kwargs: dict[str, Any]) -> None:
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(5, 5)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = fastattn.scaled_dot_product_attention(*half, attn_bias=bias, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = fastattn.scaled_dot_product_attention(q, k, v, attn_bias=bias, **kwargs)
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        expected, actual = (x if isinstance(x, tuple) else (x,) for x in (expected, actual))
        # The backward, too, may run with autocast on.
        dout = torch.randn_like(actual[0])
        grads, half_grads = (torch.autograd.grad(*x, dout) for x in ((actual[0], (q, k, v)), (expected[0], half)))
    assert grads[0].dtype == torch.float32 and actual[0].dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for x, y in zip(grads, half_grads, strict=True):
        assert torch.equal(x, y.float())
    with torch.autocast("cpu", torch.bfloat16):
        double = q.double()
        assert fastattn.scaled_dot_product_attention(double, double, double).dtype == torch.float64


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k = torch.randn(1, 1, 3, 4, requires_grad=True), torch.randn(1, 1, 3, 4)
    bias = torch.randn(3, 3)
    out, lse = fastattn.scaled_dot_product_attention(q, k, k, attn_bias=bias, return_lse=True)
    assert out.requires_grad and lse.requires_grad
    (dq,) = torch.autograd.grad(lse.sum(), q)  # out unused
    torch.testing.assert_close(dq, 0.5 * ((0.5 * q @ k.transpose(-1, -2) + bias).softmax(-1) @ k))
    with torch.no_grad():
        assert not fastattn.scaled_dot_product_attention(q, k, k, return_lse=True)[0].requires_grad


def test_checkpoint_replays_the_same_dropout() -> None:
    q = torch.randn(2, 2, 6, 8, requires_grad=True)
    function = lambda x: fastattn.scaled_dot_product_attention(x, x, x, dropout_p=0.5)  # noqa: E731
    plain = grads(function, (q,))
    replayed = grads(lambda x: checkpoint(function, x, use_reentrant=False), (q,))
    for x, y in zip(plain, replayed, strict=True):
        assert torch.equal(x, y)


def test_manual_seed_fixes_dropout_and_calls_differ() -> None:
    q = torch.randn(2, 2, 6, 8)
    torch.manual_seed(1)
    first, second = (fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 4, 3, 5, 8), (0, 2, 3, 4), (2, 0, 3, 4)], ids=str
)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    seqlen = shape[-2]
    mask = torch.rand(*shape[:-2], seqlen, seqlen) > 0.2
    mask[..., 0] = True
    plain = (q @ k.transpose(-1, -2) * shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(plain, (q, k, v), dout))
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, mask), plain)


def test_a_mask_over_some_leading_dimensions() -> None:
    q = torch.randn(2, 4, 3, 5, 8)
    mask = torch.rand(4, 1, 5, 5) > 0.3
    expected = fastattn.scaled_dot_product_attention(q, q, q, mask.expand(2, 4, 3, 5, 5).clone())
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, q, q, mask), expected)


def test_out_keeps_the_order_of_heads_and_rows() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    out, _ = fastattn.scaled_dot_product_attention(x, x, x, return_lse=True)
    assert out.transpose(1, 2).is_contiguous()
    out, _ = fastattn.scaled_dot_product_attention(*[x.contiguous()] * 3, return_lse=True)
    assert out.is_contiguous()


def test_backward_in_a_cold_thread() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    out, _ = fastattn.scaled_dot_product_attention(q, q, q, return_lse=True)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(out.sum(), q)))
    with fastattn.use_backend("reference"):  # of the forward's thread, and none of the backward's business
        thread.start()
        thread.join()
    assert found[0].isfinite().all()


def test_forcing_a_backend_holds_for_one_thread() -> None:
    q, found = torch.randn(1, 1, 2, 4), []
    thread = threading.Thread(target=lambda: found.append(fastattn.explain(q, q, q).backend))
    with fastattn.use_backend("reference"):
        thread.start()
        thread.join()
    assert found == [fastattn.explain(q, q, q).backend] != ["reference"]


@pytest.mark.long
def test_compiled_packed_attention_with_other_lengths() -> None:
    torch._dynamo.reset()
    function = torch.compile(fastattn.varlen_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 4], [1, 6], [5, 2]):
        x, cu_seqlens = torch.randn(7, 2, 8), cumulative(lengths)
        expected = fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 6, 6)
        torch.testing.assert_close(function(x, x, x, cu_seqlens, cu_seqlens, 6, 6), expected)


# ---- who wants to see the operator does ----


class Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8, requires_grad=True).transpose(1, 2) for _ in range(3))
    with Seen() as seen:
        out, lse = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True)
        torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        with torch.no_grad():
            fastattn.scaled_dot_product_attention(q, k, v, return_lse=True)
    assert seen.names.count("fastattn::attention_fwd") == 2
    assert seen.names.count("fastattn::attention_bwd") == 1


def test_vmap_runs_the_operator_for_each_slice() -> None:
    q, k, v = (torch.randn(3, 2, 2, 9, 8) for _ in range(3))

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.scaled_dot_product_attention(*tensors, return_lse=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it loops
        mapped = torch.vmap(attend)(q, k, v)
    for i in range(3):
        for x, expected in zip(mapped, attend(q[i], k[i], v[i]), strict=True):
            torch.testing.assert_close(x[i], expected)


def test_without_anybody_to_see_it_the_operator_is_left_out() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile() as profile:
        out, _ = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True)
        out.sum().backward()
    assert not [event.key for event in profile.key_averages() if event.key.startswith("fastattn::")]


def test_kernels_get_gradients_they_can_walk() -> None:
    """Autograd may hand over any strides: dout comes with a contiguous last dimension, dlse wholly contiguous."""
    given: list[Backward] = []

    def attention_bwd(backward: Backward, p: AttentionParams) -> None:
        given.append(backward)
        reference.attention_bwd(backward, p)

    passes = SimpleNamespace(attention_fwd=reference.attention_fwd, attention_bwd=attention_bwd)
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    dout, dlse = torch.randn(1, 2, 4, 3).transpose(2, 3), torch.randn(1, 1, 3).expand(1, 2, 3)
    with stand_in("torch", passes=passes), fastattn.use_backend("torch"):
        results = fastattn.scaled_dot_product_attention(q, q, q, return_lse=True)
        torch.autograd.grad(results, q, (dout, dlse))
    (backward,) = given
    assert backward.dout.stride(-1) == 1 and backward.dlse.is_contiguous()


def test_kernels_get_operands_that_lie_in_memory_as_they_read_them() -> None:
    """Negations are done, the last dimensions contiguous, cumulative lengths without a stride."""
    given: list[AttentionParams | Backward] = []

    def attention_fwd(forward: Forward, p: AttentionParams) -> None:
        given.append(p)
        reference.attention_fwd(forward, p)

    def attention_bwd(backward: Backward, p: AttentionParams) -> None:
        given.extend([backward, p])
        reference.attention_bwd(backward, p)

    lazy = lambda *shape: torch._neg_view(torch.randn(shape)).requires_grad_()  # noqa: E731
    edges = torch.stack([cumulative([3, 4]), cumulative([4, 3])], 1)
    with stand_in("cpu", passes=SimpleNamespace(attention_fwd=attention_fwd, attention_bwd=attention_bwd)):
        for q, k, v in ([lazy(7, 2, 8) for _ in range(3)], [lazy(7, 8, 2).transpose(1, 2) for _ in range(3)]):
            bias = lazy(2, 1, 1)
            out, lse = fastattn.varlen_attention(
                q, k, v, edges[:, 0], edges[:, 1], 4, 4, attn_bias=bias, return_lse=True
            )
            torch.autograd.grad(out, q, torch._efficientzerotensor(out.shape), retain_graph=True)
            torch.autograd.grad((out, lse), (q, k, v, bias), (lazy(*out.shape), lazy(*lse.shape)))
    assert len(given) == 10
    for x in (x for record in given for x in record if isinstance(x, Tensor)):
        assert not x.is_neg() and not x._is_zerotensor()
    for p in given:
        if isinstance(p, AttentionParams):
            assert all(x.stride(-1) == 1 for x in (p.q, p.k, p.v, p.cu_seqlens_q, p.cu_seqlens_k))
