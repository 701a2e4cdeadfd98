"""The CPU kernels give the same bits in any number of threads, whoever gives the threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastattn import _cpu
from tests.support.cases import Case
from tests.support.contract import call, run
from tests.support.cpu_runs import assert_same_bits, in_threads, on_cpu

HALF = Case(dtype=torch.float16, seqlens=(150, 200), dims=(40, 24), heads=(4, 2), dropout_p=0.3, bias="full")
# The backward pass is split up into blocks of keys and chunks of queries where heads are fewer than threads.
FEW_HEADS = Case(seqlens=(500, 600), dims=(16, 24), heads=(1, 1), batch=1, dropout_p=0.3, band="causal-bottom-right")
CASES = [
    HALF,
    replace(HALF, dtype=torch.bfloat16, packed=True, mask="random", bias="none"),
    replace(HALF, dtype=torch.float32, bias="per-head", band="causal", heads=(2, 2)),
    replace(HALF, dtype=torch.float32, bias="per-key", packed=True),
    replace(HALF, seqlens=(4, 1000), bias="per-key", batch=4),
    FEW_HEADS,
    replace(FEW_HEADS, heads=(4, 2), dtype=torch.float16, mask="padding"),
    replace(FEW_HEADS, heads=(2, 1), dtype=torch.bfloat16, mask="random", band="window", packed=True, batch=2),
    replace(FEW_HEADS, bias="full", mask="empty-rows"),
    replace(FEW_HEADS, seqlens=(241, 20), band="none"),
    replace(FEW_HEADS, seqlens=(20, 2000), heads=(3, 1), layout="expanded"),
]


@pytest.fixture(params=["OpenMP", "pool"])
def threading(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads of either kind."""
    _cpu.use_pool(request.param == "pool")
    assert _cpu.threading() == request.param
    try:
        yield
    finally:
        _cpu.use_pool(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case: Case, threading: None) -> None:
    found = []
    with on_cpu():
        for count in (1, 2, 3, 7):
            with in_threads(count):
                found.append(run(call, case, case.dtype))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_any_number_of_threads_on_other_instruction_sets(isa: str, threading: None) -> None:
    if isa not in _cpu.ISAS:
        pytest.skip(f"this CPU has no {isa}")
    for case in (HALF, FEW_HEADS):
        with on_cpu(isa), in_threads(1):
            expected = run(call, case, case.dtype)
        with on_cpu(isa), in_threads(5):
            assert_same_bits(run(call, case, case.dtype), expected)
