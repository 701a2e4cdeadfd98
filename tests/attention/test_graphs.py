"""Calls that are traced, exported or only described: a graph holds what its user would call, or it is refused."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import backends
from tests.support.cases import cumulative

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tensors(seqlen_q: int = 5, seqlen_k: int = 5, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, 2, n, 8) for n in (seqlen_q, seqlen_k, seqlen_k)]


def packed(x: Tensor, cu_seqlens: Tensor, **arguments: Any) -> Tensor:
    return fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 4, 4, **arguments)


def kinds(graph: Any) -> set[str]:
    return {node.kind() for node in graph.nodes()}


# ---- torch.jit.trace ----

DENSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom-right": {"is_causal": True, "causal_align": "bottom-right"},
    "window": {"window": (2, 1)},
    "negative scale": {"is_causal": True, "scale": -1.0},
    "causal with a bias": {"is_causal": True, "attn_bias": torch.randn(2, 1, 1)},
    "causal with a mask": {"is_causal": True, "attn_mask": torch.tensor([True, False])[:, None, None]},
    "lse": {"return_lse": True},
    "lse, bottom-right": {"is_causal": True, "causal_align": "bottom-right", "return_lse": True},
}
STAYS_TORCHS = {"plain", "causal"}


@pytest.mark.parametrize("name", DENSE)
def test_a_trace_holds_for_other_lengths(name: str) -> None:
    function = lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, **DENSE[name])  # noqa: E731
    traced = torch.jit.trace(function, tensors(), check_trace=False)
    expected = "aten::scaled_dot_product_attention" if name in STAYS_TORCHS else "fastattn::attention_fwd"
    assert expected in kinds(traced.graph)
    for sizes in ((5, 5), (3, 9), (9, 3), (1, 1)):
        inputs = tensors(*sizes, batch=2)
        for x, y in zip(_results(traced(*inputs)), _results(function(*inputs)), strict=True):
            torch.testing.assert_close(x, y)


def _results(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True, "return_lse": True}, {"dropout_p": 0.5}], ids=str)
def test_a_trace_of_packed_sequences_reads_their_lengths(arguments: dict[str, Any]) -> None:
    x = torch.randn(5, 2, 8)
    function = lambda x, edges: packed(x, edges, **arguments)  # noqa: E731
    traced = torch.jit.trace(function, (x, cumulative([2, 3])), check_trace=False)
    for lengths in ([2, 3], [4, 1], [1, 1], [0, 4]):
        results = []
        for call in (traced, function):
            torch.manual_seed(0)
            results.append(_results(call(x, cumulative(lengths))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths", [[0, 5], [3, 3], [-1, 4]], ids=str)
def test_a_trace_refuses_lengths_that_the_call_would_refuse(lengths: list[int]) -> None:
    x = torch.randn(5, 2, 8)
    traced = torch.jit.trace(packed, (x, cumulative([2, 3])), check_trace=False)
    with pytest.raises(Exception, match=r"(cu_seqlens|max_seqlen)_q: must"):
        traced(x, cumulative(lengths))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_trace_calls_a_native_backend_and_not_what_it_filled(backend: str) -> None:
    calls: list[Any] = []

    class Passes:
        @staticmethod
        def attention_fwd(forward: Any, p: Any) -> None:
            calls.append(p)
            forward.out.fill_(len(calls))
            forward.lse.fill_(0)

    from tests.support.stand_in import stand_in

    with stand_in(backend, passes=Passes, devices=None, min_capability=None):
        function = functools.partial(fastattn.scaled_dot_product_attention, return_lse=True)
        traced = torch.jit.trace(lambda *x: function(*x)[0], tensors(), check_trace=False)
        count = len(calls)
        assert traced(*tensors()).unique().tolist() == [count + 1]
        assert len(calls) == count + 1


# ---- without values: meta and fake tensors ----

WITHOUT_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda q: fastattn.scaled_dot_product_attention(q, q, q),
    "lse": lambda q: fastattn.scaled_dot_product_attention(q, q, q, return_lse=True),
    "dropout": lambda q: fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.1),
    "window and bias": lambda q: fastattn.scaled_dot_product_attention(
        q, q, q, attn_bias=q.narrow(3, 0, 1).float(), window=(1, 1), return_lse=True
    ),
    "packed": lambda q: fastattn.varlen_attention(
        *[q.select(0, 0)] * 3, *[torch.zeros(3, dtype=torch.int32, device=q.device)] * 2, 4, 4
    ),
}


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_meta_tensors(name: str, backend: str | None) -> None:
    function = WITHOUT_VALUES[name]
    real = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    expected = _results(function(real))
    q = real.to("meta").requires_grad_()
    context = fastattn.use_backend(backend or "torch")
    with context if backend else torch.enable_grad():
        results = _results(function(q))
    for x, y in zip(results, expected, strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")
    (grad,) = torch.autograd.grad(sum(x.sum() for x in results), q)
    assert grad.shape == q.shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_fake_tensors_of_a_device_that_need_not_be_there(name: str, device: str) -> None:
    function = WITHOUT_VALUES[name]
    expected = _results(function(torch.randn(2, 3, 5, 8)))
    with FakeTensorMode():
        results = _results(function(torch.empty(2, 3, 5, 8, device=device)))
    for x, y in zip(results, expected, strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, device)


def test_a_module_on_meta() -> None:
    with torch.device("meta"):
        module = fastattn.MultiHeadAttention(16, 2, dropout=0.1, batch_first=True)
        x = torch.randn(2, 5, 16)
        out, weights = module(x, x, x)
    assert (out.shape, weights.shape, out.device.type) == ((2, 5, 16), (2, 5, 5), "meta")


# ---- export, and where its graph may run ----


class Attention(nn.Module):
    """One call, with or without what makes it an operator."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _results(fastattn.scaled_dot_product_attention(q, k, v, **self.arguments))[0]


