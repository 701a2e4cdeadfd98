"""A twin of csrc/attention.h, to read what kernels get."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_uint, c_void_p
from typing import Any


class Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), *((name, c_longlong) for name in ("batch", "head", "row")), ("is_aligned", c_int))


class Scores(ctypes.Structure):
    _fields_ = (("data", c_void_p), *((name, c_longlong) for name in ("batch", "head", "row", "key")))


class PerRow(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch", c_longlong), ("head", c_longlong))


class BiasGrad(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("data", "partial")),
        *((name, c_int) for name in ("copies", "batch", "heads", "rows", "keys")),
    )


class Struct(ctypes.Structure):
    """AttentionParams of the header."""

    _fields_ = (
        *((name, Rows) for name in ("q", "k", "v", "out")),
        ("lse", PerRow),
        *(("mask", Scores), ("bias", Scores), ("bias_type", c_int)),
        *((name, Rows) for name in ("dout", "dq", "dk", "dv")),
        *((name, PerRow) for name in ("dlse", "delta", "dq_sum")),
        ("dbias", BiasGrad),
        *(("cu_seqlens_q", c_void_p), ("cu_seqlens_k", c_void_p), ("total_q", c_longlong), ("total_k", c_longlong)),
        ("seqused_k", c_void_p),
        *((name, c_int) for name in ("batch", "nheads", "nheads_k", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")),
        *(("scale", c_float), ("softcap", c_float)),
        *((name, c_int) for name in ("left", "right", "bottom_right")),
        *(("seed", c_void_p), ("dropout_threshold", c_uint), ("dropout_rescale", c_float)),
    )


def as_dict(struct: ctypes.Structure) -> dict[str, Any]:
    """The fields by name; structs inside it are dicts too."""
    fields = [(name, getattr(struct, name)) for name, *_ in struct._fields_]
    return {name: as_dict(value) if isinstance(value, ctypes.Structure) else value for name, value in fields}
