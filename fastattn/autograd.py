"""The derivatives of the fused attention.

First derivatives, in every way of asking (autograd, torch.func, batched), are those of the backend. Forward mode and
second derivatives are those of `reference.attention`, which stores the scores: no backend has kernels for them.

Where nobody looks, the autograd functions are applied without the operators, which is the cheapest arrangement that
torch offers. Graphs, and transformations of torch.func, meet the operators, which have the same derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, compat, operators, reference
from .params import TENSORS, AttentionParams

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

_COUNT = len(AttentionParams._fields)
_INPUTS = tuple(AttentionParams._fields.index(name) for name in ("q", "k", "v", "bias"))


def attention(backend: str, p: AttentionParams) -> tuple[Tensor, Tensor]:
    """out and lse of the named backend; differentiable where something requires a gradient.

    Raises:
        NotImplementedError: the call is differentiated in forward mode and `use_backend` has named the backend.
    """
    if has_tangent(p):
        return _forward_mode(backend, p)
    p = _operands(p)
    if torch.is_grad_enabled() and _requires_grad(p) and not operators.is_seen(p.q, p.k, p.v, p.bias):
        return AttentionFunction.apply(*p, backend)
    return operators.attention_fwd(p, backend)


def _requires_grad(p: AttentionParams) -> bool:
    bias = p.bias is not None and p.bias.requires_grad
    return bias or p.q.requires_grad or p.k.requires_grad or p.v.requires_grad


# ---- operands ----


def copied(p: AttentionParams) -> list[str]:
    """Which of q, k and v are copied for the operator, because their last dimension is not contiguous."""
    return [name for name in "qkv" if getattr(p, name).stride(-1) != 1]


def _operands(p: AttentionParams) -> AttentionParams:
    """The call as the operator takes it: last dimensions contiguous, no tensor twice (torch.compile forbids it)."""
    q, k, v, cu_seqlens_q, cu_seqlens_k = p.q, p.k, p.v, p.cu_seqlens_q, p.cu_seqlens_k
    if cu_seqlens_q is not None and cu_seqlens_k is not None:  # whose elements kernels take to lie side by side
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        if cu_seqlens_k is cu_seqlens_q:
            cu_seqlens_k = cu_seqlens_k.view_as(cu_seqlens_k)
        p = p.replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    is_plain = q is not k and q is not v and k is not v
    if is_plain and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:
        return p
    q, k, v = (operators.with_contiguous_rows(x) for x in (q, k, v))
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is p.k else v
    return p.replace(q=q, k=k, v=v)


# ---- the first derivative ----


def _save_call(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For the backward: inputs are those of the operator attention_fwd."""
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.backend = inputs[TENSORS:_COUNT], inputs[-1]
    ctx.is_strict = backends.forced() is not None
    ctx.save_for_backward(*inputs[:TENSORS], *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of attention_fwd."""
    *tensors, out, lse = ctx.saved_tensors
    p = AttentionParams(*tensors, *ctx.numbers)
    if dout is None:
        dout = torch.zeros_like(out)
    needs_dbias = ctx.needs_input_grad[AttentionParams._fields.index("bias")]
    rest = (out.detach(), lse.detach(), dout, dlse, needs_dbias, ctx.backend)
    # A backward pass is recorded for the sake of second derivatives only.
    if torch.is_grad_enabled() and not operators.is_seen(p.q, p.k, p.v, p.bias, dout, dlse):
        dq, dk, dv, dbias = AttentionGradient.apply(*p, *rest, ctx.is_strict)
    else:
        dq, dk, dv, dbias = operators.attention_bwd(p, *rest)
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for position, grad in zip(_INPUTS, (dq, dk, dv, dbias if needs_dbias else None), strict=True):
        grads[position] = grad
    return tuple(grads)


class AttentionFunction(torch.autograd.Function):
    """(out, lse) of the named backend; differentiable in q, k, v and bias, through out and lse."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return operators.attention_fwd(AttentionParams(*args[:-1]), args[-1])

    setup_context = staticmethod(_save_call)
    backward = staticmethod(_differentiate)


# ---- forward mode and second derivatives ----


def has_tangent(p: AttentionParams) -> bool:
    """Whether the call is differentiated in forward mode."""
    return compat.has_tangent((p.q, p.k, p.v, p.bias))


def _forward_mode(backend: str, p: AttentionParams) -> tuple[Tensor, Tensor]:
    _stores_scores(backend, backends.forced() is not None, "forward-mode derivative")
    return reference.attention(p)


def _stores_scores(backend: str, is_strict: bool, what: str) -> None:
    """Refuses what the backend cannot compute where `use_backend` has named it, and else warns."""
    if is_strict:
        raise NotImplementedError(f"backend {backend!r} has no {what}; use_backend('reference') has")
    backends.warn_once(f"attention's {what} is computed by plain torch operations, which store the scores")


class AttentionGradient(torch.autograd.Function):
    """dq, dk, dv, dbias of the named backend; their own derivatives are those of `reference.attention`."""

    @staticmethod
    def forward(*args: Any) -> Gradients:
        *rest, _is_strict = args[_COUNT:]
        return operators.attention_bwd(AttentionParams(*args[:_COUNT]), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.set_materialize_grads(False)
        _out, _lse, dout, dlse, ctx.needs_dbias, ctx.backend, *is_strict = inputs[_COUNT:]
        ctx.is_strict = is_strict == [True] or backends.forced() is not None
        ctx.numbers = inputs[TENSORS:_COUNT]
        ctx.save_for_backward(*inputs[:TENSORS], dout, dlse)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if not any(x is not None for x in cotangents):
            return tuple(grads)
        _stores_scores(ctx.backend, ctx.is_strict, "second derivative")
        *tensors, dout, dlse = ctx.saved_tensors
        p = AttentionParams(*tensors, *ctx.numbers)
        *inputs, ddout, ddlse = _second_derivative(p, dout, dlse, cotangents if ctx.needs_dbias else cotangents[:3])
        for position, grad in zip(_INPUTS, inputs, strict=True):
            grads[position] = grad
        grads[_COUNT + 2], grads[_COUNT + 3] = ddout, ddlse
        return tuple(grads)


def _second_derivative(
    p: AttentionParams, dout: Tensor, dlse: Tensor | None, cotangents: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The derivatives of the gradients by q, k, v, bias, dout and dlse, any number of times differentiable.

    Args:
        p, dout, dlse: what the gradients are a function of.
        cotangents: of dq, dk, dv and, if it was wanted, of dbias; None for 0.
    """
    names = ["q", "k", "v"] if p.bias is None else ["q", "k", "v", "bias"]
    upstream = (dout,) if dlse is None else (dout, dlse)

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return reference.attention(p.replace(**dict(zip(names, inputs, strict=True))))[: len(upstream)]

    def gradients(*args: Tensor) -> tuple[Tensor, ...]:
        inputs, upstream = args[: len(names)], args[len(names) :]
        grads = torch.func.vjp(forward, *inputs)[1](upstream)
        return tuple(g for g, c in zip(grads, (*cotangents, None), strict=False) if c is not None)

    args = [*(getattr(p, name) for name in names), *upstream]
    derivatives = torch.func.vjp(gradients, *args)[1](tuple(c for c in cotangents if c is not None))
    inputs, upstream_grads = list(derivatives[: len(names)]), list(derivatives[len(names) :])
    return [*inputs, *[None] * (4 - len(inputs)), *upstream_grads, *[None] * (2 - len(upstream_grads))]


# ---- of the operators ----


class _OperatorsFunction(AttentionFunction):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _below_autograd(torch.ops.fastattn.attention_fwd, args)


class _OperatorsGradient(AttentionGradient):
    @staticmethod
    def forward(*args: Any) -> Gradients:
        return _below_autograd(torch.ops.fastattn.attention_bwd, args)


def _below_autograd(operator: Any, args: tuple[Any, ...]) -> Any:
    """The operator without this level's derivatives; torch.func may have outer ones, which are recorded."""
    with compat.below_autograd(), torch.enable_grad():
        return operator(*args)


def _differentiable(operator: Any, function: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    """What torch's register_autograd would make, but under torch.func, too."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return compat.apply_to_one_level(function, args)
    with compat.below_autograd():
        return operator(*args)


@torch.library.impl(operators.library, "attention_fwd", "Autograd")
def _attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _differentiable(torch.ops.fastattn.attention_fwd, _OperatorsFunction, args)


@torch.library.impl(operators.library, "attention_bwd", "Autograd")
def _attention_bwd(*args: Any) -> Gradients:
    return _differentiable(torch.ops.fastattn.attention_bwd, _OperatorsGradient, args)
