"""The check that every backend must pass for every case: out, lse and all gradients against the float64 oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import functional, merging, reference
from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from tests.support.cases import Case
from tests.support.tolerance import Condition, assert_close_to_oracle
from tests.support.unseen_keys import may_hold_anything, poison_unseen_keys, unseen_keys

GRADS = ("dq", "dk", "dv", "dbias", "dsinks")


def call(tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The public function, (out,) or (out, lse)."""
    q, k, v, bias = tensors
    function = fastattn.varlen_attention if "cu_seqlens_q" in arguments else fastattn.scaled_dot_product_attention
    result = function(q, k, v, attn_bias=bias, **arguments)
    return result if isinstance(result, tuple) else (result,)


def call_reference(tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Plain torch, differentiated by autograd."""
    q, k, v, bias = tensors
    arguments = dict(arguments)
    return_lse, sinks = arguments.pop("return_lse"), arguments.pop("sinks")
    packed = "cu_seqlens_q" in arguments
    params = varlen_attention_params if packed else attention_params
    out, lse = reference.attention(draw_seed(params(q, k, v, attn_bias=bias, **arguments)))
    if sinks is not None:
        out, lse = merging.with_sinks(out, lse, sinks, packed)
    return (out, lse) if return_lse else (out,)


def condition(case: Case) -> Condition:
    """The numbers that the tolerance depends on, sequence by sequence."""
    (q, k, v, bias), arguments = case.make()
    for name in ("return_lse", "max_seqlen_q", "max_seqlen_k", "sinks"):
        arguments.pop(name, None)
    dropout_p, mask = arguments.pop("dropout_p"), arguments.pop("attn_mask")
    upstream = _upstream([q.new_empty(*q.shape[:-1], v.size(-1))])[0]
    if not case.packed:
        return dense_condition((q, k, v, upstream), mask, bias, dropout_p, arguments)
    used = arguments.pop("seqused_k")
    edges_q, edges_k = (arguments.pop(f"cu_seqlens_{side}").tolist() for side in "qk")
    found = []
    for b in range(case.batch):
        rows, keys = slice(edges_q[b], edges_q[b + 1]), slice(edges_k[b], edges_k[b + 1])
        sequence = [x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys), (upstream, rows))]
        seen = [x if x is None else _of_sequence(x, b, sequence[0].size(2), sequence[1].size(2)) for x in (mask, bias)]
        own = arguments | {"seqused_k": None if used is None else used[b : b + 1]}
        found.append(dense_condition(tuple(sequence), *seen, dropout_p, own))
    terms = {name: max(c.terms[name] for c in found) for name in found[0].terms}
    return Condition(max(c.scores for c in found), terms)


def _of_sequence(x: Tensor, b: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    x = x[(None,) * (4 - x.dim())]
    return x[b if x.size(0) > 1 else 0, :, :seqlen_q, :seqlen_k][None]


def dense_condition(
    tensors: tuple[Tensor, ...], mask: Tensor | None, bias: Tensor | None, dropout_p: float, arguments: dict[str, Any]
) -> Condition:
    """The same of one dense problem: 4-D q, k, v and dout, and the rest of the function's arguments."""
    q, k, v, dout = (x.double() for x in tensors)
    p = attention_params(q, k, v, mask, attn_bias=None if bias is None else bias.double(), **arguments)
    weights, group = functional.weights_of(p), q.size(1) // k.size(1)
    k, v = (x.abs().repeat_interleave(group, 1) for x in (k, v))
    scores = abs(p.scale) * q.abs() @ k.transpose(-1, -2)
    if p.bias is not None:
        scores = scores + p.bias.abs()
    dp = dout.abs() @ v.transpose(-1, -2) / (1 - dropout_p)
    terms = weights * (dp + (weights * dp).sum(-1, keepdim=True) + 1)  # 1: an upstream gradient of lse
    scale = abs(p.scale)
    dk = (terms.transpose(-1, -2) @ q.abs()).unflatten(1, (-1, group)).sum(2)
    dbias = terms if bias is None else terms.sum_to_size(p.bias.shape)
    sums = {"dq": scale * (terms @ k), "dk": scale * dk, "dbias": dbias, "dsinks": terms.sum((0, 2, 3))}
    return Condition(_largest(scores[weights > 0]), {name: _largest(x) for name, x in sums.items()})


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _upstream(results: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Random upstream gradients, the same for every implementation."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]


def run(
    function: Any, case: Case, dtype: torch.dtype, device: str = "cpu", unseen: bool = False, gradients: bool = True
) -> dict[str, Tensor]:
    """out, lse and the gradients of every input for random upstream gradients, all on the CPU.

    Args:
        unseen: keys and values that no query may see hold infinities and NaN.
        gradients: False for out and lse alone.
    """
    tensors, arguments = case.make(device)
    inputs = tuple(None if x is None else leaf(x, dtype) for x in tensors)
    if arguments["sinks"] is not None:
        arguments["sinks"] = leaf(arguments["sinks"], torch.promote_types(dtype, torch.float32))
    if unseen:
        poison_unseen_keys(inputs, arguments)
    leaves = dict(zip(GRADS, (*inputs, arguments["sinks"]), strict=True))
    wanted = {name: x for name, x in leaves.items() if x is not None}
    before = [x.detach().clone() for x in wanted.values()]
    torch.manual_seed(1)
    with torch.set_grad_enabled(gradients):
        results = function(inputs, arguments)
    grads = torch.autograd.grad(results, list(wanted.values()), _upstream(results)) if gradients else ()
    for x, copy in zip(wanted.values(), before, strict=True):
        assert torch.equal(x.nan_to_num(), copy.nan_to_num()), "an input was modified"
    named = dict(zip(("out", "lse"), results, strict=False)) | dict(zip(wanted, grads, strict=gradients))
    return {name: x.detach().cpu() for name, x in named.items()}


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf that requires gradients with x's values and strides (expanded dimensions included)."""
    if 0 in x.stride() and x.numel():
        return x.to(dtype).as_strided(x.size(), x.stride()).requires_grad_()
    copy = torch.empty_strided(x.size(), x.stride(), dtype=dtype, device=x.device)
    return copy.copy_(x).requires_grad_()


def check(case: Case, device: str = "cpu", gradients: bool = True) -> None:
    """The backend in force says what the oracle says, and the same again, whatever unseen keys hold then."""
    oracle = run(call_reference, case, torch.float64, device, gradients=gradients)
    eager = run(call_reference, case, case.dtype, device, gradients=gradients)
    actual = run(call, case, case.dtype, device, gradients=gradients)
    unseen = may_hold_anything(*case.make(device))
    again = run(call, case, case.dtype, device, unseen, gradients)
    rounding = condition(case)
    assert actual.keys() == oracle.keys()
    for name, x in actual.items():
        assert_close_to_oracle(name, x, oracle[name], eager[name], rounding)
        assert torch.equal(x, again[name]), f"{name}: two runs differ, or what unseen keys hold matters"


def check_lengths_are_cut(case: Case, device: str = "cpu") -> None:
    """Lengths of keys beyond those that there are mean all of them to the backend in force, lengths below 0 none.

    Wrong ones, which on a GPU only a synchronising check could refuse, touch nothing outside.
    """
    (q, k, v, bias), arguments = case.make(device)
    given = {name: x for name, x in arguments.items() if name not in ("return_lse", "sinks", "seqused_k")}
    lengths = [case.seqlens[1]] * case.batch
    if case.packed:
        lengths = arguments["cu_seqlens_k"].diff().tolist()
    none = case.batch - 1
    right = torch.tensor([*lengths[:none], 0], dtype=torch.int32, device=device)
    wrong = torch.tensor([*(n + 2 for n in lengths[:none]), -5], dtype=torch.int32, device=device)
    results = []
    for used in (right, wrong):
        leaves = [leaf(x, case.dtype) for x in (q, k, v)]
        params = varlen_attention_params if case.packed else attention_params
        p = draw_seed(params(*leaves, attn_bias=bias, seqused_k=right, **given))
        out, lse = functional.attend(p.replace(seqused_k=used), return_lse=True)
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, _upstream((out, lse)))])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def check_unseen_keys(case: Case, device: str = "cpu") -> None:
    """Unseen keys do not matter to the backend in force, and have no gradient."""
    clean = run(call, case, case.dtype, device)
    poisoned = run(call, case, case.dtype, device, unseen=True)
    unseen = unseen_keys(*case.make())
    assert unseen.any() and not unseen.all()
    for name, x in clean.items():
        assert torch.equal(x, poisoned[name]), name
    assert not any(poisoned[name][unseen].any() for name in ("dk", "dv"))
