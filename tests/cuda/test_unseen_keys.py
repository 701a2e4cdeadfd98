"""The CUDA kernels: keys that no query may see never matter, whatever k and v hold there."""

from __future__ import annotations

import pytest

from tests.simt.attention import SourceKernels, on_the_cpu
from tests.support.cases import UNSEEN_KEYS, Case
from tests.support.contract import check_unseen_keys
from tests.support.unseen_keys import heads_with_nan

MODES = pytest.mark.parametrize("multiprocessors", [1, 1000], ids=["whole", "split"])


@MODES
@pytest.mark.parametrize("case", UNSEEN_KEYS, ids=str)
def test_unseen_keys(case: Case, multiprocessors: int) -> None:
    with on_the_cpu(SourceKernels(), multiprocessors=multiprocessors):
        check_unseen_keys(case)


def test_a_key_matters_to_those_heads_alone_that_see_it() -> None:
    with on_the_cpu(SourceKernels()):
        assert heads_with_nan() == [True, False, True, True]


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("case", UNSEEN_KEYS, ids=str)
def test_unseen_keys_with_every_access_judged(case: Case, multiprocessors: int) -> None:
    with on_the_cpu(SourceKernels(checked=True), multiprocessors=multiprocessors):
        check_unseen_keys(case)
