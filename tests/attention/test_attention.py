"""Every backend against the float64 oracle, on the table of cases."""

from __future__ import annotations

import pytest
import torch

import fastattn
from tests.support.cases import Case
from tests.support.contract import check

BACKENDS = ("torch", "reference")


@pytest.mark.parametrize("backend", ["torch", pytest.param("reference", marks=pytest.mark.long)])
def test_forward_and_gradients(backend: str, attention_case: Case, poisoned: None) -> None:
    with fastattn.use_backend(backend):
        check(attention_case)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients_on_a_gpu(backend: str, attention_case: Case, poisoned: None) -> None:
    with fastattn.use_backend(backend):
        check(attention_case, "cuda")


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows(backend: str, packed: bool) -> None:
    case = Case(seqlens=(1000, 1000), band="causal", mask="padding", packed=packed, batch=2, heads=(2, 1))
    with fastattn.use_backend(backend):
        check(case)


def test_the_table_meets_every_pair_and_crosses_every_flag() -> None:
    from tests.support.cases import AXES, CROSSED, full, pairwise

    pairs = pairwise()
    for first in AXES:
        for second in AXES:
            if first != second:
                met = {(getattr(c, first), getattr(c, second)) for c in pairs}
                assert len(met) == len(AXES[first]) * len(AXES[second]), (first, second)
    expected = 1
    for name in CROSSED:
        expected *= len(AXES[name])
    assert len({tuple(getattr(c, name) for name in CROSSED) for c in full()}) == expected
    assert len({str(c) for c in pairs}) == len(pairs)
    assert torch.float32 in {c.dtype for c in pairs}
