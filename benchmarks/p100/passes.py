"""The passes whose time is predicted, as parameters of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastattn.cuda_kernels import attention
from fastattn.params import UNBOUNDED, AttentionParams, Backward, Forward

from .launches import Launch, empty_results, recording


class Pass(NamedTuple):
    """One pass of attention: its direction, shape, dtype and feature."""

    direction: str  # "forward" or "backward"
    batch: int
    nheads: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    feature: str = "plain"  # one of FEATURES

    @property
    def is_backward(self) -> bool:
        return self.direction == "backward"

    @property
    def flops(self) -> float:
        """The operations that the result needs: two products forward, five backward; half of them where causal."""
        products = 10 if self.is_backward else 4
        half = 0.5 if self.feature == "causal" else 1.0
        return half * products * self.batch * self.nheads * self.seqlen**2 * self.head_dim

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.batch}x{self.nheads}x{self.seqlen}x{self.head_dim}"
        return f"{self.direction} {dtype} {shape} {self.feature}"


def _key_mask(p: Pass) -> torch.Tensor:
    """A mask for sequences whose last eighth of keys is padding."""
    return (torch.arange(p.seqlen) < p.seqlen - p.seqlen // 8).expand(p.batch, 1, 1, p.seqlen).contiguous()


def _full_mask(p: Pass) -> torch.Tensor:
    mask = torch.empty(p.batch, 1, p.seqlen, p.seqlen, dtype=torch.bool)
    mask[0] = torch.rand(1, p.seqlen, p.seqlen) < 0.9
    return mask


def _bias(p: Pass) -> torch.Tensor:
    return torch.randn(1, p.nheads, p.seqlen, p.seqlen)


BIAS_GRADIENT = "bias and its gradient"
# Arguments of a call besides q, k and v, by the feature's name.
FEATURES: dict[str, Callable[[Pass], dict[str, Any]]] = {
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


def params(pass_: Pass, seqlen: int | None = None) -> AttentionParams:
    """The parameters of the call; only the first sequence and head of its tensors have values and take memory.

    Args:
        pass_: what is computed.
        seqlen: the number of queries and keys of each sequence, if not all of them.
    """
    if pass_.feature == "packed" and seqlen is not None:  # its sequences lie one after the other
        pass_ = pass_._replace(seqlen=seqlen)
    shape: tuple[int, ...] = (pass_.batch, pass_.nheads, pass_.seqlen, pass_.head_dim)
    if pass_.feature == "packed":
        shape = (pass_.batch * pass_.seqlen, pass_.nheads, pass_.head_dim)
    torch.manual_seed(0)
    q, k, v = (_lazy(shape, pass_.dtype, pass_.seqlen) for _ in range(3))
    plain = AttentionParams(
        *(q, k, v),
        *(None, None, None, None, None, None),
        *(seqlen or pass_.seqlen, seqlen or pass_.seqlen),
        scale=1 / math.sqrt(pass_.head_dim),
        softcap=0.0,
        dropout_p=0.0,
        left=UNBOUNDED,
        right=UNBOUNDED,
        bottom_right=False,
    )
    return plain.replace(**FEATURES[pass_.feature](pass_))


def launches(pass_: Pass, multiprocessors: int, seqlen: int | None = None, mma: tuple[str, ...] = ()) -> list[Launch]:
    """The launches of a pass; the arguments are those of `params` and of `recording`."""
    p = params(pass_, seqlen)
    out, lse = empty_results(p)
    with recording(multiprocessors, mma) as recorded:
        if not pass_.is_backward:
            attention.attention_fwd(Forward(out, lse), p)
        else:
            dout, dq, dk, dv = map(torch.empty_like, (out, p.q, p.k, p.v))
            dbias = torch.empty_like(p.bias) if p.bias is not None and pass_.feature == BIAS_GRADIENT else None
            attention.attention_bwd(Backward(out, lse, dout, None, dq, dk, dv, dbias), p)
    return recorded


def _lazy(shape: tuple[int, ...], dtype: torch.dtype, seqlen: int) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    first = x[:seqlen, 0] if x.dim() == 3 else x[0, 0]
    first.copy_(torch.randn(first.shape))
    return x
