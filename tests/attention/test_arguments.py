"""Arguments of unusual kinds: torch's objects, classes of tensors and numpy's numbers; calls in torch's place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import fastattn
from fastattn import backends
from fastattn.arguments import attention_params, varlen_attention_params
from tests.support.stand_in import stand_in

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8)
X, CU = torch.randn(10, 4, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
ROUTES: dict[str, tuple[Callable[[], AbstractContextManager[None]], bool]] = {
    "default": (nullcontext, False),
    "lse": (nullcontext, True),
    "reference": (lambda: fastattn.use_backend("reference"), False),
}


def attend(*tensors: Any, **options: Any) -> Tensor:
    """out, without lse where it is asked for."""
    result = fastattn.scaled_dot_product_attention(*tensors, **options)
    return result[0] if isinstance(result, tuple) else result


# ---- torch.nn.attention.bias ----

BANDS = {"top-left": causal_upper_left, "bottom-right": causal_lower_right}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("align", BANDS)
@pytest.mark.parametrize("seqlen_k", [3, 5, 9])
def test_a_causal_bias_is_its_band(route: str, align: str, seqlen_k: int) -> None:
    context, return_lse = ROUTES[route]
    k = torch.randn(2, 4, seqlen_k, 8)
    with context():
        # torch warns of rows without a key, which are 0 here
        with pytest.warns(UserWarning) if (align, seqlen_k) == ("bottom-right", 3) else nullcontext():
            bias = BANDS[align](5, seqlen_k)
        out = attend(Q, k, k, bias, return_lse=return_lse)
        expected = attend(Q, k, k, is_causal=True, causal_align=align, return_lse=return_lse)
    assert torch.equal(out, expected)
    has_keys = torch.arange(5) >= (5 - seqlen_k if align == "bottom-right" else 0)
    theirs = F.scaled_dot_product_attention(Q, k, k, bias)
    torch.testing.assert_close(out[:, :, has_keys], theirs[:, :, has_keys])
    assert not out[:, :, ~has_keys].any()


def test_a_causal_bias_combines_with_a_bias_and_a_window_of_its_alignment() -> None:
    bias = torch.randn(5, 9)
    band = causal_lower_right(5, 9)
    options = {"attn_bias": bias, "window": (2, None), "causal_align": "bottom-right"}
    assert torch.equal(attend(Q, K, K, band, **options), attend(Q, K, K, is_causal=True, **options))


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (causal_upper_left(5, 9), {"is_causal": True}, "is_causal: must be False where attn_mask is a CausalBias"),
        (
            causal_upper_left(5, 8),
            {},
            r"attn_mask: a CausalBias must be of \(seqlen_q, seqlen_k\) = \(5, 9\), got \(5, 8\)",
        ),
        (causal_upper_left(5, 9), {"causal_align": "bottom-right"}, "causal_align: must be 'top-left', that of"),
        (causal_lower_right(5, 9), {"window": (1, 1)}, "causal_align: must be 'bottom-right', that of"),
    ],
    ids=["is_causal", "size", "align", "window"],
)
def test_a_causal_bias_refuses_what_contradicts_it(mask: CausalBias, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(Q, K, K, mask, **options)


# ---- classes of tensors ----


class Named(torch.Tensor):
    """A class that leaves torch's functions as they are."""


