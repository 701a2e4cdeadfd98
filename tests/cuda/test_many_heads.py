"""More heads than a grid has blocks for: they are taken in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastattn.arguments import attention_params
from tests.simt.attention import SourceKernels, on_the_cpu
from tests.support.cases import Case
from tests.support.contract import check

launches = pytest.importorskip("benchmarks.p100.launches")
MODES = pytest.mark.parametrize("multiprocessors", [1, 1000], ids=["whole", "split"])
HEADS = Case(heads=(6, 3), seqlens=(20, 40), dims=(8, 8), mask="random", bias="full", dropout_p=0.3, batch=2)


@MODES
@pytest.mark.parametrize("packed", [False, True])
def test_several_heads_for_each_block(multiprocessors: int, packed: bool) -> None:
    """Two blocks for six query heads and for three key heads, each of two sequences."""
    with on_the_cpu(SourceKernels(), multiprocessors=multiprocessors, max_grid_y=2, max_grid_z=1):
        check(replace(HEADS, packed=packed))


def test_no_more_blocks_for_heads_than_a_grid_has() -> None:
    q, kv = torch.randn(1, 140000, 1, 1), torch.randn(1, 70000, 33, 1)
    p = attention_params(q, kv, kv, enable_gqa=True)
    recorded = launches.record(p, backward=False) + launches.record(p, backward=True)
    recorded += launches.record(p, backward=True, multiprocessors=10**6)
    assert [launch.grid[1] for launch in recorded] == [65535] * 4


@pytest.mark.slow
def test_more_heads_than_a_grid_has() -> None:
    """The highest head's dropout and gradients are right, too."""
    with on_the_cpu(SourceKernels()):
        check(Case(heads=(70000, 70000), seqlens=(1, 2), dims=(8, 8), dropout_p=0.3, batch=1))
