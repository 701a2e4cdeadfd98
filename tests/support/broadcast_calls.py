"""Calls whose query, key and value broadcast, and what torch's function makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn


@dataclass(frozen=True)
class Call:
    """Leading dimensions of query, key and value, and the shapes of mask and bias."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    enable_gqa: bool = False
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    is_causal: bool = False

    def __str__(self) -> str:
        flags = "-gqa" * self.enable_gqa + "-mask" * (self.mask is not None) + "-bias" * (self.bias is not None)
        return f"{self.q}{self.k}{self.v}{flags}{'-causal' * self.is_causal}".replace(" ", "")

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Query, key and value, mask, bias."""
        generator = torch.Generator().manual_seed(4)
        shapes = (*self.q, 3, 8), (*self.k, 5, 8), (*self.v, 5, 6)
        leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
        mask = None if self.mask is None else torch.rand(self.mask, generator=generator).to(device) < 0.7
        bias = None
        if self.bias is not None:
            bias = torch.randn(self.bias, generator=generator).to(device, dtype).requires_grad_()
        return leaves, mask, bias


CALLS = [
    Call((2, 4), (1, 4), (1, 4)),
    Call((1, 4), (2, 4), (2, 4)),
    Call((2, 4), (2, 1), (2, 1)),
    Call((2, 1), (2, 4), (2, 4)),
    Call((2, 4), (2, 4), (2, 1)),
    Call((2, 4), (2, 1), (2, 4)),
    Call((2, 4), (2, 4), (4,)),
    Call((2, 4), (2, 4), ()),
    Call((4,), (2, 4), (2, 4)),
    Call((2, 4), (4,), (1,)),
    Call((4,), (), ()),
    Call((), (4,), (4,)),
    Call((), (), (4,)),
    Call((), (2, 4), (4,)),
    Call((1, 1), (1, 4), (2, 1)),
    Call((3, 1, 4), (2, 4), (2, 4)),
    Call((3, 1, 4), (3, 2, 4), (2, 1)),
    Call((2, 4), (1, 2), (1, 2), enable_gqa=True),
    Call((2, 4), (2,), (2,), enable_gqa=True),
    Call((4,), (2, 2), (2, 2), enable_gqa=True),
    Call((2, 4), (2, 2), (2, 4), enable_gqa=True),
    Call((2, 4), (2, 2), (2, 1), enable_gqa=True),
    Call((2, 4), (2, 1), (2, 2), enable_gqa=True),
    Call((2, 6), (2, 3), (2, 2), enable_gqa=True),
    Call((0, 4), (1, 4), (1, 4)),
    Call((2, 0), (2, 1), (2, 1)),
    Call((4,), (2, 1), (2, 1), bias=(2, 1, 3, 5)),
    Call((1, 4), (2, 1), (2, 1), mask=(2, 1, 1, 5)),
    Call((2, 1), (4,), (4,), mask=(3, 5), bias=(4, 1, 5)),
    Call((3, 1, 4), (2, 4), (2, 4), mask=(2, 4, 3, 5), bias=(3, 1, 1, 3, 5)),
    Call((2, 4), (2,), (1, 2), enable_gqa=True, bias=(4, 3, 5), is_causal=True),
]


def expected(call: Call, dtype: torch.dtype, with_lse: bool, device: str = "cpu") -> dict[str, Tensor]:
    """Torch's function, and the log-sum-exp and its gradients by plain operations; of broadcast tensors."""
    (q, k, v), mask, bias = call.tensors(dtype, device)
    both = q.new_zeros(3, 5) if bias is None else bias
    if mask is not None:
        both = both.masked_fill(~mask, -torch.inf)
    if call.is_causal:
        both = both.masked_fill(torch.ones(3, 5, device=device).triu(1) > 0, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, both, enable_gqa=call.enable_gqa)
    if not with_lse:
        return _gradients(out, None, [q, k, v, bias])
    keys = k.repeat_interleave(call.q[-1] // k.size(-3), -3) if call.enable_gqa else k
    lse = (q @ keys.transpose(-1, -2) * 8**-0.5 + both).logsumexp(-1)
    return _gradients(out, lse.expand(out.shape[:-1]), [q, k, v, bias])


def _gradients(out: Tensor, lse: Tensor | None, leaves: list[Tensor | None]) -> dict[str, Tensor]:
    """The results and their gradients; without lse where it is None."""
    generator = torch.Generator().manual_seed(5)
    results = {"out": out} if lse is None else {"out": out, "lse": lse}
    upstream = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results.values()]
    named = {f"d{name}": x for name, x in zip(("q", "k", "v", "bias"), leaves, strict=True) if x is not None}
    grads = torch.autograd.grad(list(results.values()), list(named.values()), upstream)
    for name, x, grad in zip(named, named.values(), grads, strict=True):
        assert grad.shape == x.shape, name
    return results | dict(zip(named, grads, strict=True))


def actual(call: Call, dtype: torch.dtype, with_lse: bool, device: str = "cpu") -> dict[str, Tensor]:
    """The same of fastattn's function."""
    leaves, mask, bias = call.tensors(dtype, device)
    options: dict[str, Any] = {"is_causal": call.is_causal, "enable_gqa": call.enable_gqa, "return_lse": with_lse}
    result = fastattn.scaled_dot_product_attention(*leaves, mask, attn_bias=bias, **options)
    out, lse = result if with_lse else (result, None)
    return _gradients(out, lse, [*leaves, bias])
