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
# The places of what gradients are computed for, among the arguments of attention_fwd and of attention_bwd.
_INPUTS = tuple(AttentionParams._fields.index(name) for name in ("q", "k", "v", "bias"))
_UPSTREAM = (_COUNT + 2, _COUNT + 3)  # dout, dlse


def attention(backend: str, p: AttentionParams) -> tuple[Tensor, Tensor]:
    """out and lse of the named backend; differentiable where something requires a gradient.

    Raises:
        NotImplementedError: the call is differentiated in forward mode and `use_backend` has named the backend.
    """
    if has_tangent(p):
        return _forward_mode(backend, p)
    p = _operands(p)
    if operators.is_seen(p):
        return torch.ops.fastattn.attention_fwd(*p, backend)
    if torch.is_grad_enabled() and _requires_grad(p):
        return AttentionFunction.apply(*p, backend)
    return operators.run_forward(p, backend)


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
    if p.seqused_k is not None:
        p = p.replace(seqused_k=p.seqused_k.contiguous())
    is_plain = q is not k and q is not v and k is not v
    if is_plain and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:
        return p
    q, k, v = (operators.with_contiguous_rows(x) for x in (q, k, v))
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is p.k else v
    return p.replace(q=q, k=k, v=v)


# ---- the first derivative ----


class AttentionFunction(torch.autograd.Function):
    """(out, lse) of the named backend; differentiable in q, k, v and bias, through out and lse."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Args: those of the operator attention_fwd."""
        return _saved(ctx, args, operators.run_forward(AttentionParams(*args[:_COUNT]), args[-1]))

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        p, needs_dbias = AttentionParams(*tensors, *ctx.numbers), ctx.needs_input_grad[_INPUTS[3]]
        rest = (out, lse, dout, dlse, needs_dbias, ctx.backend)
        if operators.is_seen(p) or compat.is_lazy(dout) or (dlse is not None and compat.is_lazy(dlse)):
            grads = torch.ops.fastattn.attention_bwd(*p, *rest)
        elif torch.is_grad_enabled():  # for the sake of second derivatives
            grads = AttentionGradient.apply(*p, *rest, ctx.is_strict)
        else:
            grads = operators.run_backward(p, *rest)
        return _placed(ctx, dict(zip(_INPUTS, grads if needs_dbias else grads[:3], strict=False)))


def _saved(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.backend = args[TENSORS:_COUNT], args[-1]
    ctx.is_strict = backends.forced() is not None
    ctx.save_for_backward(*args[:TENSORS], *results)
    return results


def _placed(ctx: Any, grads: dict[int, Tensor | None]) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of the forward."""
    return tuple(grads.get(position) for position in range(len(ctx.needs_input_grad)))


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
    def forward(ctx: Any, *args: Any) -> Gradients:
        """Args: those of the operator attention_bwd, and whether `use_backend` had named the backend."""
        *rest, is_strict = args[_COUNT:]
        return _saved_gradients(ctx, args, is_strict, operators.run_backward(AttentionParams(*args[:_COUNT]), *rest))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.needs_dbias:
            cotangents = cotangents[:3]
        if not any(x is not None for x in cotangents):
            return _placed(ctx, {})
        _stores_scores(ctx.backend, ctx.is_strict, "second derivative")
        *tensors, dout, dlse = ctx.saved_tensors
        p = AttentionParams(*tensors, *ctx.numbers)
        derivatives = _second_derivative(p, dout, dlse, cotangents)
        return _placed(ctx, dict(zip((*_INPUTS, *_UPSTREAM), derivatives, strict=True)))


def _saved_gradients(ctx: Any, args: tuple[Any, ...], is_strict: bool, grads: Gradients) -> Gradients:
    ctx.set_materialize_grads(False)
    _out, _lse, dout, dlse, ctx.needs_dbias, ctx.backend = args[_COUNT : _COUNT + 6]
    ctx.numbers, ctx.is_strict = args[TENSORS:_COUNT], is_strict
    ctx.save_for_backward(*args[:TENSORS], dout, dlse)
    return grads


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
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _saved(ctx, args, _below_autograd(torch.ops.fastattn.attention_fwd, args))


class _OperatorsGradient(AttentionGradient):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Gradients:
        grads = _below_autograd(torch.ops.fastattn.attention_bwd, args)
        return _saved_gradients(ctx, args, backends.forced() is not None, grads)


def _below_autograd(operator: Any, args: tuple[Any, ...]) -> Any:
    """The operator without this level's derivatives; torch.func may have outer ones, which are recorded."""
    with compat.below_autograd(), torch.enable_grad():
        return operator(*args)


def _differentiable(operator: Any, function: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    """What torch's register_autograd would make, but under torch.func, too."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return compat.apply_to_one_level(function, operators.with_own_lengths(args))
    with compat.below_autograd():
        return operator(*args)


@torch.library.impl(operators.library, "attention_fwd", "Autograd")
def _attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _differentiable(torch.ops.fastattn.attention_fwd, _OperatorsFunction, args)


@torch.library.impl(operators.library, "attention_bwd", "Autograd")
def _attention_bwd(*args: Any) -> Gradients:
    return _differentiable(torch.ops.fastattn.attention_bwd, _OperatorsGradient, args)
