"""fastattn in the place of torch's function: who is reached, where and for how long, and what is left to torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import compat
from fastattn.integrations import sdpa
from fastattn.params import AttentionParams

TORCH = F.scaled_dot_product_attention
Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)


@pytest.fixture(autouse=True)
def torch_s_own_afterwards() -> Iterator[None]:
    yield
    fastattn.unpatch_sdpa()
    is_own = F.scaled_dot_product_attention is TORCH
    F.scaled_dot_product_attention = TORCH
    assert is_own and sdpa._process.users == 0


def attend(**options: Any) -> Tensor:
    return F.scaled_dot_product_attention(Q, K, V, **options)


def in_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# ---- what is computed ----

MASK, BIAS = torch.rand(5, 9) < 0.7, torch.randn(2, 1, 5, 9)
MASK[:, 0] = True
OPTIONS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": ((Q, K, V), {}),
    "mask": ((Q, K, V), {"attn_mask": MASK}),
    "bias": ((Q, K, V), {"attn_mask": BIAS}),
    "causal": ((Q, K, V), {"is_causal": True}),
    "scale": ((Q, K, V), {"scale": 0.3}),
    "groups": ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
    "broadcast": ((Q[:1], K, V), {}),
    "three dimensions": ((Q[0], K[0], V[0]), {"is_causal": True}),
    "float64": ((Q.double(), K.double(), V.double()), {}),
    "wide": ((Q.repeat(1, 1, 1, 40),) * 3, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_is_fastattn_s_and_says_what_torch_says(name: str, attended: list[AttentionParams]) -> None:
    tensors, options = OPTIONS[name]
    results = []
    for is_ours in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        if is_ours:
            with fastattn.use_for_sdpa() as calls:
                out = F.scaled_dot_product_attention(*leaves, **options)
        else:
            out = F.scaled_dot_product_attention(*leaves, **options)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(attended) == 1 and (calls.taken, calls.refused) == (1, {})


def test_all_arguments_arrive_by_position_and_by_name(attended: list[AttentionParams]) -> None:
    with fastattn.use_for_sdpa():
        F.scaled_dot_product_attention(Q, K, V, MASK, 0.5, True, scale=0.3, enable_gqa=True)
        F.scaled_dot_product_attention(
            query=Q, key=K, value=V, attn_mask=MASK, dropout_p=0.5, is_causal=True, scale=0.3, enable_gqa=True
        )
    for p in attended:
        assert (p.dropout_p, p.right, p.scale, p.mask is None) == (0.5, 0, 0.3, False)
    assert len(attended) == 2


def test_torch_s_modules_are_reached(attended: list[AttentionParams]) -> None:
    torch.manual_seed(1)
    x, padded = torch.randn(2, 6, 16), torch.arange(6).expand(2, 6) >= 5
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def results() -> list[Tensor]:
        return [attention(x, x, x, key_padding_mask=padded, need_weights=False)[0], layer(x)]

    expected = results()
    assert not attended
    with fastattn.use_for_sdpa():
        for ours, theirs in zip(results(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(attended) == 2


# ---- where and how long ----


def test_a_block_ends() -> None:
    with fastattn.use_for_sdpa() as outer:
        place = F.scaled_dot_product_attention
        assert place is not TORCH
        with fastattn.use_for_sdpa() as inner:
            assert F.scaled_dot_product_attention is place
            attend()
        attend()
        assert (outer.taken, inner.taken) == (1, 1)
    assert F.scaled_dot_product_attention is TORCH
    with pytest.raises(KeyError), fastattn.use_for_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCH


def test_patched_twice_and_unpatched_once_is_torch_s_own(attended: list[AttentionParams]) -> None:
    calls = fastattn.patch_sdpa()
    attend()
    assert fastattn.patch_sdpa() is calls
    attend()
    fastattn.unpatch_sdpa()
    assert F.scaled_dot_product_attention is TORCH and calls.taken == len(attended) == 2
    fastattn.unpatch_sdpa()
    attend()
    assert len(attended) == 2
    assert fastattn.patch_sdpa() is not calls


def test_a_block_is_for_its_thread_and_a_patch_for_all(attended: list[AttentionParams]) -> None:
    with fastattn.use_for_sdpa() as calls:
        torch.testing.assert_close(in_thread(attend), attend())
        assert len(attended) == calls.taken == 1
    calls = fastattn.patch_sdpa()
    in_thread(attend)
    assert len(attended) == 2 and calls.taken == 1


def test_a_block_outlives_those_of_other_threads_and_a_patch(attended: list[AttentionParams]) -> None:
    def other() -> None:
        with fastattn.use_for_sdpa():
            attend()
        fastattn.patch_sdpa()
        fastattn.unpatch_sdpa()

    with fastattn.use_for_sdpa() as calls:
        in_thread(other)
        attend()
    assert calls.taken == 1 and len(attended) == 2
    fastattn.patch_sdpa()
    with fastattn.use_for_sdpa():
        fastattn.unpatch_sdpa()
        attend()
    assert len(attended) == 3


def test_a_block_is_for_its_task() -> None:
    counts = []

    async def task(is_ours: bool) -> None:
        if is_ours:
            with fastattn.use_for_sdpa() as calls:
                await asyncio.sleep(0)
                attend()
                await asyncio.sleep(0)
            counts.append(calls.taken)
        else:
            await asyncio.sleep(0)
            attend()

    async def both() -> None:
        await asyncio.gather(task(True), task(False), task(True))

    asyncio.run(both())
    assert counts == [1, 1]


def test_who_imported_the_function_by_name_is_not_reached(attended: list[AttentionParams]) -> None:
    with fastattn.use_for_sdpa() as calls:
        imported_by_name(Q, K, V)
    assert not attended and calls.taken == 0


def test_a_patch_reaches_what_is_computed_again(attended: list[AttentionParams]) -> None:
    q = Q.clone().requires_grad_()
    fastattn.patch_sdpa()
    checkpoint(F.scaled_dot_product_attention, q, K, V, use_reentrant=False).sum().backward()
    assert len(attended) == 2


# ---- other replacements ----


def test_where_another_replacement_stands_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(*args: Any) -> None: ...

    monkeypatch.setattr(F, "scaled_dot_product_attention", another)
    for put in (fastattn.patch_sdpa, fastattn.use_for_sdpa().__enter__):
        with pytest.raises(RuntimeError, match="must be torch's own, has been replaced by .*test_sdpa.*another"):
            put()
    assert F.scaled_dot_product_attention is another and sdpa._process.users == 0


def test_a_later_replacement_is_left_in_its_place_over_torch_s(attended: list[AttentionParams]) -> None:
    fastattn.patch_sdpa()
    below = F.scaled_dot_product_attention

    def another(*args: Any, **options: Any) -> Tensor:
        return 2 * below(*args, **options)

    F.scaled_dot_product_attention = another
    with fastattn.use_for_sdpa() as calls:
        attend()
    fastattn.unpatch_sdpa()
    assert F.scaled_dot_product_attention is another
    assert torch.equal(attend(), 2 * TORCH(Q, K, V)) and calls.taken == len(attended) == 1
    F.scaled_dot_product_attention = TORCH


# ---- refusals ----


class Meaning(torch.Tensor):
    """A class that may mean something else than its storage."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Stand:
    """No tensor, but torch's functions take it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func.__name__, len(args), kwargs


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "head_dim 0": (lambda: F.scaled_dot_product_attention(Q[..., :0], K[..., :0], V), "query: head_dim must be"),
    "class": (lambda: F.scaled_dot_product_attention(Q.as_subclass(Meaning), K, V), "query: must not be of a class"),
    "stand-in": (lambda: F.scaled_dot_product_attention(Stand(), K, V, scale=1.0), "query, key, value: must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_fastattn_does_not_take_is_torch_s_and_counted(name: str, attended: list[AttentionParams]) -> None:
    call, reason = REFUSED[name]
    expected = call()
    with fastattn.use_for_sdpa() as calls:
        for _ in range(2):
            actual = call()
            assert torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected
        attend()
    (text,) = calls.refused
    assert text.startswith(reason) and calls.refused[text] == 2 and calls.taken == 1 == len(attended)
    assert str(calls) == f"calls: 1 by fastattn, 2 by torch\n  2 by torch, because {text}"


def test_strided_nested_tensors_are_torch_s() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    expected = F.scaled_dot_product_attention(x, x, x)
    with fastattn.use_for_sdpa() as calls:
        actual = F.scaled_dot_product_attention(x, x, x)
    for ours, theirs in zip(actual.unbind(), expected.unbind(), strict=True):
        assert torch.equal(ours, theirs)
    assert calls.taken == 0 and sum(calls.refused.values()) == 1


def test_a_mistake_is_reported_as_torch_reports_it_and_is_no_refusal() -> None:
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(Q, K[..., :3], V)
    with fastattn.use_for_sdpa() as calls, pytest.raises(RuntimeError) as ours:
        F.scaled_dot_product_attention(Q, K[..., :3], V)
    assert str(ours.value) == str(theirs.value)
    assert calls == sdpa.SdpaCalls()


def test_a_named_backend_does_not_fall_back() -> None:
    with fastattn.use_for_sdpa(), fastattn.use_backend("cuda"), pytest.raises(NotImplementedError, match="'cuda'"):
        attend()


# ---- torch's compilers ----


def fused(graph: torch.fx.GraphModule) -> list[bool]:
    """Of each attention in a graph, whether it is fastattn's operator."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return ["fastattn" in name for name in names if "attention" in name]


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[list[bool]]]:
    torch._dynamo.reset()
    graphs: list[list[bool]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(fused(graph))
        return graph

    return torch.compile(function, fullgraph=True, backend=backend), graphs


@pytest.mark.long
def test_compiled_functions_follow() -> None:
    """Around the graph: a patch, a block, neither; and two graphs are enough."""
    function, graphs = compiled(lambda q: F.scaled_dot_product_attention(q, K, V, dropout_p=0.1))
    function(Q)
    assert graphs == [[False]]
    calls = fastattn.patch_sdpa()
    function(Q)
    assert graphs[1:] == [[True]] and calls.taken == 1
    fastattn.unpatch_sdpa()
    function(Q)
    with fastattn.use_for_sdpa():
        function(Q)
        assert len(graphs) == 2
        in_thread(lambda: function(Q))  # where our function stands, too, and is not wanted
        assert graphs[2:] == [[False]]


@pytest.mark.long
def test_a_block_inside_of_a_compiled_function() -> None:
    def three(q: Tensor) -> list[Tensor]:
        before = F.scaled_dot_product_attention(q, K, V)
        with fastattn.use_for_sdpa():
            inside = F.scaled_dot_product_attention(q, K, V, scale=0.5, dropout_p=0.0, is_causal=True, attn_mask=MASK)
        return [before, inside, F.scaled_dot_product_attention(q, K, V)]

    expected = three(Q)
    function, graphs = compiled(three)
    for _ in range(4):
        for ours, theirs in zip(function(Q), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert F.scaled_dot_product_attention is TORCH
    assert len(graphs) <= 2 and all(not g[0] and not g[-1] for g in graphs)


@pytest.mark.long
def test_a_refusal_of_a_compiled_function() -> None:
    function, _ = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    with fastattn.use_for_sdpa() as calls:
        out = function(Q[..., :0], K[..., :0], V)
    torch.testing.assert_close(out, TORCH(Q[..., :0], K[..., :0], V))
    assert list(calls.refused.values()) == [1]


def test_scripts_and_traces_keep_torch_s() -> None:
    def function(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    class Module(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    with fastattn.use_for_sdpa():
        script = torch.jit.script(function)
        graph = torch.fx.symbolic_trace(Module())
    assert "aten::scaled_dot_product_attention" in str(script.graph)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [TORCH]
    torch.testing.assert_close(script(Q), TORCH(Q, Q, Q))


def test_compat_has_torch_s_own() -> None:
    with fastattn.use_for_sdpa():
        assert compat.sdpa is TORCH is not F.scaled_dot_product_attention
