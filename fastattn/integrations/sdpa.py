"""fastattn in the place of torch's attention function, for code that nobody wants to edit.

One function is put into torch.nn.functional, for as long as somebody wants it there. It asks at every call whether it
is wanted here, and what fastattn does not take goes to torch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat, functional
from ..values import described


@dataclass
class SdpaCalls:
    """How many calls were taken, and why the others were not. `print` it.

    Calls of a compiled function are counted when it is compiled, and not where the patch is inside of it.
    """

    taken: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by reason; these went to torch's function

    def __str__(self) -> str:
        lines = [f"calls: {self.taken} by fastattn, {sum(self.refused.values())} by torch"]
        lines += [f"  {count} by torch, because {reason}" for reason, count in self.refused.items()]
        return "\n".join(lines)

    def add(self, reason: str | None) -> None:
        """Count a call that was taken, or was not for that reason."""
        with _lock:
            if reason is None:
                self.taken += 1
            else:
                self.refused[reason] = self.refused.get(reason, 0) + 1


_lock = threading.Lock()
_of_task: ContextVar[SdpaCalls | None] = ContextVar("fastattn.use_for_sdpa", default=None)


class _OfProcess:
    """What all threads share."""

    calls: SdpaCalls | None = None  # of `patch_sdpa`
    users = 0  # who wants our function in torch.nn.functional: blocks of `use_for_sdpa`, and `patch_sdpa`


_process = _OfProcess()


@contextmanager
def use_for_sdpa() -> Iterator[SdpaCalls]:
    """Let F.scaled_dot_product_attention be fastattn's inside, for this thread and this asyncio task::

        with fastattn.use_for_sdpa() as calls:
            model(x)
        print(calls)

    Reached is whatever looks the function up in torch.nn.functional when it calls: nn.MultiheadAttention and its layers
    (not their fast path in evaluation without gradients), transformers with "sdpa", diffusers, timm. Code that has
    imported the function by name before is not. Compiled functions are compiled anew for it.

    What fastattn does not take (tensors of classes with a __torch_function__ of their own, head_dim 0, nested tensors
    with more than torch's function has for them) goes to torch's function. `torch.nn.attention.sdpa_kernel` chooses
    among torch's kernels only. Under `use_backend` a call which that backend cannot take raises, as ever.

    Activation checkpointing on a GPU computes again in a thread of autograd's, for which this does not hold: use
    `patch_sdpa` there.

    Yields:
        The counts of the calls inside, an `SdpaCalls` with `taken` and, by reason, `refused`.

    Raises:
        RuntimeError: somebody else has replaced the function.
    """
    calls = SdpaCalls()
    if torch.compiler.is_dynamo_compiling():
        previous = F.scaled_dot_product_attention, _traced.is_on
        F.scaled_dot_product_attention, _traced.is_on = _in_its_place, True
        try:
            yield calls
        finally:
            F.scaled_dot_product_attention, _traced.is_on = previous
        return
    with _lock:
        _put()
    token = _of_task.set(calls)
    try:
        yield calls
    finally:
        _of_task.reset(token)
        with _lock:
            _take_away()


def patch_sdpa() -> SdpaCalls:
    """Let F.scaled_dot_product_attention be fastattn's in the whole process, until `unpatch_sdpa`.

    Reaches what `use_for_sdpa` reaches, in every thread. Twice is once.

    Returns:
        The counts of the calls from now on, but for those inside of `use_for_sdpa`; the same object if called twice.

    Raises:
        RuntimeError: somebody else has replaced the function.
    """
    with _lock:
        if _process.calls is None:
            _put()
            _process.calls = SdpaCalls()
        return _process.calls


def unpatch_sdpa() -> None:
    """Undo `patch_sdpa`, however often it was called: F.scaled_dot_product_attention is torch's own again."""
    with _lock:
        if _process.calls is not None:
            _process.calls = None
            _take_away()


# ---- the place in torch.nn.functional; the lock is held ----


def _put() -> None:
    if _process.users == 0:
        theirs = F.scaled_dot_product_attention
        if theirs is not compat.sdpa:
            name = f"{getattr(theirs, '__module__', '?')}.{getattr(theirs, '__qualname__', described(theirs))}"
            raise RuntimeError(f"F.scaled_dot_product_attention: must be torch's own, has been replaced by {name}")
        compat.script_as_sdpa(_in_its_place)
        F.scaled_dot_product_attention = _in_its_place
    _process.users += 1


def _take_away() -> None:
    """Whoever has replaced the function in the meantime keeps the place, over one that is torch's from now on."""
    _process.users -= 1
    if _process.users == 0 and F.scaled_dot_product_attention is _in_its_place:
        F.scaled_dot_product_attention = compat.sdpa


# ---- one call ----


def _in_its_place(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """fastattn's function where that is wanted and takes the call, else torch's, called as the caller did."""
    if not _is_on():
        return compat.sdpa(query, key, value, *args, **kwargs)
    out: Any = None
    if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor):
        reason = None
        try:
            out = functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        except ValueError as error:
            reason = str(error)
    else:
        reason = "query, key, value: must be tensors"
    if reason is not None:
        out = compat.sdpa(query, key, value, *args, **kwargs)  # an error of torch's is no refusal
    _count(reason)
    return out


class _Traced:
    """What a graph that is being made has been told by itself: torch.compile follows attributes, but no ContextVar."""

    is_on = False


_traced = _Traced()


def _is_on() -> bool:
    if torch.compiler.is_dynamo_compiling():
        return _traced.is_on or _is_on_around_the_graph()
    return _calls() is not None


@compat.assume_constant
def _is_on_around_the_graph() -> bool:
    is_on = _calls() is not None
    compat.compile_again_unless(lambda: (_calls() is not None) == is_on, f"use_for_sdpa: {is_on}")
    return is_on


@compat.assume_constant
def _count(reason: str | None) -> None:
    calls = _calls()
    if calls is not None:
        calls.add(reason)


def _calls() -> SdpaCalls | None:
    return _of_task.get() or _process.calls
