"""The ways to compute attention that are compared, by name: each makes a call of its inputs, or says why it cannot.

What may be made once for many calls is made outside of the timing: merged masks, FlexAttention's block mask and its
compilation, and other libraries' order of dimensions as views.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks.cases import HALF, AttentionInputs

Call = Callable[[], Tensor]


class Unavailable(Exception):
    """A provider cannot take the inputs; the message is the reason."""


class Provider(NamedTuple):
    """One way to compute attention."""

    name: str
    prepare: Callable[[AttentionInputs], Call]  # raises Unavailable
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which the call is prepared and made
    has_own_dropout: bool = True  # bits that are not those of `reference.dropout_mask`
    compiles: bool = False  # for seconds, for every case
    describe: Callable[[AttentionInputs], str] = lambda inputs: ""


def all_providers() -> list[Provider]:
    """All ways: ours, then torch's, then other libraries'."""
    backends = ("cuda", "triton", "torch")
    ours = [Provider(f"fastattn-{b}", fastattn_call, partial(fastattn.use_backend, b), False) for b in backends]
    kernels = {
        "torch-math": SDPBackend.MATH,
        "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "torch-flash": SDPBackend.FLASH_ATTENTION,
        "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    return [
        *ours,
        *(Provider(name, _torch, partial(sdpa_kernel, kernel)) for name, kernel in kernels.items()),
        Provider("torch-default", _torch, describe=_choice_of_torch),
        Provider("torch-varlen", _torch_varlen),
        Provider("torch-flex", _flex, compiles=True),
        Provider("torch-products", _products_and_softmax),
        Provider("flash-attn-2", partial(_flash_attn, "flash_attn")),
        Provider("flash-attn-3", partial(_flash_attn, "flash_attn_interface")),
        Provider("flash-attn-4", partial(_flash_attn, "flash_attn.cute")),
        Provider("xformers", _xformers),
    ]


def cpu_providers() -> dict[str, Provider]:
    """The ways that are compared on a CPU, by name: our kernels, fastattn's own choice, then torch's."""
    ours = [
        Provider("fastattn-cpu", fastattn_call, partial(fastattn.use_backend, "cpu"), False),
        Provider("fastattn", fastattn_call, has_own_dropout=False, describe=_choice_of_fastattn),
    ]
    kinds = ("torch-flash", "torch-math", "torch-default", "torch-products")
    theirs = [provider for provider in all_providers() if provider.name in kinds]
    return {provider.name: provider for provider in [*ours, *theirs]}


# ---- ours ----


def fastattn_call(p: AttentionInputs) -> partial[Tensor]:
    """fastattn's public function for these inputs."""
    options = {"attn_mask": p.mask, "attn_bias": p.bias, "dropout_p": p.dropout_p, "is_causal": p.is_causal}
    dense: Callable[..., Any] = fastattn.scaled_dot_product_attention
    packed: Callable[..., Any] = fastattn.varlen_attention
    if not p.is_packed():
        return partial(dense, p.q, p.k, p.v, **options)
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k)
    return partial(packed, p.q, p.k, p.v, *lengths, **options)


def _choice_of_fastattn(p: AttentionInputs) -> str:
    """The backend that fastattn takes by itself."""
    call = fastattn_call(p)
    return f"runs {fastattn.explain(*call.args, **call.keywords).backend}"


# ---- torch's ----


def _refuse(p: AttentionInputs, *features: str) -> None:
    """Raises Unavailable if the inputs have one of the features."""
    has = {
        "packed sequences": p.is_packed(),
        "mask": p.mask is not None,
        "bias": p.bias is not None,
        "dropout": p.dropout_p > 0,
        "float32": p.q.dtype not in HALF,
    }
    for feature in features:
        if has[feature]:
            raise Unavailable(f"takes no {feature}")


def _merged(p: AttentionInputs) -> Tensor | None:
    """Mask, causal band and bias as the one argument that torch has for them; None where is_causal says it all."""
    mask = p.mask
    if p.is_causal and (mask is not None or p.bias is not None):
        band = torch.ones(p.q.shape[-2], p.k.shape[-2], dtype=torch.bool, device=p.q.device).tril()
        mask = band if mask is None else mask & band
    if p.bias is None:
        return mask
    return p.bias if mask is None else torch.where(mask, p.bias, -torch.inf)


def _torch(p: AttentionInputs) -> Call:
    _refuse(p, "packed sequences")
    is_causal = p.is_causal and p.mask is None and p.bias is None
    attend = partial(F.scaled_dot_product_attention, p.q, p.k, p.v, dropout_p=p.dropout_p, is_causal=is_causal)
    if p.bias is not None and p.bias.requires_grad:  # what is merged has a graph, and that serves one call only
        return lambda: attend(attn_mask=_merged(p))
    return partial(attend, attn_mask=_merged(p))


def _choice_of_torch(p: AttentionInputs) -> str:
    """The kernel that torch takes by itself: with a mask often the slowest, without a word."""
    mask = _merged(p)
    choice = torch._fused_sdp_choice(p.q, p.k, p.v, mask, p.dropout_p, p.is_causal and mask is None)
    return f"runs {SDPBackend(choice).name}"


