"""Options and fixtures that all tests share."""

from __future__ import annotations

import ctypes
import os

# Beside a busy process two spinning threads run several times slower than one; tests run in parallel processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch import Tensor

# Triton reads it when it is imported: its kernels run in the interpreter where no GPU takes them.
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastattn import autograd, functional
from fastattn.params import AttentionParams


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full product of cases instead of pairs")


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
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that a backend is given to fill hold NaN before it does."""

    def poison(allocate):
        def allocate_poisoned(*args: object) -> tuple[Tensor, ...]:
            return tuple(x.fill_(torch.nan) for x in allocate(*args))

        return allocate_poisoned

    monkeypatch.setattr(autograd, "_empty_results", poison(autograd._empty_results))
    monkeypatch.setattr(autograd, "_empty_grads", poison(autograd._empty_grads))


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[AttentionParams]:
    """The parameters of every attention call made during a test."""
    calls, attend = [], functional.attend

    def record(params, *args):
        calls.append(params)
        return attend(params, *args)

    monkeypatch.setattr(functional, "attend", record)
    return calls


# ---- the launcher on a libcuda that notes what it is called with ----


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """(launcher, stub), as a new process has them."""
    from tests.support.attention_struct import Struct
    from tests.support.stub_cuda import load

    launcher, stub = load(tmp_path, monkeypatch)
    stub.library.stub_set_params_bytes(ctypes.sizeof(Struct))
    return launcher, stub


@pytest.fixture
def launcher(loaded):
    from tests.support.launcher_calls import image

    launcher, _ = loaded
    launcher.set_image_source(image)
    return launcher


@pytest.fixture
def stub(loaded):
    return loaded[1]
