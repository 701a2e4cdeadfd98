"""The reference: keys that no query may see never matter; and which keys the tests take for unseen."""

from __future__ import annotations

import pytest
import torch

import fastattn
from tests.support.cases import UNSEEN_KEYS, Case, cumulative
from tests.support.contract import check_unseen_keys
from tests.support.unseen_keys import heads_with_nan, unseen_keys


@pytest.mark.parametrize("case", UNSEEN_KEYS, ids=str)
def test_unseen_keys(case: Case) -> None:
    with fastattn.use_backend("reference"):
        check_unseen_keys(case)


def test_a_key_that_no_row_of_a_mask_allows() -> None:
    """A mask that depends on the query may exclude a key for all of them, too."""
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    mask = torch.rand(2, 5, 5) > 0.3
    mask[0, :, 3] = False
    with fastattn.use_backend("reference"):
        expected = fastattn.scaled_dot_product_attention(q, k, v, mask)
        k[0, 0, 3], v[0, 0, 3] = torch.nan, torch.inf
        assert torch.equal(fastattn.scaled_dot_product_attention(q, k, v, mask), expected)


def test_a_key_matters_to_those_heads_alone_that_see_it() -> None:
    with fastattn.use_backend("reference"):
        assert heads_with_nan() == [True, False, True, True]


def test_what_the_tests_take_for_unseen() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 8).unbind()
    no_last = torch.tensor([True, True, True, False])
    dense = {"causal": {"is_causal": True}, "mask": {"attn_mask": no_last[None]}, "all": {}}
    counts = {name: unseen_keys((q[:, :, :2], k, v, None), given) for name, given in dense.items()}
    assert {name: x[0, 0].tolist() for name, x in counts.items()} == {
        "causal": [False, False, True, True],
        "mask": [False, False, False, True],
        "all": [False] * 4,
    }
    rows = torch.randn(6, 1, 8)
    packed = {"cu_seqlens_q": cumulative([1, 1]), "cu_seqlens_k": cumulative([3, 2])}
    packed |= {"max_seqlen_q": 1, "max_seqlen_k": 3, "is_causal": True, "causal_align": "top-left"}
    unseen = unseen_keys((rows[:2], rows, rows, None), packed)
    assert unseen[:, 0].tolist() == [False, True, True, False, True, True]
