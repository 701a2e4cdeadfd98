"""Which implementation runs: every backend's capabilities as data, the choice, and the reasons against the others."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from . import compat, contests, torch_sdpa
from .arguments import device_type
from .params import AttentionParams

HALF = (torch.float16, torch.bfloat16)


class FastattnFallbackWarning(UserWarning):
    """A call runs on plain torch operations, because no fused backend computes it; says why, and what that costs."""


class CallTraits(NamedTuple):
    """The traits of one call that the choice of a backend may depend on; devices are described, not touched."""

    device_type: str  # "cpu", "cuda"
    capability: tuple[int, int] | None  # of a CUDA device that is there
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    is_packed: bool = False
    bias_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    is_empty: bool = False  # with a bias, but no query, no key or no head to attend with
    has_tangent: bool = False  # it is differentiated in forward mode
    is_jagged: bool = False  # its query, key and value are nested tensors
    is_traced_band: bool = False  # torch.jit.trace is recording a band other than torch's causal one
    is_recorded: bool = False  # into a program that may run elsewhere
    has_softcap: bool = False
    has_seqused: bool = False  # lengths of the keys that are fewer than their places
    contest: contests.Contest | None = None


def traits(p: AttentionParams, return_lse: bool) -> CallTraits:
    """The traits of a call."""
    q, bias, is_jit_tracing = p.q, p.bias, compat.is_jit_tracing()
    capability = _capability(q.device) if q.is_cuda else None
    return CallTraits(
        device_type(q),
        capability,
        q.dtype,
        q.shape[-1],
        p.v.shape[-1],
        p.cu_seqlens_q is not None,
        None if bias is None else bias.dtype,
        p.dropout_p,
        return_lse,
        bias is not None and (q.numel() == 0 or p.k.numel() == 0),
        compat.has_tangent((q, p.k, p.v, bias)),
        type(q) is not torch.Tensor and q.is_nested,
        is_jit_tracing and torch_sdpa.needs_band(p),
        is_jit_tracing or torch.compiler.is_exporting(),
        p.softcap != 0,
        p.seqused_k is not None,
        None if capability is None else contests.of(p, capability),
    )


def _capability(device: torch.device) -> tuple[int, int] | None:
    # torch.compile warns of any cache it meets.
    return _ask_capability(device) if torch.compiler.is_compiling() else _cached_capability(device)


def _ask_capability(device: torch.device) -> tuple[int, int] | None:
    # A fake tensor's device need not be there.
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


_cached_capability = functools.cache(_ask_capability)


# ---- when torch's function says the same ----

# F.scaled_dot_product_attention stands in for the reference unless one of these holds. It is given mask, band and bias
# merged into the one argument it has for them.
SDPA_DIFFERS: tuple[tuple[str, Callable[[CallTraits], bool]], ...] = (
    ("it takes no packed sequences", lambda call: call.is_packed),
    ("it does not return the log-sum-exp", lambda call: call.return_lse),
    ("its dropout bits are its own", lambda call: call.dropout_p > 0),
    ("it has no softcap", lambda call: call.has_softcap),
    ("it takes no lengths of keys", lambda call: call.has_seqused),
    ("it wants the bias in the query's dtype", lambda call: call.bias_dtype not in (None, call.dtype)),
    ("it loses the bias's gradient of an empty problem", lambda call: call.is_empty),
    ("its kernels have no forward-mode derivative", lambda call: call.has_tangent),
    ("a trace would keep the lengths of the mask that the band becomes", lambda call: call.is_traced_band),
)


_USUAL = slice(CallTraits._fields.index("is_packed"), CallTraits._fields.index("contest"))
_USUAL_TRAITS = tuple(CallTraits._field_defaults.values())[:-1]


def why_not_sdpa(call: CallTraits) -> str | None:
    """The first reason for which F.scaled_dot_product_attention does not say the same, or None."""
    # So that the most usual call is not asked one by one; torch.compile cannot cut a part of such a tuple out.
    if not torch.compiler.is_dynamo_compiling() and call[_USUAL] == _USUAL_TRAITS:
        return None
    for reason, holds in SDPA_DIFFERS:
        if holds(call):
            return reason
    return None


def _left_to_torch(call: CallTraits) -> contests.FasterInTorch | None:
    """The row that leaves the call to torch's kernel, or None."""
    if call.contest is None or why_not_sdpa(call) is not None:
        return None
    row = contests.row(call.dtype, call.capability)
    return row if row is not None and row.has(call.contest) else None


# ---- backends as data ----


class Route(enum.Enum):
    """How a backend runs a call; the value says it to a reader of `explain`."""

    OPERATOR = "fused kernels, forward and backward"  # its module's attention_fwd and attention_bwd
    SDPA = "F.scaled_dot_product_attention"  # its module's attention, where that says the same, else OPERATOR
    DIFFERENTIABLE = "plain torch operations, differentiable any number of times"  # its module's attention


DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Backend:
    """One implementation and the calls it takes."""

    name: str
    module: str  # has attention_fwd and attention_bwd, called with params.Forward or Backward and AttentionParams
    route: Route = Route.OPERATOR
    devices: tuple[str, ...] | None = None  # types, such as "cuda"; None: any
    min_capability: tuple[int, int] | None = None  # of a CUDA device
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    max_head_dim: int | None = None
    on_request_only: bool = False

    def kernels(self) -> ModuleType:
        """The module that runs it."""
        if self.module not in _modules:
            _modules[self.module] = importlib.import_module(self.module, __package__)
        return _modules[self.module]

    def why_missing(self) -> str | None:
        """Why its module cannot be imported, or cannot be used on this machine, or None."""
        if self.devices == _GPU and torch.version.hip is not None:  # whose devices call themselves "cuda", too
            return f"needs an NVIDIA GPU, this torch is built for AMD's (ROCm {torch.version.hip})"
        return _why_missing(self.module)

    def route_of(self, call: CallTraits) -> Route:
        """The way in which it runs a call that it takes."""
        return Route.OPERATOR if self.route is Route.SDPA and why_not_sdpa(call) is not None else self.route

    def words_for(self, call: CallTraits) -> str:
        """The way in which it runs a call, for a reader."""
        if self.route_of(call) is self.route:
            return self.route.value
        return f"plain torch operations, not {self.route.value}: {why_not_sdpa(call)}"

    def takes(self, call: CallTraits) -> bool:
        """Whether it can take the call."""
        is_for_it = self.takes_device(call.device_type) and not self._is_too_old(call)
        refuses = not is_for_it or call.dtype not in self.dtypes or self._is_too_wide(call) or self._is_jagged(call)
        return not refuses and self.why_missing() is None

    def why_not(self, call: CallTraits) -> list[str]:
        """Every reason for which it cannot take the call; empty if it can."""
        reasons = []
        if not self.takes_device(call.device_type):
            reasons.append(f"needs {self.devices_in_words()}, got {call.device_type}")
        elif self._is_too_old(call):
            wanted, got = _dotted(self.min_capability), _dotted(call.capability)
            reasons.append(f"needs compute capability >= {wanted}, got {got}")
        if call.dtype not in self.dtypes:
            reasons.append(f"takes {', '.join(map(_short, self.dtypes))}, got {_short(call.dtype)}")
        if self._is_too_wide(call):
            reasons.append(f"takes head_dim <= {self.max_head_dim}, got {max(call.head_dim, call.head_dim_v)}")
        if self._is_jagged(call):
            reasons.append("takes no nested tensors")
        if not reasons and (missing := self.why_missing()):
            reasons.append(missing)
        return reasons

    def takes_device(self, device_type: str) -> bool:
        """Whether it can run on a device of this type."""
        return self.devices is None or device_type in self.devices

    def devices_in_words(self) -> str:
        """Where it can run, for a reader."""
        if self.devices is None:
            return "any device"
        return f"a {' or '.join(DEVICE_NAMES.get(device, device) for device in self.devices)} device"

    def _is_too_old(self, call: CallTraits) -> bool:
        if self.min_capability is None or call.capability is None:
            return False
        return call.capability < self.min_capability

    def _is_jagged(self, call: CallTraits) -> bool:
        return call.is_jagged and self.route is not Route.SDPA

    def _is_too_wide(self, call: CallTraits) -> bool:
        return self.max_head_dim is not None and max(call.head_dim, call.head_dim_v) > self.max_head_dim


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ()))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_modules: dict[str, ModuleType] = {}
_missing: dict[str, str | None] = {}


@compat.assume_constant
def _why_missing(module: str) -> str | None:
    if module not in _missing:
        try:
            _modules[module] = importlib.import_module(module, __package__)
            # Of a module that needs more than what it imports.
            _missing[module] = getattr(_modules[module], "why_unusable", lambda: None)()
        except ImportError as error:
            _missing[module] = f"is not part of this installation ({error})"
    return _missing[module]


_ANY_FLOAT = (torch.float32, *HALF, torch.float64)
_GPU = ("cuda",)

# In order of preference. "torch" takes every call, so the search ends there and a swapped model never breaks.
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", ".triton_kernels.attention", devices=_GPU, min_capability=(8, 0), max_head_dim=256),
    Backend("cuda", ".cuda_kernels.attention", devices=_GPU, min_capability=(6, 0), max_head_dim=256),
    Backend("cpu", ".cpu_kernels.attention", devices=("cpu",), max_head_dim=256),
    Backend("torch", ".torch_sdpa", Route.SDPA, dtypes=_ANY_FLOAT),
    Backend("reference", ".reference", Route.DIFFERENTIABLE, dtypes=_ANY_FLOAT, on_request_only=True),
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


