"""The CUDA kernels that multiply by tensor cores, executed on the CPU from the PTX of every generation with some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn.cuda_kernels.sources import Arch, unit
from tests.simt.attention import PtxKernels, on_the_cpu
from tests.simt.executor import SCHEDULES
from tests.support.cases import SEVERAL_TILES, WITHIN_ONE_TILE, Case, full, pairwise
from tests.support.contract import call, check, run

attention = pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built")
# A generation's instruction for an element type, and the PTX that has it.
QUICK = [("compute_70", torch.float16), ("compute_75", torch.float16), ("compute_80", torch.bfloat16)]
GENERATIONS = [*QUICK, ("compute_80", torch.float16)]


def rows(cases: list[Case], is_own: bool = False) -> list[Any]:
    """(arch, case) for every generation, in its element type; with is_own only cases that are of it already."""
    return [
        pytest.param(arch, replace(case, dtype=dtype), marks=() if (arch, dtype) in QUICK else pytest.mark.slow)
        for arch, dtype in GENERATIONS
        for case in cases
        if case.dtype == dtype or not is_own
    ]


VARIED = Case(
    **{"mask": "padding", "bias": "per-head", "band": "window", "dropout_p": 0.3, "heads": (4, 2)},
    **{"softcap": 3.0, "used": True, "seqlens": (70, 75)},
)
# Every tile with several of its kind, ragged, behind each other or not; lines that cannot be copied 16 bytes at a time.
NARROW = [
    Case(dims=(32, 32), seqlens=(40, 75), packed=True, mask="random", layout="odd-rows"),
    Case(dims=(24, 32), seqlens=(128, 130), heads=(4, 2), bias="full", mask="padding"),
    Case(dims=(64, 64), seqlens=(82, 90), packed=True, dropout_p=0.3, used=True),
    Case(dims=(64, 40), seqlens=(130, 190), heads=(1, 1), band="causal-bottom-right", batch=1),
    Case(dims=(33, 64), seqlens=(64, 31), layout="strided", softcap=3.0),
]
WIDE = [
    Case(dims=(128, 100), seqlens=(70, 75), heads=(1, 1), sinks=True, mask="empty-rows"),
    Case(dims=(200, 256), seqlens=(50, 40), heads=(1, 1), band="wide-window", batch=1),
]


class Noted(PtxKernels):
    """The kernels of some PTX, and which of them ran."""

    def library(self, kernel: str, element: str) -> object:
        names.append(kernel)
        return super().library(kernel, element)


names: list[str] = []


@contextmanager
def on(arch: str, schedule: str | int = "in-order", checked: bool = False) -> Iterator[None]:
    """Inside, the kernels of this PTX run on the CPU; at least one of them by tensor cores."""
    names.clear()
    with on_the_cpu(Noted(arch, checked), schedule=schedule):
        yield
    assert any("_mma_" in name for name in names), names


def forward(case: Case, arch: str, checked: bool = False) -> None:
    with on(arch, checked=checked):
        check(case, gradients=False)


@pytest.mark.parametrize(("arch", "case"), [*rows(NARROW), *rows(WIDE)[: len(WIDE)]], ids=str)
def test_every_tile(case: Case, arch: str, poisoned: None) -> None:
    forward(case, arch)


PAIRS = [case for case in pairwise() if 0 not in case.seqlens and max(case.dims) <= 64]


@pytest.mark.parametrize(("arch", "case"), rows(PAIRS, is_own=True), ids=str)
def test_contract_forward(case: Case, arch: str, poisoned: None) -> None:
    forward(case, arch)


ALL = [
    case
    for case in [*NARROW, *WIDE, *pairwise(), *WITHIN_ONE_TILE, *SEVERAL_TILES, *full()[::200]]
    if 0 not in case.seqlens
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), rows(ALL), ids=str)
def test_contract_with_gradients(case: Case, arch: str, poisoned: None) -> None:
    with on(arch):
        check(case)


@pytest.mark.parametrize(("arch", "case"), rows([VARIED, replace(VARIED, packed=True)]), ids=str)
def test_every_access_is_judged(case: Case, arch: str, poisoned: None) -> None:
    forward(case, arch, checked=True)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), rows([*NARROW, *WIDE]), ids=str)
def test_every_access_of_every_tile_is_judged(case: Case, arch: str, poisoned: None) -> None:
    forward(case, arch, checked=True)


@pytest.mark.parametrize(("arch", "case"), rows([VARIED]), ids=str)
def test_order_of_threads_does_not_matter(case: Case, arch: str) -> None:
    results = []
    for schedule in SCHEDULES:
        with on(arch, schedule):
            results.append(run(call, case, case.dtype, gradients=False))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


def test_which_image_multiplies_by_what() -> None:
    multiplied = {
        arch: [unit(element, Arch.parse(arch)) for element in ("float32", "float16", "bfloat16")]
        for arch in ("sm_60", "compute_60", "sm_70", "sm_75", "sm_80", "sm_90", "compute_90", "sm_120")
    }
    old, new = [None, None, None], [None, "Mma16x8x16", "Mma16x8x16"]
    assert multiplied == {
        **dict.fromkeys(("sm_60", "compute_60"), old),
        "sm_70": [None, "Mma8x8x4", None],
        "sm_75": [None, "Mma16x8x8", None],
        **dict.fromkeys(("sm_80", "sm_90", "compute_90", "sm_120"), new),
    }
