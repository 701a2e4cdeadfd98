"""The benchmark of attention calls other libraries as they want to be called; stand-ins take their places."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

import fastattn
from benchmarks import cases, providers
from benchmarks.gate import Gate
from tests.support.benchmark_case import case, packed

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch):
    """The calls of stand-ins for libraries that are not here."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, causal=False):
        calls.append((q.shape, dropout_p))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, causal=False, **lengths):
        return fastattn.varlen_attention(q, k, v, *lengths.values(), is_causal=causal)

    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0):
        return flash_attn_func(q, k, v, p, attn_bias == "triangle")

    flash = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention, LowerTriangularMask=lambda: "triangle")
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def provider(name: str):
    return next(p for p in providers.all_providers() if p.name == name)


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("name", ["flash-attn-2", "xformers"])
def test_other_libraries_get_their_own_order_of_dimensions(fake, name, mask):
    Gate(case(mask, torch.float16, seqlen_k=9), CPU).admit(provider(name))
    assert fake[0] == ((2, 9, 2, 16), 0.0)
    Gate(case("dropout", torch.float16), CPU).admit(provider(name))
    assert fake[-1] == ((2, 9, 2, 16), cases.DROPOUT_P)


def test_flash_attn_takes_packed_sequences_but_no_mask_and_no_float32(fake):
    Gate(dataclasses.replace(packed("causal"), dtype=torch.float16), CPU).admit(provider("flash-attn-2"))
    for refused, reason in ((case("bool", torch.float16), "takes no mask"), (case(), "takes no float32")):
        with pytest.raises(providers.Unavailable, match=reason):
            Gate(refused, CPU).admit(provider("flash-attn-2"))


@pytest.mark.parametrize("mask", ["causal", "padding", "bool", "packed", "packed-causal"])
def test_flex_attention_gets_the_same_mask(mask):
    inputs = (packed("causal" if "causal" in mask else "none") if "packed" in mask else case(mask)).make(CPU)
    batch, queries, keys = (1, 17, 17) if "packed" in mask else (2, 9, 9)
    actual = create_mask(providers._mask_mod(inputs), batch, 1, queries, keys, device="cpu")
    expected = torch.ones(queries, keys, dtype=torch.bool)
    if "packed" in mask:
        expected = torch.block_diag(*(torch.ones(n, n) for n in (3, 9, 5))).bool()
    if "causal" in mask:
        expected = expected.tril()
    if inputs.mask is not None:
        expected = expected & inputs.mask
    assert torch.equal(actual, expected.expand_as(actual))
