"""What works on CPU tensors, for every backend that is chosen for them: ways of asking for derivatives, and tools.

Nothing that works may stop working, and nothing that is refused may return a number.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import backends
from tests.support.derivatives import FIRST, FORWARD, SECOND
from tests.support.stand_in import stand_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.FastattnFallbackWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
CPU_BACKENDS = [b.name for b in backends.BACKENDS if b.takes_device("cpu") and not b.on_request_only]
MODES = FIRST | FORWARD | SECOND
# What a backend refuses: F.sdpa's kernel for CPUs has no derivative of its gradient.
REFUSED = {("torch", name): (RuntimeError, "not implemented") for name in SECOND}

X, K, V = (torch.randn(1, 2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 6))
V = V[:, :, :5]


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Inside, the backend is the one that calls on CPU tensors are given to, though none is named."""
    with ExitStack() as stack:
        for backend in CPU_BACKENDS[: CPU_BACKENDS.index(name)]:
            stack.enter_context(stand_in(backend, missing="is left out"))
        assert fastattn.explain(X, K, V).backend == name
        yield


def plain(x: Tensor, k: Tensor = K, v: Tensor = V) -> Tensor:
    return fastattn.scaled_dot_product_attention(x, k, v)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_derivatives(mode: str, backend: str) -> None:
    with chosen(backend):
        if (backend, mode) in REFUSED:
            error, words = REFUSED[backend, mode]
            with pytest.raises(error, match=words):
                MODES[mode](plain, X)
            return
        actual = MODES[mode](plain, X)
    with fastattn.use_backend("reference"):
        torch.testing.assert_close(actual, MODES[mode](plain, X))


# ---- tools: a function of plain's arguments that says what plain says ----


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v)


def exported(strict: bool) -> Callable[..., Tensor]:
    sizes = [torch.export.Dim(name, min=1, max=64) for name in ("batch", "seqlen_q", "seqlen_k")]
    query, key = {0: sizes[0], 2: sizes[1]}, {0: sizes[0], 2: sizes[2]}
    inputs = [torch.randn(2, 2, 4, 4) for _ in range(3)]
    return torch.export.export(Attention(), tuple(inputs), dynamic_shapes=(query, key, key), strict=strict).module()


def compiled(**options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(plain, fullgraph=True, backend="aot_eager", **options)


def saved_and_loaded() -> Callable[..., Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Attention(), (X, K, V)), file)
    file.seek(0)
    return torch.jit.load(file)


def in_place_of_torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
        return F.scaled_dot_product_attention(q, k, v)


def with_tensors_on_the_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plain(q, k, v)


TOOLS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "the function": lambda: plain,
    "torch.jit.trace": lambda: torch.jit.trace(plain, (X, K, V)),
    "torch.jit.save": saved_and_loaded,
    "torch.fx": lambda: torch.fx.symbolic_trace(Attention()),
    "torch.func.functional_call": lambda: lambda *x: torch.func.functional_call(Attention(), {}, x),
    "torch.vmap": lambda: lambda q, k, v: torch.vmap(plain)(q[None], k[None], v[None])[0],
    "checkpoint": lambda: lambda *x: checkpoint(plain, *x, use_reentrant=False),
    "checkpoint, reentrant": lambda: lambda *x: checkpoint(plain, *x, use_reentrant=True),
    "save_on_cpu": lambda: with_tensors_on_the_cpu,
    "copy.deepcopy": lambda: copy.deepcopy(Attention()),
    "pickle": lambda: pickle.loads(pickle.dumps(plain)),
    "in the place of torch's": lambda: in_place_of_torchs,
}
COMPILERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "torch.compile": compiled,
    "torch.compile(dynamic)": lambda: compiled(dynamic=True),
    "torch.export": lambda: exported(strict=False),
    "torch.export(strict)": lambda: exported(strict=True),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("tool", [*TOOLS, *(pytest.param(name, marks=pytest.mark.long) for name in COMPILERS)])
def test_tools(tool: str, backend: str) -> None:
    """The same results and gradients, for other lengths than those with which a graph was made."""
    with chosen(backend):
        function = (TOOLS | COMPILERS)[tool]()
        for seqlen_q, seqlen_k in ((3, 5), (4, 4), (6, 2)):
            q, k, v = (torch.randn(2, 2, n, 4, requires_grad=True) for n in (seqlen_q, seqlen_k, seqlen_k))
            with fastattn.use_backend("reference"):
                expected = plain(q, k, v)
                gradients = torch.autograd.grad(expected.pow(2).sum(), (q, k, v))
            out = function(q, k, v)
            torch.testing.assert_close(out, expected)
            out.pow(2).sum().backward()
            for x, gradient in zip((q, k, v), gradients, strict=True):
                torch.testing.assert_close(x.grad, gradient)
