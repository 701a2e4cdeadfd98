"""The CUDA kernels against the float64 oracle, executed on the CPU."""

from __future__ import annotations

import pytest

from cases import Case
from contract import check
from simt.attention import SourceKernels, on_the_cpu

MANY = 1000  # multiprocessors: more than there are blocks, so that the backward splits up


@pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["whole", "split"])
def test_contract(attention_case: Case, multiprocessors: int, poisoned: None) -> None:
    with on_the_cpu(SourceKernels(), multiprocessors=multiprocessors):
        check(attention_case)


@pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["whole", "split"])
def test_contract_with_every_access_checked(attention_case: Case, multiprocessors: int, poisoned: None) -> None:
    with on_the_cpu(SourceKernels(checked=True), multiprocessors=multiprocessors):
        check(attention_case)