def exported(backend: str, **arguments: Any) -> Any:
    with fastattn.use_backend(backend):
        return torch.export.export(Attention(**arguments), tuple(tensors()))


def targets(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.long
def test_an_exported_call_stays_torchs_where_that_says_the_same() -> None:
    def by_default(**arguments: Any) -> set[str]:
        return targets(torch.export.export(Attention(**arguments), tuple(tensors())))

    assert "aten.scaled_dot_product_attention.default" in by_default()
    assert "fastattn.attention_fwd.default" in by_default(return_lse=True)
    for backend in ("cpu", "torch"):
        program = exported(backend, return_lse=True)
        assert "fastattn.attention_fwd.default" in targets(program)
    assert "fastattn.attention_fwd.default" in targets(exported("cpu"))


@pytest.mark.long
def test_an_exported_operator_runs_only_where_its_backend_does() -> None:
    inputs = tensors()
    program = exported("torch", return_lse=True)
    torch.testing.assert_close(program.module()(*inputs), Attention(return_lse=True)(*inputs))
    with backends.anywhere("cuda"):  # as if the CPU were a GPU
        elsewhere = exported("cuda", return_lse=True)
    with pytest.raises(NotImplementedError, match="holds backend 'cuda', which takes a CUDA device; cpu needs a graph"):
        elsewhere.module()(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = [torch.empty(x.shape, device="cuda") for x in inputs]
        assert program.module()(*moved).device.type == "cuda"  # `torch` runs anywhere
        assert elsewhere.module()(*moved).device.type == "cuda"
        with pytest.raises(NotImplementedError, match="holds backend 'cuda'"):
            elsewhere.module()(*(torch.empty(x.shape) for x in inputs))


def test_an_operator_wants_its_tensors_in_one_place() -> None:
    from fastattn.arguments import attention_params

    p = attention_params(*tensors(), attn_mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: is on meta, q on cpu"):
        torch.ops.fastattn.attention_fwd(*p.replace(mask=p.mask.to("meta")), "torch")


# ---- use_backend, in graphs, threads and tasks ----


def operators_of(graph: torch.fx.GraphModule) -> str:
    names = " ".join(str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes)
    return "sdpa" if "scaled_dot_product" in names else "fused" if "attention_fwd" in names else "reference"


@pytest.mark.long
def test_a_compiled_function_is_compiled_anew_for_another_backend() -> None:
    made: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append(operators_of(graph))
        return graph

    torch._dynamo.reset()
    q = tensors()[0]
    function = torch.compile(lambda q: fastattn.scaled_dot_product_attention(q, q, q), fullgraph=True, backend=compiler)
    function(q)
    with fastattn.use_backend("reference"):
        function(q)
        with fastattn.use_backend("torch"):
            function(q)
        function(q)
    function(q)
    assert made == ["fused", "reference", "sdpa"]


@pytest.mark.long
def test_use_backend_inside_of_a_compiled_function() -> None:
    made: list[Any] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append([str(getattr(node.target, "__name__", "")) for node in graph.graph.nodes])
        return graph

    def function(q: Tensor) -> tuple[Tensor, ...]:
        with fastattn.use_backend("reference"):
            inside = fastattn.scaled_dot_product_attention(q, q, q)
        return inside, fastattn.scaled_dot_product_attention(q, q, q)

    torch._dynamo.reset()
    q = tensors()[0]
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    with fastattn.use_backend("torch"):
        for x, y in zip(compiled(q), function(q), strict=True):
            torch.testing.assert_close(x, y)
    (names,) = made
    assert names.count("scaled_dot_product_attention") == 1
    assert fastattn.explain(q, q, q).backend == "cpu"


def test_use_backend_holds_for_one_task() -> None:
    q = tensors()[0]
    seen: list[tuple[str, str]] = []

    async def one(name: str) -> None:
        with fastattn.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append((name, fastattn.explain(q, q, q).backend))

    async def several() -> None:
        await asyncio.gather(one("reference"), one("torch"), one("reference"))
        seen.append(("cpu", fastattn.explain(q, q, q).backend))

    asyncio.run(several())
    assert len(seen) == 10 and all(wanted == found for wanted, found in seen)
    assert backends.forced() is None
