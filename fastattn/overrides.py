"""Calls whose query, key or value is no tensor, but may stand for one, as the proxies of torch.fx do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from . import tensors


def hand_over(function: Callable[..., Any], query: Any, key: Any, value: Any, **arguments: Any) -> Any:
    """A function's call by whoever stands for a tensor and has a `__torch_function__`, as with torch's own functions.

    torch.fx so records one call of the function. Subclasses of Tensor are not asked: they see what is done with them
    inside.

    Raises:
        ValueError: nobody takes over.
    """
    others = tuple(x for x in (query, key, value) if not isinstance(x, Tensor))
    if not torch.overrides.has_torch_function(others):
        _refuse(query, key, value)
    return torch.overrides.handle_torch_function(function, others, query, key, value, **arguments)


def record_in_fx(module: nn.Module, query: Any, key: Any, value: Any, **arguments: Any) -> Any:
    """One call of a module in torch.fx's graph, which looks into all modules but torch's and would not get through.

    Raises:
        ValueError: nobody traces, or traces this module by itself.
    """
    tracer = next((x.tracer for x in (query, key, value) if isinstance(x, fx.Proxy)), None)
    if not isinstance(tracer, fx.Tracer) or tracer.root is module:  # a graph cannot call what it is the graph of
        _refuse(query, key, value)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (query, key, value), arguments)


def _refuse(query: Any, key: Any, value: Any) -> NoReturn:
    """Raise for the first that is no tensor."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        tensors.check(name, x)
    raise AssertionError("all are tensors")
