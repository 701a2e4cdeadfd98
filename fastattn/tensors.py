"""What may stand in the place of a tensor: kernels read storage, so a class that means something else is refused."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from . import compat
from .values import described

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# How the classes whose meaning is their storage's take part in torch's functions: as Tensor does, or as Parameter does.
_PLAIN = (getattr(Tensor.__torch_function__, "__func__", None), Parameter.__torch_function__)


def check(name: str, x: Any, hint: str = "") -> None:
    """A tensor whose storage says what it means, or a jagged nested one."""
    kind = type(x)
    if kind is Tensor or kind is Parameter:
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: must be a tensor, got {described(x)}{hint}")
    override = kind.__torch_function__
    if getattr(override, "__func__", override) not in _PLAIN and not isinstance(x, compat.JaggedTensor):
        rule = "must not be of a class with a __torch_function__ of its own, which kernels would not call"
        raise ValueError(f"{name}: {rule}, got {kind.__module__}.{kind.__qualname__}")


def check_alike(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Query, key and value are of one floating dtype, on one device."""
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        raise ValueError(f"query: dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if key.dtype == value.dtype == dtype and key.device == value.device == device:
        return
    for name, x in (("key", key), ("value", value)):
        if x.dtype != dtype:
            raise ValueError(f"{name}: dtype {x.dtype} differs from query's {dtype}")
        check_device(name, x, query)


def check_device(name: str, x: Tensor, query: Tensor) -> None:
    """A mask or bias is on query's device."""
    if x.device != query.device:
        raise ValueError(f"{name}: is on {x.device}, query on {query.device}")


def is_readable(x: Tensor) -> bool:
    """Whether values can be looked at here and now: they wait for no device, and no trace stands in their place."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


def causal_bias(x: Any) -> tuple[Literal["top-left", "bottom-right"], int, int] | None:
    """causal_align, seqlen_q and seqlen_k of a torch.nn.attention.bias.CausalBias; None of everything else."""
    if type(x).__module__ != "torch.nn.attention.bias":  # asked by name, because its import takes seconds
        return None
    from torch.nn.attention.bias import CausalVariant

    return "top-left" if x.variant == CausalVariant.UPPER_LEFT else "bottom-right", x.seq_len_q, x.seq_len_kv
