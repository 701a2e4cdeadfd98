"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Beside a busy process two spinning threads run several times slower than one; tests run in parallel processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Triton reads it when it is imported: its kernels run in the interpreter where no GPU takes them.
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastattn.params import AttentionParams
from tests.support import clock, must_run
from tests.support.poison import fresh_memory_is_nan
from tests.support.stand_in import recording


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full product of cases instead of pairs")
    clock.add_option(parser)
    must_run.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    clock.start(config)
    must_run.start(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attention_case" in metafunc.fixturenames:
        from tests.support.cases import full, pairwise

        metafunc.parametrize("attention_case", full() if metafunc.config.getoption("full") else pairwise(), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Results that a backend is given to fill hold NaN before it does."""
    with fresh_memory_is_nan():
        yield


@pytest.fixture
def attended() -> Iterator[list[AttentionParams]]:
    """Every attention call made on tensors of the CPU during a test."""
    calls: list[AttentionParams] = []
    with recording(calls):
        yield calls
