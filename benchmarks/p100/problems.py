"""The problems whose time is predicted, as parameters of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastattn.cuda_kernels import attention
from fastattn.params import UNBOUNDED, AttentionParams, Backward, Forward

from .launches import Launch, empty_results, recording


class Problem(NamedTuple):
    """One pass over one shape."""

    pass_: str  # "forward" or "backward"
    batch: int
    nheads: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    feature: str = "plain"  # one of FEATURES

    @property
    def is_backward(self) -> bool:
        return self.pass_ == "backward"

    @property
    def flops(self) -> float:
        """That the result needs: two products forward, five backward; half of them where causal."""
        products = 10 if self.is_backward else 4
        half = 0.5 if self.feature == "causal" else 1.0
        return half * products * self.batch * self.nheads * self.seqlen**2 * self.head_dim

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.batch}x{self.nheads}x{self.seqlen}x{self.head_dim}"
        return f"{self.pass_} {dtype} {shape} {self.feature}"


def _key_mask(p: Problem) -> torch.Tensor:
    """The last eighth of the keys is padding."""
    return (torch.arange(p.seqlen) < p.seqlen - p.seqlen // 8).expand(p.batch, 1, 1, p.seqlen).contiguous()


def _full_mask(p: Problem) -> torch.Tensor:
    mask = torch.empty(p.batch, 1, p.seqlen, p.seqlen, dtype=torch.bool)
    mask[0] = torch.rand(1, p.seqlen, p.seqlen) < 0.9
    return mask


def _bias(p: Problem) -> torch.Tensor:
    return torch.randn(1, p.nheads, p.seqlen, p.seqlen)


BIAS_GRADIENT = "bias and its gradient"
# What a call has besides q, k and v, by the feature's name.
FEATURES: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "plain": lambda p: {},
    "key padding mask": lambda p: {"mask": _key_mask(p)},
    "full mask": lambda p: {"mask": _full_mask(p)},
    "bias": lambda p: {"bias": _bias(p)},
    BIAS_GRADIENT: lambda p: {"bias": _bias(p)},
    "dropout 0.1": lambda p: {"dropout_p": 0.1, "seed": torch.tensor([7])},
    "packed": lambda p: dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k"), torch.arange(p.batch + 1, dtype=torch.int32) * p.seqlen
    ),
    "causal": lambda p: {"right": 0},
}


def params(problem: Problem, seqlen: int | None = None) -> AttentionParams:
    """The call; of its tensors only the first sequence and head have values, and only they take memory.

    Args:
        problem: what is computed.
        seqlen: compute only so many queries and keys of each sequence.
    """
    if problem.feature == "packed" and seqlen is not None:  # its sequences lie one behind the other
        problem = problem._replace(seqlen=seqlen)
    shape: tuple[int, ...] = (problem.batch, problem.nheads, problem.seqlen, problem.head_dim)
    if problem.feature == "packed":
        shape = (problem.batch * problem.seqlen, problem.nheads, problem.head_dim)
    torch.manual_seed(0)
    q, k, v = (_lazy(shape, problem.dtype, problem.seqlen) for _ in range(3))
    plain = AttentionParams(
        *(q, k, v),
        *(None, None, None, None, None),
        *(seqlen or problem.seqlen, seqlen or problem.seqlen),
        scale=1 / math.sqrt(problem.head_dim),
        dropout_p=0.0,
        left=UNBOUNDED,
        right=UNBOUNDED,
        bottom_right=False,
    )
    return plain.replace(**FEATURES[problem.feature](problem))


def launches(problem: Problem, multiprocessors: int, seqlen: int | None = None) -> list[Launch]:
    """What the problem launches; arguments as of `params`."""
    p = params(problem, seqlen)
    out, lse = empty_results(p)
    with recording(multiprocessors) as recorded:
        if not problem.is_backward:
            attention.attention_fwd(Forward(out, lse), p)
        else:
            dout, dq, dk, dv = map(torch.empty_like, (out, p.q, p.k, p.v))
            dbias = torch.empty_like(p.bias) if p.bias is not None and problem.feature == BIAS_GRADIENT else None
            attention.attention_bwd(Backward(out, lse, dout, None, dq, dk, dv, dbias), p)
    return recorded


def _lazy(shape: tuple[int, ...], dtype: torch.dtype, seqlen: int) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    first = x[:seqlen, 0] if x.dim() == 3 else x[0, 0]
    first.copy_(torch.randn(first.shape))
    return x
