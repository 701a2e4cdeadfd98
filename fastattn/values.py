"""The numbers and flags among a caller's arguments: kinds, ranges, and plain Python values for the kernels.

Numpy's numbers count as numbers and torch's symbolic ones stay symbolic, so that tracing goes through. A bool is no
number, and a tensor is none either: reading it would wait for its device, and its gradient would be lost.
"""

from __future__ import annotations

import operator
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor

from . import compat
from .params import UNBOUNDED

ALIGNS = ("top-left", "bottom-right")
WINDOW_RULE = "must be (left, right), each an int >= 0 or None"


def described(x: object) -> str:
    """A value as an error shows it: a tensor by its shape, what is long by its kind."""
    if isinstance(x, Tensor):
        return f"a {type(x).__name__} of shape {tuple(x.shape)}"
    kind, text = type(x), repr(x)
    return f"{kind.__module__}.{kind.__qualname__}" if len(text) > 60 or "\n" in text else text


def scale(x: Any) -> float:
    """The factor of the scores."""
    if type(x) is not float:
        hint = "; a learned or per-head scale is a factor of the query: (query * scale, ..., scale=1.0)"
        x = _number("scale", x, "must be a finite number", hint if isinstance(x, Tensor) else "")
    if not -inf < x < inf:
        raise ValueError(f"scale: must be a finite number, got {x}")
    return x


def softcap(x: Any) -> float:
    """The bound of the scores, which kernels hold in float32; 0 for None, which is none."""
    if x is None:
        return 0.0
    rule = "must be None or a number from 1e-30 to 1e38"
    if type(x) is not float:
        x = _number("softcap", x, rule)
    if not 1e-30 <= x <= 1e38:
        raise ValueError(f"softcap: {rule}, got {x}")
    return x


def probability(name: str, x: Any) -> float:
    """A number in [0, 1]."""
    if type(x) is not float:
        x = _number(name, x, "must be a number in [0, 1]")
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"{name}: must be in [0, 1], got {x}")
    return x


def _number(name: str, x: Any, rule: str, hint: str = "") -> float:
    if isinstance(x, (SymFloat, SymInt)):
        return torch.sym_float(x)
    if isinstance(x, bool) or not isinstance(x, Real):
        raise ValueError(f"{name}: {rule}, got {described(x)}{hint}")
    try:
        return float(x)
    except OverflowError:  # of an int beyond every float
        return inf


def length(name: str, x: Any) -> int:
    """A number of tokens, which kernels hold in 32 bits."""
    number = _index(x)
    if number is None:
        raise ValueError(f"{name}: must be an int, got {described(x)}")
    if torch.compiler.is_compiling():  # read from data it is unknown yet: nothing may branch on it
        compat.check(number >= 0)
    elif number < 0:
        raise ValueError(f"{name}: must not be negative, got {number}")
    elif number > UNBOUNDED:
        raise ValueError(f"{name}: must be below 2**31, got {number}")
    return number


def _index(x: Any) -> Any:
    """x as an int, symbolic where it is, or None where it is none."""
    if type(x) is int or isinstance(x, SymInt):
        return x
    is_refused = isinstance(x, Tensor) and not compat.is_jit_tracing()  # which gives sizes as tensors
    if is_refused or isinstance(x, bool) or not hasattr(x, "__index__"):
        return None
    try:
        return operator.index(x)
    except TypeError:  # an array of several numbers
        return None


def flag(name: str, x: Any) -> bool:
    """True or False."""
    if isinstance(x, (bool, SymBool)):
        return x  # type: ignore[return-value]
    if type(x).__module__ == "numpy" and type(x).__name__ in ("bool", "bool_"):  # without importing numpy
        return bool(x)
    raise ValueError(f"{name}: must be True or False, got {described(x)}")


def band(is_causal: Any, window: Any, causal_align: Any) -> tuple[int, int, bool]:
    """left, right, bottom_right of the band that causal and window make together."""
    if causal_align not in ALIGNS:
        raise ValueError(f"causal_align: must be one of {ALIGNS}, got {causal_align!r}")
    if is_causal is not False and is_causal is not True:
        is_causal = flag("is_causal", is_causal)
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else _edges(window)
    return left, 0 if is_causal else right, causal_align == "bottom-right"


def _edges(window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: {WINDOW_RULE}, got {described(window)}")
    left, right = (UNBOUNDED if edge is None else _index(edge) for edge in window)
    if left is None or right is None or left < 0 or right < 0:
        raise ValueError(f"window: {WINDOW_RULE}, got {described(window)}")
    return min(left, UNBOUNDED), min(right, UNBOUNDED)
