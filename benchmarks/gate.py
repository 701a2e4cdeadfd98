"""Correctness before speed: a provider is timed on a case only if its results there are those of the reference."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from benchmarks.cases import AttentionCase, AttentionInputs
from benchmarks.providers import Call, Provider, Unavailable, fastattn_call

# This only has to tell a wrong result (a mask or a scale missing) from a right one; the tests judge the last digits. A
# correct backend is off by 1-4 roundings in the root of the mean square, a wrong one by a good part of the norm.
MAX_ROUNDINGS = 16
MAX_SUM_OFF = 1e-5  # allowed on top in modules, whose float32 gradients are sums over thousands of tokens
MAX_SCORES = 2**27  # that the float64 reference computes at a time: 1 GB

Results = dict[str, Tensor]  # out, dq, dk, dv and, where the bias has a gradient, dbias


class Wrong(Exception):
    """Results are not those of the reference; the message says how far off they are."""


def off_by(actual: Tensor, exact: Tensor) -> float:
    """The norm of the difference as a part of the exact tensor's norm."""
    return float((actual.double() - exact).norm() / exact.norm())


def results(call: Call, inputs: AttentionInputs) -> Results:
    """The results of one call and its backward pass."""
    torch.manual_seed(0)  # which dropout draws its seed from
    out = call()
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.dout)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


class Gate:
    """The reference's results on one case, in float64, and the judgement of others by them.

    Of a dense case too large for that, the last heads of the last batch entries stand for all: each attends by itself,
    and the offsets into the tensors are the largest there.

    Args:
        case: what is computed.
        device: on which.
        max_scores: that the reference computes at a time.
    """

    def __init__(self, case: AttentionCase, device: torch.device, max_scores: int = MAX_SCORES) -> None:
        self.inputs = case.make(device)
        self.max_scores = max_scores
        p = self.inputs
        self.is_plain = not p.is_packed() and p.mask is None and p.bias is None and not p.dropout_p
        self.batch, self.heads = 0, 0  # all
        if self.is_plain:
            per_head = p.q.shape[2] * p.k.shape[2]
            self.heads = max(1, min(p.q.shape[1], max_scores // per_head))
            self.batch = max(1, min(p.q.shape[0], max_scores // (self.heads * per_head)))

    def admit(self, provider: Provider) -> Call:
        """The call to be timed.

        Raises:
            Unavailable: the provider does not take the case.
            Wrong: it does, and computes something else.
        """
        has_own_bits = provider.has_own_dropout and self.inputs.dropout_p > 0
        inputs = self._without_dropout if has_own_bits else self.inputs
        expected = self._expected_without_dropout if has_own_bits else self._expected
        with warnings.catch_warnings(record=True) as caught, provider.context():
            warnings.simplefilter("always")
            try:
                call = provider.prepare(inputs)
                actual = results(call, inputs)
                if has_own_bits:
                    call = provider.prepare(self.inputs)
                    call()
            except Exception as error:
                if self.inputs.q.is_cuda:
                    torch.cuda.synchronize()  # raises if the device itself is lost: then nothing later can be measured
                    torch.cuda.empty_cache()
                raise Unavailable(_reason(error, [str(w.message) for w in caught])) from error
        self._compare(actual, expected)
        return call

    def _compare(self, actual: Results, expected: Results) -> None:
        allowed = MAX_ROUNDINGS * torch.finfo(self.inputs.q.dtype).eps
        for name, exact in expected.items():
            off = off_by(self._sample(actual[name]), exact)
            if not off <= allowed:
                raise Wrong(f"{name} is off by {off:.1e} of its norm, allowed are {allowed:.1e}")

    def _sample(self, x: Tensor) -> Tensor:
        return x[-self.batch :, -self.heads :] if self.is_plain else x

    @cached_property
    def _expected(self) -> Results:
        return self._exact_results(self.inputs)

    @cached_property
    def _without_dropout(self) -> AttentionInputs:
        return replace(self.inputs, dropout_p=0.0)

    @cached_property
    def _expected_without_dropout(self) -> Results:
        return self._exact_results(self._without_dropout)

    def _exact_results(self, p: AttentionInputs) -> Results:
        def exact(x: Tensor) -> Tensor:
            return self._sample(x.detach()).double().requires_grad_(x.requires_grad)

        bias = None if p.bias is None else exact(p.bias)
        p = replace(p, q=exact(p.q), k=exact(p.k), v=exact(p.v), dout=exact(p.dout), bias=bias)
        return results(lambda: _in_parts(p, self.max_scores) if self.is_plain else _reference(p), p)


def _reference(p: AttentionInputs) -> Tensor:
    with fastattn.use_backend("reference"):
        return fastattn_call(p)()


def _in_parts(p: AttentionInputs, max_scores: int) -> Tensor:
    """The reference of a call without mask, bias and dropout, some rows at a time, whose scores are not kept."""
    batch, heads, seqlen_k, _ = p.k.shape

    def attend(q: Tensor, first: int) -> Tensor:
        mask = None
        if p.is_causal:
            rows = torch.arange(first, first + q.shape[2], device=q.device)
            mask = torch.arange(seqlen_k, device=q.device) <= rows[:, None]
        return _reference(replace(p, q=q, mask=mask, is_causal=False))

    size = max(1, max_scores // (batch * heads * seqlen_k))
    parts = [checkpoint(attend, q, i * size, use_reentrant=False) for i, q in enumerate(p.q.split(size, dim=2))]
    return torch.cat(parts, dim=2)


def _reason(error: Exception, warned: list[str]) -> str:
    """The error in one line; where torch says only that there is no kernel, its warnings say why."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error) or type(error).__name__
    if "No available kernel" in text or "No viable backend" in text:
        text = " ".join(warning.split(" (Triggered")[0] for warning in warned) or text
    return " ".join(text.split())[:300]
