"""Backends that stand in the place of the real ones: other passes, or a machine on which their modules are missing."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from fastattn import backends
from fastattn.backends import Backend
from fastattn.params import AttentionParams, Forward

NOT_INSTALLED = "is not part of this installation (no module)"


@dataclass(frozen=True)
class StandIn(Backend):
    """A backend's record with something else behind it."""

    passes: Any = None  # has what its route needs: attention, or attention_fwd and attention_bwd
    missing: str | None = None

    def kernels(self) -> Any:
        return super().kernels() if self.passes is None else self.passes

    def why_missing(self) -> str | None:
        return self.missing


def stand_in(name: str, **changes: Any) -> AbstractContextManager[None]:
    """Inside, the backend of that name is a StandIn with these fields."""
    record = backends.get(name)
    known = {field.name: getattr(record, field.name) for field in fields(Backend)}
    return backends.replaced(StandIn(**known | changes))


def installed(*names: str) -> AbstractContextManager[None]:
    """Inside, of the fused backends exactly these can be imported, whatever this machine has."""
    stack = ExitStack()
    for backend in backends.BACKENDS:
        is_fused = backend.devices is not None
        stack.enter_context(
            stand_in(backend.name, missing=NOT_INSTALLED if is_fused and backend.name not in names else None)
        )
    return stack


def recording(calls: list[AttentionParams]) -> AbstractContextManager[None]:
    """Inside, the backends that take tensors on a CPU add every call to the list before they attend."""
    stack = ExitStack()
    for name in ("cpu", "torch"):
        missing = backends.get(name).why_missing()
        passes = None if missing else _recorded(backends.get(name).kernels(), calls)
        stack.enter_context(stand_in(name, passes=passes, missing=missing))
    return stack


def _recorded(kernels: Any, calls: list[AttentionParams]) -> SimpleNamespace:
    def attention(p: AttentionParams) -> Any:
        calls.append(p)
        return kernels.attention(p)

    def attention_fwd(forward: Forward, p: AttentionParams) -> None:
        calls.append(p)
        kernels.attention_fwd(forward, p)

    return SimpleNamespace(attention=attention, attention_fwd=attention_fwd, attention_bwd=kernels.attention_bwd)
