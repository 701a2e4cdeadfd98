"""Objects that stand for tensors: the proxies of torch.fx, and others with a __torch_function__."""

import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import fastattn
from fastattn import MultiHeadAttention, overrides
from tests.support.module_calls import BATCH, EMBED, HEADS, SEQLEN_Q


class Block(nn.Module):
    """Attention as a model calls it: three times one tensor, named arguments, and a learned query."""

    def __init__(self, attention=MultiHeadAttention):
        super().__init__()
        self.attention = attention(EMBED, HEADS, batch_first=True)
        self.pool = nn.Sequential(nn.Linear(EMBED, EMBED), attention(EMBED, HEADS, batch_first=True))
        self.query = nn.Parameter(torch.randn(1, 2, EMBED))

    def forward(self, x, padding):
        x = x + self.attention(x, key=x, value=x, key_padding_mask=padding, need_weights=False)[0]
        memory = self.pool[0](x)
        return self.pool[1](self.query.expand(BATCH, -1, -1), memory, memory)[0]


def inputs():
    padding = torch.zeros(BATCH, SEQLEN_Q, dtype=torch.bool)
    padding[1, 3:] = True
    return torch.randn(BATCH, SEQLEN_Q, EMBED), padding


def nodes(graph):
    return [(node.op, str(node.target)) for node in graph.nodes]


def test_fx_keeps_the_module_as_it_keeps_torchs():
    block = Block().eval()
    traced = fx.symbolic_trace(block)
    assert nodes(traced.graph) == nodes(fx.symbolic_trace(Block(nn.MultiheadAttention)).graph)
    assert [target for op, target in nodes(traced.graph) if op == "call_module"] == ["attention", "pool.0", "pool.1"]
    call = inputs()
    torch.testing.assert_close(traced(*call), block(*call))
    torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(*call), block(*call))
    torch.testing.assert_close(fx.Transformer(traced).transform()(*call), block(*call))


def test_a_tracer_may_still_look_into_other_modules():
    layer = fastattn.replace_attention(nn.TransformerDecoderLayer(EMBED, HEADS, 16, batch_first=True)).eval()

    class Into(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, (nn.Linear, nn.LayerNorm))

    traced = fx.GraphModule(layer, Into().trace(layer))
    assert [target for op, target in nodes(traced.graph) if "attn" in target] == ["self_attn", "multihead_attn"]
    x, _ = inputs()
    torch.testing.assert_close(traced(x, x), layer(x, x))


def test_fx_of_the_module_itself_is_refused():
    with pytest.raises(ValueError, match="query: must be a tensor, got Proxy"):
        fx.symbolic_trace(MultiHeadAttention(EMBED, HEADS))


# ---- functions ----


def attend(query, key, value, scale=1.0):
    """Begins as a function of attention does."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return overrides.hand_over(attend, query, key, value, scale=scale)
    if query.size(-1) == 0:  # which no proxy can answer
        return query
    return scale * (query + key) + value


def test_fx_records_one_call_of_a_function():
    learned = torch.ones(3)

    def model(x):
        return 2 * attend(x, learned, value=x, scale=3.0) + attend(learned, x, x)

    traced = fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.target is attend]
    assert [node.op for node in calls] == ["call_function"] * 2
    x = torch.randn(3)
    torch.testing.assert_close(traced(x), model(x))
    assert "attend" in traced.code


class Recorder:
    """Takes over every function."""

    calls: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append((function, types, args, kwargs))
        return "taken over"


def test_an_object_takes_over():
    x, other = torch.ones(3), Recorder()
    assert attend(x, x, other, scale=2.0) == "taken over"
    assert Recorder.calls == [(attend, (Recorder,), (x, x, other), {"scale": 2.0})]


def test_tensors_do_not_take_over():
    class Named(Tensor):
        pass

    x = torch.ones(3).as_subclass(Named)
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        out = attend(x, torch.ones(3), torch.ones(3))
    assert attend not in seen and type(out) is Named


def test_others_are_refused():
    x = torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match="value: must be a tensor, got None"):
        attend(x, x, None)
    with pytest.raises(ValueError, match=r"key: must be a tensor, got \[1.0\]"):
        MultiHeadAttention(3, 1)(x, [1.0], x)


@pytest.mark.long
def test_it_compiles():
    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)
    for length in (3, 4):
        x = torch.randn(length)
        torch.testing.assert_close(compiled(x, x, x, scale=2.0), attend(x, x, x, scale=2.0))