@contextmanager
def replaced(backend: Backend) -> Iterator[None]:
    """Inside, in every thread, the record stands in the place of the one of its name."""
    global BACKENDS
    previous = BACKENDS
    BACKENDS = tuple(backend if b.name == backend.name else b for b in previous)
    try:
        yield
    finally:
        BACKENDS = previous


def anywhere(name: str) -> AbstractContextManager[None]:
    """Inside, in every thread, the backend takes tensors of any device: whoever runs its kernels elsewhere needs it."""
    return replaced(dataclasses.replace(get(name), devices=None, min_capability=None))


# ---- the choice ----


_forced: ContextVar[str | None] = ContextVar("fastattn.use_backend", default=None)


class _Traced:
    """What a graph that is being made has been told by itself: torch.compile follows attributes, but no ContextVar."""

    is_told = False
    name: str | None = None


_traced = _Traced()


@compat.assume_constant
def _forced_around_the_graph() -> str | None:
    name = _forced.get()
    compat.compile_again_unless(lambda: _forced.get() == name, f"use_backend({name!r})")
    return name


def forced() -> str | None:
    """The backend that `use_backend` names here, or None."""
    if torch.compiler.is_dynamo_compiling():
        return _traced.name if _traced.is_told else _forced_around_the_graph()
    return _forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every attention call inside runs on the named backend or raises; nothing falls back.

    Holds for this thread and this asyncio task. A compiled function is compiled anew for it.

    Args:
        name: "triton", "cuda", "cpu", "torch" or "reference" (plain torch, differentiable any number of times).

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: at a call inside that the backend cannot take; the message lists the reasons.
    """
    name = get(name).name
    if torch.compiler.is_dynamo_compiling():
        previous = _traced.is_told, _traced.name
        _traced.is_told, _traced.name = True, name
        try:
            yield
        finally:
            _traced.is_told, _traced.name = previous
        return
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(call: CallTraits) -> Backend:
    """The forced backend, else the first in order of preference that takes the call.

    A program that is recorded keeps torch's function where that says the same: it runs without fastattn, too. Calls of
    FASTER_IN_TORCH run on torch's kernel.

    Raises:
        NotImplementedError: a backend is forced and cannot take the call.
    """
    name = forced()
    if name is not None:
        backend = get(name)
        if not backend.takes(call):
            reasons = "; it ".join(backend.why_not(call))
            raise NotImplementedError(f"backend {backend.name!r} cannot take this call: it {reasons}")
        return backend
    is_portable = call.is_recorded and why_not_sdpa(call) is None
    left = _left_to_torch(call)
    for backend in BACKENDS:
        if (is_portable and backend.route is not Route.SDPA) or (left is not None and backend.name == left.backend):
            continue
        if not backend.on_request_only and backend.takes(call):
            if call.device_type == "cuda" and backend.route is Route.SDPA and left is None:
                _warn_fallback(call)
            return backend
    raise NotImplementedError(
        f"query: dtype must be one of {', '.join(map(_short, _ANY_FLOAT))}, got {_short(call.dtype)}"
    )


_warned: set[str] = set()


def _warn_fallback(call: CallTraits) -> None:
    """Once per set of reasons in a process."""
    refusals = "; ".join(f"{b.name} {', '.join(b.why_not(call))}" for b in BACKENDS if b.devices is not None)
    warn_once(f"attention runs on torch's own kernels, which are slower: {refusals}")


@compat.assume_constant
def warn_once(message: str) -> None:
    """A FastattnFallbackWarning, once in a process; while a graph is made, too, which could hold no warning."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FastattnFallbackWarning, stacklevel=2)


@dataclass(frozen=True)
class Explanation:
    """The backend that runs one call, the reasons against those before it, and notes. `print` it."""

    backend: str
    route: str  # what the backend does, in words
    refusals: dict[str, list[str]]  # backend that is preferred to the chosen one -> its reasons
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.route}"]
        lines += [f"  not {name}: it {'; it '.join(reasons)}" for name, reasons in self.refusals.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain_choice(call: CallTraits, notes: tuple[str, ...] = ()) -> Explanation:
    """The explanation of `choose(call)`."""
    backend, left = choose(call), _left_to_torch(call)
    refusals = {b.name: reasons for b in BACKENDS[: BACKENDS.index(backend)] if (reasons := b.why_not(call))}
    if left is not None and backend.route is Route.SDPA and left.backend not in refusals:
        what = f"{_short(left.dtype)} of {left.in_words()}, at compute capability {_dotted(call.capability)}"
        refusals[left.backend] = [f"leaves {what} to torch's kernel, which is faster; use_backend keeps it"]
    return Explanation(backend.name, backend.words_for(call), refusals, notes)
