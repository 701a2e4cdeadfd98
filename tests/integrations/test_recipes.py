"""docs/recipes.md: its blocks run where their library is installed, reach fastattn, and change no result."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import functional

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^## ([\w-]+)\n.*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
CALLS = {"diffusers": 2, "timm": 2, "x-transformers": 2}


def test_every_recipe_is_tested() -> None:
    assert RECIPES.keys() == CALLS.keys() | {"JoeyNMT", "OpenNMT-py", "fairseq"}


@pytest.mark.slow
@pytest.mark.parametrize("library", CALLS)
def test_recipe_reaches_fastattn_and_changes_no_result(library: str) -> None:
    module = library.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{library} is not installed")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(RECIPES[library], f"docs/recipes.md, {library}", "exec"), names)
    assert names["calls"].taken == CALLS[library] and not names["calls"].refused
    torch.testing.assert_close(names["after"], names["before"], rtol=1e-4, atol=1e-5)


class MultiHeadedAttention(nn.Module):
    """A stand-in with the interface of JoeyNMT's class: its layers' names, its arguments and what it returns."""

    def __init__(self, num_heads: int, size: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.k_layer, self.v_layer, self.q_layer, self.output_layer = (nn.Linear(size, size) for _ in range(4))

    def forward(
        self, k: Tensor, v: Tensor, q: Tensor, mask: Tensor | None = None, return_weights: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_layer, q), (self.k_layer, k), (self.v_layer, v))
        )
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        weights = scores.softmax(-1)
        out = self.output_layer((self.dropout(weights) @ v).transpose(1, 2).flatten(2))
        return out, weights.mean(1) if return_weights else None


@pytest.mark.parametrize("mask_rows", [None, 1, 5])
def test_joeynmts_class_computes_the_same(mask_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: Any = ModuleType("joeynmt.transformer_layers")
    layers.MultiHeadedAttention = type("Theirs", (MultiHeadedAttention,), {})
    monkeypatch.setitem(sys.modules, "joeynmt.transformer_layers", layers)
    calls: list[float] = []
    function = functional.scaled_dot_product_attention

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[4])
        return function(*args, **kwargs)

    monkeypatch.setattr("fastattn.scaled_dot_product_attention", note)
    exec(compile(RECIPES["JoeyNMT"], "docs/recipes.md, JoeyNMT", "exec"), {})
    theirs = layers.MultiHeadedAttention(4, 32, 0.25)
    plain = MultiHeadedAttention(4, 32, 0.25)
    plain.load_state_dict(theirs.state_dict())
    memory, x = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    mask = None if mask_rows is None else torch.rand(2, mask_rows, 7) < 0.7
    if mask is not None:
        mask[..., 0] = True
    for module in (theirs, plain):
        module.eval()
    out, none = theirs(memory, memory, x, mask)
    torch.testing.assert_close(out, plain(memory, memory, x, mask)[0])
    assert none is None and calls == [0.0]
    weights = theirs(memory, memory, x, mask, return_weights=True)[1]
    torch.testing.assert_close(weights, plain(memory, memory, x, mask, True)[1])
    theirs.train()(memory, memory, x, mask)
    assert calls == [0.0, 0.25]


OPENNMT = """
from torch.nn.functional import scaled_dot_product_attention

def context(query, key, value, mask, dropout_p, causal):
    allowed = ~mask if mask is not None else None
    return scaled_dot_product_attention(query, key, value, allowed, dropout_p, is_causal=causal)
"""


def test_opennmts_name_is_replaced_and_its_call_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has the call of OpenNMT's class, in which True is blocked."""
    names = ("onmt", "onmt.modules", "onmt.modules.multi_headed_attn")
    packages: list[Any] = [ModuleType(name) for name in names]
    for package, inner in itertools.pairwise(packages):
        setattr(package, inner.__name__.rpartition(".")[2], inner)
    for package in packages:
        monkeypatch.setitem(sys.modules, package.__name__, package)
    theirs = packages[-1]
    exec(OPENNMT, vars(theirs))
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    blocked[:, 3] = True
    expected = theirs.context(q, k, v, blocked, 0.0, False)
    exec(compile(RECIPES["OpenNMT-py"], "docs/recipes.md, OpenNMT-py", "exec"), {})
    assert theirs.scaled_dot_product_attention is fastattn.scaled_dot_product_attention
    for causal in (False, True):
        torch.testing.assert_close(theirs.context(q, k, v, blocked, 0.0, causal), expected)


class MultiheadAttention(nn.Module):
    """A stand-in that calls what fairseq's class calls while it trains, with weights of the three projections apart."""

    def __init__(self, size: int, num_heads: int, self_attention: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True) -> Any:
        projections = {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}
        return F.multi_head_attention_forward(
            query,
            key,
            value,
            query.shape[-1],
            self.num_heads,
            torch.empty([0]),
            torch.cat([layer.bias for layer in projections.values()]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
            need_weights=need_weights,
            use_separate_proj_weight=True,
            **{f"{name}_weight": layer.weight for name, layer in projections.items()},
        )


def test_fairseqs_way_through_torch_reaches_fastattn(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: Any = ModuleType("fairseq.modules")
    modules.MultiheadAttention = MultiheadAttention
    monkeypatch.setitem(sys.modules, "fairseq.modules", modules)
    names: dict[str, Any] = {}
    exec(compile(RECIPES["fairseq"], "docs/recipes.md, fairseq", "exec"), names)
    assert names["calls"].taken == 1 and not names["calls"].refused
    torch.testing.assert_close(names["after"], names["before"])
