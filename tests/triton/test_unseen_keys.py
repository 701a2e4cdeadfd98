"""The Triton kernels: keys that no query may see never matter, whatever k and v hold there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.support.cases import UNSEEN_KEYS, Case
from tests.support.contract import check_unseen_keys
from tests.support.triton_attention import DEVICE, on_triton
from tests.support.unseen_keys import heads_with_nan

pytestmark = [pytest.mark.triton] if DEVICE == "cpu" else [pytest.mark.triton, pytest.mark.gpu]


def is_small(case: Case) -> bool:
    return case.heads[0] <= 2 and case.dtype == torch.float32


# Keys behind those that there are; and slopes of a softcap, to which the scores of unseen keys do the same as values.
MORE = [
    Case(seqlens=(40, 50), heads=(2, 1), used=True, bias="per-key"),
    Case(seqlens=(40, 50), heads=(2, 1), used=True, softcap=3.0, band="window-bottom-right", packed=True),
    Case(seqlens=(17, 63), softcap=3.0, band="causal", mask="padding"),
    Case(seqlens=(40, 90), dims=(64, 64), dtype=torch.float16, used=True, softcap=3.0, mask="padding"),
]


@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=() if is_small(x) else pytest.mark.slow) for x in UNSEEN_KEYS + MORE],
    ids=str,
)
def test_unseen_keys(case: Case, in_one: bool) -> None:
    with on_triton(None if in_one else 32, None if in_one else 32, in_one=in_one):
        check_unseen_keys(case, DEVICE)


def test_a_key_matters_to_those_heads_alone_that_see_it() -> None:
    with on_triton():
        assert heads_with_nan(DEVICE) == [True, False, True, True]
