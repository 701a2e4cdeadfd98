"""Derivatives are right in every way of asking, or refused: never zeros, never a part."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import backends
from tests.support.cases import cumulative
from tests.support.derivatives import FIRST, FORWARD, SECOND, Function

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.FastattnFallbackWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

X, K, V = (torch.randn(1, 2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 6))
V = V[:, :, :5]
EDGES_Q, EDGES_K, USED = cumulative([1, 3]), cumulative([3, 2]), torch.tensor([2, 2], dtype=torch.int32)


def attend(*tensors: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return fastattn.scaled_dot_product_attention(*tensors, return_lse=True, **arguments)


def packed(x: Tensor, **arguments: Any) -> Tensor:
    q, k, v = (y[0].transpose(0, 1) for y in (x, K, V))
    return fastattn.varlen_attention(q, k, v, EDGES_Q, EDGES_K, 3, 3, **arguments)


def dropped(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return fastattn.scaled_dot_product_attention(x, K, V, dropout_p=0.4)


def merged(x: Tensor) -> Tensor:
    parts = [attend(x, K[:, :, keys], V[:, :, keys]) for keys in (slice(2), slice(2, 5))]
    return fastattn.merge_attention(*zip(*parts, strict=True))[0]


def default(x: Tensor) -> Tensor:
    """The call that is F.scaled_dot_product_attention on a CPU."""
    return fastattn.scaled_dot_product_attention(x, K, V)


# Calls that run as an operator, by what they are a function of.
CALLS: dict[str, Function] = {
    "out": lambda x: attend(x, K, V)[0],
    "lse": lambda x: attend(x, K, V, is_causal=True)[1],
    "both": lambda x: torch.cat([y.flatten(2) for y in attend(x, K, V)], -1),
    "packed": packed,
    "packed causal": lambda x: packed(x, is_causal=True),
    "dropout": dropped,
    "bias": lambda x: (
        attend(X, K, V, attn_bias=x[..., :1])[0] + attend(X, K, V, attn_bias=x[..., 1:2] * K[0, 0, :, 0])[0]
    ),
    "keys and values": lambda x: attend(K, x, x.flip(-1))[0],
    "softcap": lambda x: attend(x, K, V, softcap=0.7)[0],
    "sinks": lambda x: attend(x, K, V, sinks=x[0, :, 0, 0])[0],
    "lengths": lambda x: packed(x, seqused_k=USED),
    "merged": merged,
}
MODES = FIRST | FORWARD | SECOND
SOME_MODES = {name: MODES[name] for name in ("vmap of grad", "is_grads_batched", "func.jvp", "grad of grad", "third")}


def expected(mode: str, function: Function, x: Tensor = X) -> Tensor:
    with fastattn.use_backend("reference"):
        return MODES[mode](function, x)


@pytest.mark.parametrize("mode", MODES)
def test_of_an_operator(mode: str) -> None:
    for name in ("out", "packed causal"):
        torch.testing.assert_close(MODES[mode](CALLS[name], X), expected(mode, CALLS[name]))


@pytest.mark.parametrize("mode", SOME_MODES)
@pytest.mark.parametrize("name", CALLS)
def test_of_every_result_and_operand(name: str, mode: str) -> None:
    torch.testing.assert_close(MODES[mode](CALLS[name], X), expected(mode, CALLS[name]))


def test_references_own_derivatives_are_those_of_finite_differences() -> None:
    x = X[:, :, :2].clone().requires_grad_()
    for name in ("both", "packed", "bias", "keys and values", "softcap", "sinks", "lengths", "merged"):
        inputs = (X.clone().requires_grad_(),) if name in ("packed", "lengths") else (x,)
        call = CALLS[name] if name != "bias" else lambda x: attend(X[:, :, :2], K, V, attn_bias=x[..., :1])[0]
        with fastattn.use_backend("reference"):
            assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(call, inputs)


def test_second_derivatives_of_an_operator_are_those_of_finite_differences() -> None:
    x, k, bias = (
        X[:, :, :2].clone().requires_grad_(),
        K.clone().requires_grad_(),
        X[..., :2, :1].clone().requires_grad_(),
    )
    call = lambda x, k, bias: attend(x, k, V, attn_bias=bias)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, k, bias))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_of_every_sample(p: float) -> None:
    """Per-sample gradients, each with dropout of its own."""
    x = torch.randn(3, *X.shape, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return fastattn.scaled_dot_product_attention(x, K, V, dropout_p=p, return_lse=True)[0].pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), randomness="different")(x)
    assert found.shape == x.shape and found.isfinite().all()
    if p == 0:
        for sample, gradient in zip(x, found, strict=True):
            torch.testing.assert_close(gradient, torch.func.grad(loss)(sample))
    else:
        same = torch.func.vmap(torch.func.grad(loss), randomness="different")(x[:1].expand_as(x))
        assert not torch.equal(same[0], same[1])


def test_gradients_of_every_sample_by_a_modules_parameters() -> None:
    module = fastattn.MultiHeadAttention(6, 2, batch_first=True, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 4, 6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        edges = torch.tensor([0, 1, 4], dtype=torch.int32)
        forward = lambda x: module.forward_packed(x, x, x, edges, edges, 3, 3)  # noqa: E731
        holder = _Calls(module, forward)
        return torch.func.functional_call(holder, {f"module.{n}": p for n, p in parameters.items()}, (x,)).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(found[name][i], gradient)


class _Calls(nn.Module):
    """A module whose forward is another method of the one inside."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# ---- refused, or said ----


