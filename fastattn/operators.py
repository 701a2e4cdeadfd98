"""The fused attention of a backend as two torch operators.

`fastattn::attention_fwd` and `fastattn::attention_bwd` serve every backend: they allocate the results and let the
backend that is named in the call fill them. Where nobody would see them they are left out, see `is_seen`.
"""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch import Tensor

from . import backends, compat
from .arguments import check_lengths
from .params import TENSORS, AttentionParams, Backward, Forward

# The types of an operator's arguments. A length that changes from call to call must not compile a graph again.
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
_SYMBOLIC = ("max_seqlen_q", "max_seqlen_k")
_PARAMS = ", ".join(
    f"{'SymInt' if name in _SYMBOLIC else _TYPES[kind]} {name}"
    for name, kind in typing.get_type_hints(AttentionParams).items()
)
library = torch.library.Library("fastattn", "DEF")
library.define(
    f"attention_fwd({_PARAMS}, str backend) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,)
)
library.define(
    f"attention_bwd({_PARAMS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool needs_dbias, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# ---- what they compute ----


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


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is contiguous; that of an empty tensor, too, which x.contiguous() leaves."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def run_forward(p: AttentionParams, backend: str) -> tuple[Tensor, Tensor]:
    """out and lse, filled by the backend."""
    results = Forward(*_empty_results(p))
    backends.get(backend).kernels().attention_fwd(results, p)
    return results.out, results.lse


def run_backward(
    p: AttentionParams, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs_dbias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dbias, filled by the backend; dbias has no elements where it is not needed."""
    dout = with_contiguous_rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dbias = _empty_grads(p, needs_dbias)
    if p.seqused_k is not None:  # kernels fill the gradients of the keys that there are
        dk.zero_(), dv.zero_()
    backward = Backward(out, lse, dout, dlse, dq, dk, dv, dbias if needs_dbias else None)
    backends.get(backend).kernels().attention_bwd(backward, p)
    return dq, dk, dv, dbias


# ---- inside of a graph ----


def _check(args: tuple[Any, ...]) -> None:
    """The arguments of an operator once more: a graph may have kept what held when it was made only.

    Raises:
        NotImplementedError: the backend does not take tensors of this device, or a tensor has a tangent.
        ValueError: tensors are on several devices, or the lengths of sequences are not what they have to be.
    """
    p = AttentionParams(*args[: len(AttentionParams._fields)])
    _check_devices(p, args[-1])
    if compat.has_tangent(x for x in args if isinstance(x, Tensor)):
        raise NotImplementedError("a graph's attention has no forward-mode derivative; use_backend('reference') has")
    has_lengths = p.is_packed() or p.seqused_k is not None
    if has_lengths and compat.innermost_transformation() is None:  # under which no graph is run, but made
        check_lengths(p)


def _from_graph(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's arguments, checked; those that describe the call, which torch wants flat, in one."""
    _check(args)
    count, args = len(AttentionParams._fields), with_own_lengths(args)
    return AttentionParams(*args[:count]), *args[count:]


def with_own_lengths(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's arguments with the lengths of the dense tensors as they are, not as they were in a trace."""
    count = len(AttentionParams._fields)
    p = AttentionParams(*args[:count])
    if p.is_packed():
        return args
    return *p.replace(max_seqlen_q=p.q.shape[-2], max_seqlen_k=p.k.shape[-2]), *args[count:]


def _check_devices(p: AttentionParams, backend: str) -> None:
    device = p.q.device
    for name, x in zip(AttentionParams._fields, p[:TENSORS], strict=False):
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(f"{name}: is on {x.device}, q on {device}; a graph's tensors have to be moved with it")
    record = backends.get(backend)
    if device.type != "meta" and not record.takes_device(device.type):
        rule = "needs a graph that was made there"
        raise NotImplementedError(
            f"the graph holds backend {backend!r}, which takes {record.devices_in_words()}; {device.type} {rule}"
        )


@torch.library.impl(library, "attention_fwd", "CompositeExplicitAutograd")
def _attention_fwd_operator(*args: Any) -> tuple[Tensor, Tensor]:
    return run_forward(*_from_graph(args))


@torch.library.impl(library, "attention_bwd", "CompositeExplicitAutograd")
def _attention_bwd_operator(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run_backward(*_from_graph(args))


@torch.library.register_fake("fastattn::attention_fwd", lib=library)
def _attention_fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(_from_graph(args)[0])


@torch.library.register_fake("fastattn::attention_bwd", lib=library)
def _attention_bwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, _out, _lse, _dout, _dlse, needs_dbias, _backend = _from_graph(args)
    return _empty_grads(p, needs_dbias)


# ---- in a call ----

_PLAIN = (Tensor, torch.nn.Parameter)


def is_seen(p: AttentionParams) -> bool:
    """Whether torch's dispatcher has anything to do: somebody sees operators, or a tensor is not what lies in memory.

    Where it has not, it would cost as much as a launch.
    """
    if torch.compiler.is_dynamo_compiling() or compat.count_dispatch_modes() > 0 or compat.is_jit_tracing():
        return True
    if compat.innermost_transformation() is not None:
        return True
    q, k, v, bias = p.q, p.k, p.v, p.bias
    if not (type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN and (bias is None or type(bias) in _PLAIN)):
        return True
    return q.is_meta or q.is_neg() or k.is_neg() or v.is_neg() or (bias is not None and bias.is_neg())
