"""Which implementation runs: every backend's capabilities as data, the choice, and the reasons against the others."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)


class FastattnFallbackWarning(UserWarning):
    """A CUDA tensor is attended to by torch, because no fused backend takes the call."""


class Problem(NamedTuple):
    """What the choice of a backend may depend on. Sizes are those of one call; devices are described, not touched."""

    device_type: str  # "cpu", "cuda"
    capability: tuple[int, int] | None  # of a CUDA device
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    is_packed: bool = False
    bias_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    is_empty: bool = False  # with a bias, but no query, no key or no head to attend with


# ---- when torch's function says the same ----

# F.scaled_dot_product_attention stands in for the reference unless one of these holds. It is given mask, band and bias
# merged into the one argument it has for them.
SDPA_DIFFERS: tuple[tuple[str, Callable[[Problem], bool]], ...] = (
    ("it takes no packed sequences", lambda p: p.is_packed),
    ("it does not return the log-sum-exp", lambda p: p.return_lse),
    ("its dropout bits are its own", lambda p: p.dropout_p > 0),
    ("it wants the bias in the query's dtype", lambda p: p.bias_dtype not in (None, p.dtype)),
    ("it loses the bias's gradient of an empty problem", lambda p: p.is_empty),
)


def why_not_sdpa(p: Problem) -> str | None:
    """The first reason for which F.scaled_dot_product_attention does not say the same, or None."""
    for reason, holds in SDPA_DIFFERS:
        if holds(p):
            return reason
    return None


# ---- backends as data ----


@dataclass(frozen=True)
class Backend:
    """One implementation and the calls it takes."""

    name: str
    module: str  # has attention_fwd and attention_bwd, called with AttentionParams
    min_capability: tuple[int, int] | None = None  # None: any device
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    max_head_dim: int | None = None
    on_request_only: bool = False

    def kernels(self) -> ModuleType:
        """The module that runs it."""
        return _module(self.module)

    def takes(self, p: Problem) -> bool:
        """Whether it can take the call."""
        refuses = self._lacks_device(p) or p.dtype not in self.dtypes or self._is_too_wide(p)
        return not refuses and _why_missing(self.module) is None

    def why_not(self, p: Problem) -> list[str]:
        """Every reason for which it cannot take the call; empty if it can."""
        reasons = []
        if self.min_capability is not None and self._lacks_device(p):
            if p.capability is None:
                reasons.append(f"needs a CUDA device, got {p.device_type}")
            else:
                wanted, got = _dotted(self.min_capability), _dotted(p.capability)
                reasons.append(f"needs compute capability >= {wanted}, got {got}")
        if p.dtype not in self.dtypes:
            reasons.append(f"takes {', '.join(map(_short, self.dtypes))}, got {_short(p.dtype)}")
        if self._is_too_wide(p):
            reasons.append(f"takes head_dim <= {self.max_head_dim}, got {max(p.head_dim, p.head_dim_v)}")
        if not reasons and (missing := _why_missing(self.module)):
            reasons.append(missing)
        return reasons

    def _lacks_device(self, p: Problem) -> bool:
        return self.min_capability is not None and (p.capability is None or p.capability < self.min_capability)

    def _is_too_wide(self, p: Problem) -> bool:
        return self.max_head_dim is not None and (p.head_dim > self.max_head_dim or p.head_dim_v > self.max_head_dim)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name, __package__)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_missing: dict[str, str | None] = {}


def _why_missing(module: str) -> str | None:
    if module not in _missing:
        try:
            importlib.import_module(module, __package__)
            _missing[module] = None
        except ImportError as error:
            _missing[module] = f"is not part of this installation ({error})"
    return _missing[module]


# What torch.compiler.assume_constant_result does, without the seconds that importing torch's compiler takes.
vars(_why_missing)["_dynamo_marked_constant"] = True


_ANY_FLOAT = (torch.float32, *HALF, torch.float64)

# In order of preference. "torch" takes every call, so the search ends there and a swapped model never breaks.
BACKENDS = (
    Backend("triton", ".triton_kernels.attention", min_capability=(8, 0), max_head_dim=256),
    Backend("cuda", ".cuda_kernels.attention", min_capability=(6, 0), max_head_dim=256),
    Backend("torch", ".reference", dtypes=_ANY_FLOAT),
    Backend("reference", ".reference", dtypes=_ANY_FLOAT, on_request_only=True),
)
NAMES = tuple(backend.name for backend in BACKENDS)


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend: must be one of {', '.join(NAMES)}, got {name!r}")


# ---- the choice ----


class _Forced(threading.local):
    name: str | None = None


_forced = _Forced()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every attention call inside runs on the named backend or raises; nothing falls back. Holds for this thread.

    Args:
        name: "triton", "cuda", "torch" or "reference" (plain torch, differentiable any number of times).

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: at a call inside that the backend cannot take; the message lists the reasons.
    """
    previous, _forced.name = _forced.name, get(name).name
    try:
        yield
    finally:
        _forced.name = previous


def choose(p: Problem) -> Backend:
    """The forced backend, else the first in order of preference that takes the call.

    Raises:
        NotImplementedError: a backend is forced and cannot take the call.
    """
    if _forced.name is not None:
        backend = get(_forced.name)
        if not backend.takes(p):
            reasons = "; it ".join(backend.why_not(p))
            raise NotImplementedError(f"backend {backend.name!r} cannot take this call: it {reasons}")
        return backend
    for backend in BACKENDS:
        if not backend.on_request_only and backend.takes(p):
            if p.device_type == "cuda" and backend.name == "torch":
                _warn_fallback(p)
            return backend
    raise NotImplementedError(
        f"query: dtype must be one of {', '.join(map(_short, _ANY_FLOAT))}, got {_short(p.dtype)}"
    )


_warned: set[str] = set()


def _warn_fallback(p: Problem) -> None:
    """Once per set of reasons in a process."""
    refusals = "; ".join(f"{b.name} {', '.join(b.why_not(p))}" for b in BACKENDS if b.min_capability is not None)
    if refusals not in _warned:
        _warned.add(refusals)
        message = f"attention runs on torch's own kernels, which are slower: {refusals}"
        warnings.warn(message, FastattnFallbackWarning, stacklevel=2)


@dataclass(frozen=True)
class Explanation:
    """What runs for one call, why not the others, and what is worth knowing. `print` it."""

    backend: str
    route: str  # what the backend does, in words
    refusals: dict[str, list[str]]  # backend that is preferred to the chosen one -> its reasons
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.route}"]
        lines += [f"  not {name}: it {'; it '.join(reasons)}" for name, reasons in self.refusals.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain_choice(p: Problem, notes: tuple[str, ...] = ()) -> Explanation:
    """The explanation of `choose(p)`."""
    backend = choose(p)
    refusals = {b.name: reasons for b in BACKENDS[: BACKENDS.index(backend)] if (reasons := b.why_not(p))}
    return Explanation(backend.name, _route(backend, p), refusals, notes)


def _route(backend: Backend, p: Problem) -> str:
    if backend.name == "torch":
        reason = why_not_sdpa(p)
        if reason is None:
            return "F.scaled_dot_product_attention"
        return f"plain torch operations, not F.scaled_dot_product_attention: {reason}"
    if backend.name == "reference":
        return "plain torch operations, differentiable any number of times"
    return "fused kernels, forward and backward"