def _torch_varlen(p: AttentionInputs) -> Call:
    varlen = _module("torch.nn.attention.varlen")
    if not p.is_packed():
        raise Unavailable("takes packed sequences only")
    _refuse(p, "mask", "bias", "dropout", "float32")
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k)
    return partial(varlen.varlen_attn, p.q, p.k, p.v, *lengths, window_size=(-1, 0 if p.is_causal else -1))


def _products_and_softmax(p: AttentionInputs) -> Call:
    _refuse(p, "packed sequences")
    blocked = _blocked(p)

    def attend() -> Tensor:
        scores = p.q @ p.k.transpose(-1, -2) * p.q.shape[-1] ** -0.5
        if p.bias is not None:
            scores = scores + p.bias
        if blocked is not None:
            scores = scores.masked_fill(blocked, -torch.inf)
        return F.dropout(scores.softmax(-1), p.dropout_p) @ p.v

    return attend


def _blocked(p: AttentionInputs) -> Tensor | None:
    """The pairs that mask and causal band forbid."""
    blocked = None if p.mask is None else ~p.mask
    if not p.is_causal:
        return blocked
    future = torch.ones(p.q.shape[-2], p.k.shape[-2], dtype=torch.bool, device=p.q.device).triu(1)
    return future if blocked is None else blocked | future


# ---- FlexAttention ----


def _flex(p: AttentionInputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not p.q.is_cuda:
        raise Unavailable("has no backward pass on the CPU")
    _refuse(p, "dropout")
    torch._dynamo.reset()  # else a limit of recompilations makes later cases run uncompiled
    q, k, v = (x.transpose(0, 1)[None] if p.is_packed() else x for x in (p.q, p.k, p.v))
    block_mask = None
    if allowed := _mask_mod(p):
        batch = 1 if p.mask is None else p.mask.shape[0]
        block_mask = create_block_mask(allowed, batch, 1, q.shape[-2], k.shape[-2], device=q.device)
    attend = partial(torch.compile(flex_attention, dynamic=False), q, k, v, _score_mod(p), block_mask)
    return (lambda: attend()[0].transpose(0, 1)) if p.is_packed() else attend


def _score_mod(p: AttentionInputs) -> Callable[..., Tensor] | None:
    if p.bias is None:
        return None
    bias = p.bias[0]
    return lambda score, b, h, i, j: score + bias[h, i, j]


def _mask_mod(p: AttentionInputs) -> Callable[..., Tensor] | None:
    """The rule of (batch, head, query, key) that FlexAttention makes its blocks of."""
    rules: list[Callable[..., Tensor]] = []
    if p.is_packed():
        sentence_q, sentence_k = _sentences(p.cu_seqlens_q), _sentences(p.cu_seqlens_k)
        rules.append(lambda b, h, i, j: sentence_q[i] == sentence_k[j])
    if p.is_causal:  # of packed sentences both sides start at the same place
        rules.append(lambda b, h, i, j: i >= j)
    if p.mask is not None and p.mask.shape[-2] == 1:
        of_keys = p.mask[:, 0, 0]
        rules.append(lambda b, h, i, j: of_keys[b, j])
    elif p.mask is not None:
        of_pairs = p.mask[:, 0]
        rules.append(lambda b, h, i, j: of_pairs[b, i, j])
    if not rules:
        return None
    first, *rest = rules
    return first if not rest else lambda b, h, i, j: first(b, h, i, j) & rest[0](b, h, i, j)


def _sentences(cu_seqlens: Tensor | None) -> Tensor:
    """The sentence that each token belongs to."""
    assert cu_seqlens is not None
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


# ---- other libraries, where they are installed; their tensors are (batch, seqlen, nheads, head_dim) ----


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable(f"{name} is not installed") from None


def _flash_attn(module: str, p: AttentionInputs) -> Call:
    library = _module(module)
    _refuse(p, "mask", "bias", "float32", *(() if module == "flash_attn" else ("dropout",)))
    options: dict[str, Any] = {"causal": p.is_causal} | ({"dropout_p": p.dropout_p} if p.dropout_p else {})
    if p.is_packed():
        lengths = {n: getattr(p, n) for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")}
        return lambda: _first(library.flash_attn_varlen_func(p.q, p.k, p.v, **lengths, **options))
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    return lambda: _first(library.flash_attn_func(q, k, v, **options)).transpose(1, 2)


def _first(result: Any) -> Tensor:
    """The output alone: some versions return the log-sum-exp as well."""
    return result[0] if isinstance(result, tuple) else result


def _xformers(p: AttentionInputs) -> Call:
    ops = _module("xformers.ops")
    _refuse(p, "packed sequences", "mask", "bias")
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    causal = ops.LowerTriangularMask() if p.is_causal else None
    return lambda: ops.memory_efficient_attention(q, k, v, attn_bias=causal, p=p.dropout_p).transpose(1, 2)
