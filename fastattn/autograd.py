"""The fused attention of a backend as a torch operator, and its autograd function.

Two operators serve every backend: `fastattn::attention_fwd` and `fastattn::attention_bwd` allocate the results and let
the backend named in the call fill them. The autograd function stays outside of the operators and is of the classic
kind: that is the cheapest arrangement torch offers, and torch.compile traces through it.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, compat
from .params import TENSORS, AttentionParams, Backward, Forward

# The types of an operator's arguments. A length that changes from call to call must not compile a graph again.
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
_SYMBOLIC = ("max_seqlen_q", "max_seqlen_k")
_PARAMS = ", ".join(
    f"{'SymInt' if name in _SYMBOLIC else _TYPES[kind]} {name}"
    for name, kind in typing.get_type_hints(AttentionParams).items()
)
_library = torch.library.Library("fastattn", "DEF")
_library.define(
    f"attention_fwd({_PARAMS}, str backend) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    f"attention_bwd({_PARAMS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool needs_dbias, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _empty_results(p: AttentionParams) -> tuple[Tensor, Tensor]:
    """out and lse, not filled; out holds heads and rows in q's order, so that merging heads stays a view."""
    q, head_dim_v = p.q, p.v.shape[-1]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if p.cu_seqlens_q is not None:
        total, nheads, _ = q.shape
        return q.new_empty(total, nheads, head_dim_v), q.new_empty(nheads, total, dtype=lse_dtype)
    batch, nheads, seqlen_q, _ = q.shape
    _, head_stride, row_stride, _ = q.stride()
    if head_stride < row_stride:
        out = q.new_empty(batch, seqlen_q, nheads, head_dim_v).transpose(1, 2)
    else:
        out = q.new_empty(batch, nheads, seqlen_q, head_dim_v)
    return out, q.new_empty(batch, nheads, seqlen_q, dtype=lse_dtype)


def _empty_grads(p: AttentionParams, needs_dbias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, not filled; dbias has no elements where it is not needed."""
    dbias_shape = p.bias.shape if needs_dbias and p.bias is not None else (0,)
    dbias = p.q.new_empty(dbias_shape, dtype=None if p.bias is None else p.bias.dtype)
    return torch.empty_like(p.q), torch.empty_like(p.k), torch.empty_like(p.v), dbias


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is contiguous; that of an empty tensor, too, which x.contiguous() leaves."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def copied(p: AttentionParams) -> list[str]:
    """Which of q, k and v are copied for the operator, because their last dimension is not contiguous."""
    return [name for name in "qkv" if getattr(p, name).stride(-1) != 1]


def _operands(p: AttentionParams) -> AttentionParams:
    """The call as the operator takes it: last dimensions contiguous, no tensor twice (torch.compile forbids it)."""
    q, k, v, cu_seqlens_k = p.q, p.k, p.v, p.cu_seqlens_k
    is_plain = q is not k and q is not v and k is not v and (cu_seqlens_k is None or cu_seqlens_k is not p.cu_seqlens_q)
    if is_plain and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:
        return p
    q, k, v = (_with_contiguous_rows(x) for x in (q, k, v))
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is p.k else v
    if cu_seqlens_k is not None and cu_seqlens_k is p.cu_seqlens_q:
        cu_seqlens_k = cu_seqlens_k.view_as(cu_seqlens_k)
    return p.replace(q=q, k=k, v=v, cu_seqlens_k=cu_seqlens_k)


def _attention_fwd(p: AttentionParams, backend: str) -> tuple[Tensor, Tensor]:
    results = Forward(*_empty_results(p))
    backends.get(backend).kernels().attention_fwd(results, p)
    return results.out, results.lse


def _attention_bwd(
    p: AttentionParams, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs_dbias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = _with_contiguous_rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dbias = _empty_grads(p, needs_dbias)
    backward = Backward(out, lse, dout, dlse, dq, dk, dv, dbias if needs_dbias else None)
    backends.get(backend).kernels().attention_bwd(backward, p)
    return dq, dk, dv, dbias


@torch.library.impl(_library, "attention_fwd", "CompositeExplicitAutograd")
def _attention_fwd_operator(*args: Any) -> tuple[Tensor, Tensor]:
    return _attention_fwd(*_grouped(args))


@torch.library.impl(_library, "attention_bwd", "CompositeExplicitAutograd")
def _attention_bwd_operator(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attention_bwd(*_grouped(args))


def _grouped(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's arguments, which torch wants flat, with those that describe the call in one."""
    count = len(AttentionParams._fields)
    return AttentionParams(*args[:count]), *args[count:]


@torch.library.register_fake("fastattn::attention_fwd", lib=_library)
def _attention_fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(_grouped(args)[0])


@torch.library.register_fake("fastattn::attention_bwd", lib=_library)
def _attention_bwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, _out, _lse, _dout, _dlse, needs_dbias, _backend = _grouped(args)
    return _empty_grads(p, needs_dbias)


def attention(backend: str, p: AttentionParams) -> tuple[Tensor, Tensor]:
    """out and lse of the named backend; differentiable where something requires a gradient."""
    p = _operands(p)
    if torch.is_grad_enabled() and _requires_grad(p):
        return AttentionFunction.apply(backend, *p)
    return _call("attention_fwd", p, backend)


def _requires_grad(p: AttentionParams) -> bool:
    bias = p.bias is not None and p.bias.requires_grad
    return bias or p.q.requires_grad or p.k.requires_grad or p.v.requires_grad


_BODIES: dict[str, Callable[..., Any]] = {"attention_fwd": _attention_fwd, "attention_bwd": _attention_bwd}


def _call(name: str, p: AttentionParams, *rest: Any) -> Any:
    """The operator, or just its body where nobody is there to see the operator: torch's dispatcher costs a launch."""
    is_seen = torch.compiler.is_compiling() or compat.count_dispatch_modes() > 0 or type(p.q) is not Tensor
    if is_seen or compat.innermost_transformation() is not None:
        return getattr(torch.ops.fastattn, name)(*p, *rest)
    return _BODIES[name](p, *rest)


class AttentionFunction(torch.autograd.Function):
    """(out, lse) of the named backend; differentiable once in q, k, v and bias, through out and lse."""

    @staticmethod
    def forward(ctx: Any, backend: str, *params: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        p = AttentionParams(*params)
        out, lse = _call("attention_fwd", p, backend)
        ctx.numbers = params[TENSORS:]
        ctx.save_for_backward(*params[:TENSORS], out, lse)
        ctx.backend = backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs_dbias = ctx.needs_input_grad[_POSITIONS["bias"]]
        p = AttentionParams(*tensors, *ctx.numbers)
        dq, dk, dv, dbias = _call("attention_bwd", p, out, lse, dout, dlse, needs_dbias, ctx.backend)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for name, grad in (("q", dq), ("k", dk), ("v", dv), ("bias", dbias if needs_dbias else None)):
            grads[_POSITIONS[name]] = grad
        return tuple(grads)


# Among the arguments of AttentionFunction.forward, the first of which is the backend.
_POSITIONS = {name: position for position, name in enumerate(("backend", *AttentionParams._fields))}
