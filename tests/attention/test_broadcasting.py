"""Query, key and value that broadcast: what torch's function makes of them, and the gradients in their own shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.params import AttentionParams
from tests.support.broadcast_calls import CALLS, Call, actual, expected
from tests.support.stand_in import recording

FORMS: dict[str, tuple[Callable[[], AbstractContextManager[None]], bool]] = {
    "default": (nullcontext, False),
    "lse": (nullcontext, True),
    "reference": (lambda: fastattn.use_backend("reference"), True),
}


@pytest.mark.parametrize("form", ["default", "lse", pytest.param("reference", marks=pytest.mark.long)])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_and_gradients_are_torch_s(call: Call, form: str) -> None:
    context, with_lse = FORMS[form]
    wanted = expected(call, torch.float64, with_lse)
    with context():
        found = actual(call, torch.float64, with_lse)
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_broadcast_tensor_is_not_copied() -> None:
    """One head of keys serves all heads of the query as it is; what broadcasts has stride 0."""
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(2, 1, 5, 8), torch.randn(5, 6)
    calls: list[AttentionParams] = []
    with recording(calls):
        assert fastattn.scaled_dot_product_attention(q, k, v).shape == (2, 4, 3, 6)
    (p,) = calls
    assert (p.q.data_ptr(), p.k.data_ptr(), p.v.data_ptr()) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert (p.q.shape[:2], p.k.shape[:2], p.v.shape[:2]) == ((2, 4), (2, 1), (2, 1))
    assert p.q.stride(0) == p.v.stride(0) == 0


@pytest.mark.parametrize(
    ("heads", "enable_gqa"), [((4, 1, 1), False), ((1, 4, 1), False), ((4, 4, 1), False), ((4, 2, 1), True)], ids=str
)
def test_heads_of_packed_sequences_broadcast(heads: tuple[int, int, int], enable_gqa: bool) -> None:
    """As sequences one by one, whose heads stand before their tokens."""
    q, k, v = (torch.randn(7, n, 8, dtype=torch.float64, requires_grad=True) for n in heads)
    edges = [0, 3, 7]
    cu = torch.tensor(edges, dtype=torch.int32)
    options = {"enable_gqa": enable_gqa, "is_causal": True}
    packed, lse = fastattn.varlen_attention(q, k, v, cu, cu, 4, 4, return_lse=True, **options)
    rows = [slice(*edges[i : i + 2]) for i in range(2)]
    one_by_one = [[x[part].transpose(0, 1) for x in (q, k, v)] for part in rows]
    out = torch.cat([F.scaled_dot_product_attention(*x, **options).transpose(0, 1) for x in one_by_one])
    torch.testing.assert_close(packed, out)
    assert lse.shape == (4, 7)
    dout = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(result, (q, k, v), dout) for result in (packed, out)), strict=True):
        torch.testing.assert_close(x, y)