@pytest.mark.parametrize("mode", [name for name in FORWARD | SECOND])
def test_a_named_backend_refuses_what_it_does_not_compute(mode: str) -> None:
    with fastattn.use_backend("torch"), pytest.raises(NotImplementedError, match=r"use_backend\('reference'\)"):
        MODES[mode](CALLS["out"], X)


def test_the_refusal_is_the_forwards_wherever_the_backward_runs() -> None:
    x = X.clone().requires_grad_()
    with fastattn.use_backend("torch"):
        out = CALLS["out"](x)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"backend 'torch' has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("mode", ["func.jvp", "grad of grad"])
def test_it_is_said_once_that_scores_are_stored(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MODES["backward"](CALLS["out"], X)
        assert not [w for w in caught if w.category is fastattn.FastattnFallbackWarning]
        for _ in range(2):
            MODES[mode](CALLS["out"], X)
    (warning,) = [w for w in caught if w.category is fastattn.FastattnFallbackWarning]
    assert "store the scores" in str(warning.message)


@pytest.mark.long
def test_it_is_said_while_a_graph_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: MODES["func.jvp"](CALLS["out"], x), backend="eager", fullgraph=True)
    with pytest.warns(fastattn.FastattnFallbackWarning, match="store the scores"):
        compiled(X)


def test_a_tangent_of_something_else_changes_nothing() -> None:
    with torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(X, X)
        with fastattn.use_backend("torch"):  # which would refuse
            out = CALLS["out"](X)
    assert torch.equal(out, CALLS["out"](X))


@pytest.mark.parametrize("operand", ["query", "key", "value", "attn_bias"])
def test_forward_mode_by_every_operand(operand: str) -> None:
    tensors = {"query": X, "key": K, "value": V, "attn_bias": X[..., :1]}

    def call(x: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in attend(**(tensors | {operand: x}))])

    x = tensors[operand]
    for mode in ("func.jvp", "dual_level"):
        torch.testing.assert_close(MODES[mode](call, x), expected(mode, call, x))


def test_a_bias_in_float32_beside_half_tensors() -> None:
    q, bias = torch.randn(1, 2, 4, 8).bfloat16(), torch.randn(4, 4)
    call = lambda bias: fastattn.scaled_dot_product_attention(q, q, q, bias)  # noqa: E731
    for mode in ("func.grad", "func.jvp", "grad of grad"):
        found, wanted = MODES[mode](call, bias), expected(mode, call, bias)
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))


# ---- in graphs ----


def test_a_graphs_operator_has_the_first_and_second_derivative() -> None:
    traced = torch.jit.trace(CALLS["out"], (X,), check_trace=False)
    assert "fastattn::attention_fwd" in str(traced.graph)
    for mode in ("backward", "grad of grad", "third"):
        torch.testing.assert_close(MODES[mode](traced, X), expected(mode, CALLS["out"]))


def test_a_graphs_operator_refuses_forward_mode() -> None:
    traced = torch.jit.trace(CALLS["out"], (X,), check_trace=False)
    with pytest.raises((NotImplementedError, RuntimeError), match="no forward-mode derivative"):
        MODES["dual_level"](traced, X)


@pytest.mark.long
def test_compiled_functions() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS["out"], backend="aot_eager")
    for mode in ("backward", "dual_level"):
        torch.testing.assert_close(MODES[mode](compiled, X), expected(mode, CALLS["out"]))
    with pytest.raises(RuntimeError, match="double backward|create_graph"):
        MODES["grad of grad"](compiled, X)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["func.grad", "vmap of grad", "func.jvp", "func.grad of grad"])
def test_compiled_with_their_derivative(mode: str) -> None:
    for call in (CALLS["both"], packed) if mode in SECOND else (CALLS["both"], packed, default):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: MODES[mode](call, x), backend="aot_eager", fullgraph=True)  # noqa: B023
        torch.testing.assert_close(compiled(X), expected(mode, call))