class Overriding(torch.Tensor):
    """A class that may mean something else than its storage."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "attn_bias"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_class_of_its_own_meaning_is_refused(route: str, name: str) -> None:
    context, return_lse = ROUTES[route]
    mask = torch.ones(5, 9) > 0
    tensors = {"query": Q, "key": K, "value": K, "attn_mask": mask, "attn_bias": torch.zeros(5, 9)}
    with context():
        expected = attend(**tensors, return_lse=return_lse)
        named = attend(**tensors | {name: tensors[name].as_subclass(Named)}, return_lse=return_lse)
        torch.testing.assert_close(named.as_subclass(torch.Tensor), expected)
        with pytest.raises(
            ValueError, match=f"{name}: must not be of a class with a __torch_function__ of its own.*Over"
        ):
            attend(**tensors | {name: tensors[name].as_subclass(Overriding)}, return_lse=return_lse)


@pytest.mark.parametrize("name", ["query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "attn_mask", "attn_bias"])
def test_a_class_of_its_own_meaning_is_refused_in_a_packed_call(name: str) -> None:
    tensors = {"query": X, "key": X, "value": X, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    tensors |= {"attn_mask": torch.ones(6, 6) > 0, "attn_bias": torch.zeros(6, 6)}
    lengths = {"max_seqlen_q": 6, "max_seqlen_k": 6}
    fastattn.varlen_attention(**tensors, **lengths)
    with pytest.raises(ValueError, match=f"{name}: must not be of a class with a __torch_function__ .*Overriding"):
        fastattn.varlen_attention(**tensors | {name: tensors[name].as_subclass(Overriding)}, **lengths)


def test_a_causal_bias_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="attn_bias: must not be of a class"):
        attend(Q, K, K, attn_bias=causal_upper_left(5, 9))
    with pytest.raises(ValueError, match="attn_mask: must not be of a class"):
        fastattn.varlen_attention(X, X, X, CU, CU, 6, 6, attn_mask=causal_upper_left(6, 6))


@pytest.mark.parametrize("route", ROUTES)
def test_torch_s_own_classes_are_tensors(route: str) -> None:
    context, return_lse = ROUTES[route]
    with context():
        expected = attend(Q, K, K, return_lse=return_lse)
        parameter, buffer = nn.Parameter(Q), nn.Buffer(K)
        torch.testing.assert_close(attend(parameter, buffer, buffer, return_lse=return_lse), expected)
        functional = torch.func.functionalize(lambda q, k: attend(q, k, k, return_lse=return_lse))(Q, K)
        torch.testing.assert_close(functional, expected)
        with FakeTensorMode() as mode:
            q, k = mode.from_tensor(Q), mode.from_tensor(K)
            assert attend(q, k, k, return_lse=return_lse).shape == expected.shape


def test_mapped_tensors_are_tensors() -> None:
    torch.testing.assert_close(torch.vmap(lambda q, k: attend(q, k, k))(Q, K), attend(Q, K, K))


# ---- nested tensors ----


def jagged() -> Tensor:
    """Two sequences of 3 and 5 tokens, heads first."""
    sequences = [torch.randn(length, 2, 8) for length in (3, 5)]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True).transpose(1, 2)


def test_jagged_tensors_are_torch_s_functions_alone() -> None:
    x = jagged()
    with backends.anywhere("cuda"):
        explanation = fastattn.explain(x, x, x)
    assert explanation.backend == "torch"
    assert explanation.refusals["cuda"][0] == "takes no nested tensors"
    with fastattn.use_backend("reference"), pytest.raises(NotImplementedError, match="takes no nested tensors"):
        fastattn.scaled_dot_product_attention(x, x, x)


def test_jagged_tensors_go_to_torch_s_function() -> None:
    x = jagged()
    for options in ({}, {"scale": 0.3}):
        out, expected = attend(x, x, x, **options), F.scaled_dot_product_attention(x, x, x, **options)
        for ours, theirs in zip(out.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"return_lse": True}, "return_lse"),
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"attn_mask": torch.ones(1, 1) > 0}, "attn_mask"),
        ({"attn_bias": torch.ones(1, 1)}, "attn_bias"),
        ({"window": (1, 1)}, "window"),
        ({"is_causal": True, "causal_align": "bottom-right"}, "causal_align"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_jagged_tensors_take_no_more_than_torch_s_function_does(options: dict[str, Any], name: str) -> None:
    x = jagged()
    with pytest.raises(ValueError, match=f"{name}: not defined for nested tensors; varlen_attention takes"):
        attend(x, x, x, **options)


def test_other_nested_tensors_are_refused() -> None:
    strided = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    for tensors in ((strided,) * 3, (Q, strided, strided), (strided, K, K)):
        with pytest.raises(ValueError, match="query, key, value: nested tensors must be of layout torch.jagged"):
            attend(*tensors)
    x = jagged()
    for tensors in ((x, K[:, :2], K[:, :2]), (K[:, :2], x, x)):
        with pytest.raises(ValueError, match="query, key, value: must be nested all or none, got"):
            attend(*tensors)


# ---- numbers ----


def test_numpy_s_numbers_become_plain_ones() -> None:
    p = attention_params(
        Q,
        K,
        K,
        None,
        np.float32(0.5),
        np.bool_(True),
        np.float64(2),
        np.bool_(False),
        window=(np.int64(3), np.uint8(1)),
    )
    numbers = (p.dropout_p, p.scale, p.left, p.right)
    assert numbers == (0.5, 2.0, 3, 0)
    assert [type(x) for x in numbers] == [float, float, int, int]
    p = varlen_attention_params(X, X, X, CU, CU, np.int32(6), np.int64(7))
    assert (p.max_seqlen_q, p.max_seqlen_k) == (6, 7)
    assert type(p.max_seqlen_q) is type(p.max_seqlen_k) is int


def test_an_int_is_a_number() -> None:
    p = attention_params(Q, K, K, dropout_p=1, scale=2)
    assert (p.dropout_p, p.scale) == (1.0, 2.0)
    assert type(p.dropout_p) is type(p.scale) is float
    assert attention_params(Q, K, K, scale=-0.5).scale == -0.5


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_a_bias_in_the_other_half_type(dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    bias = torch.randn(5, 9, dtype=other, requires_grad=True)
    with pytest.raises(ValueError, match="attn_mask: a bias must be in float32 or in query's"):
        attend(Q.to(dtype), K.to(dtype), K.to(dtype), bias)
    with torch.autocast("cpu", dtype):
        out, slot = attend(Q, K, K, bias), attend(Q, K, K, attn_bias=bias)
        expected = attend(Q.to(dtype), K.to(dtype), K.to(dtype), bias.to(dtype))
        theirs = F.scaled_dot_product_attention(Q, K, K, bias)
    assert out.dtype == theirs.dtype == dtype
    assert torch.equal(out, expected) and torch.equal(slot, expected)
    (grad,) = torch.autograd.grad(out.float().sum(), bias)
    assert grad.dtype == other and grad.any()


def test_autocast_leaves_other_biases_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_params(Q, K, K, torch.zeros(5, 9)).bias.dtype == torch.float32
        with pytest.raises(ValueError, match="attn_mask: a bias must be in float32 or in query's torch.bfloat16"):
            attend(Q, K, K, torch.zeros(5, 9, dtype=torch.float64))
        with pytest.raises(ValueError, match="attn_mask: a bias must be in float32 or in query's torch.float64"):
            attend(Q.double(), K.double(), K.double(), torch.zeros(5, 9, dtype=torch.float16))


# ---- in the place of torch's function ----


@pytest.mark.parametrize("route", ["default", "reference"])
def test_it_may_stand_in_the_place_of_torch_s_function(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, _ = ROUTES[route]
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train()
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5).triu(1) > 0
    band = causal_lower_right(5, 9)

    def results() -> list[Tensor]:
        return [F.scaled_dot_product_attention(Q, K, K), F.scaled_dot_product_attention(Q, K, K, band), layer(x, mask)]

    expected = results()
    monkeypatch.setattr(F, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
    with context():
        for ours, theirs in zip(results(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_torch_s_function_may_be_replaced_before_the_backend_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = F.scaled_dot_product_attention(Q, K, K)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
    spec = importlib.util.find_spec("fastattn.torch_sdpa")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with stand_in("torch", passes=module):
        torch.testing.assert_close(F.scaled_dot_product_attention(Q, K, K), expected)
