"""The launcher on a libcuda that notes what it is called with."""

from __future__ import annotations

import ctypes

import pytest

from tests.support.attention_struct import Struct
from tests.support.stub_cuda import load


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """(launcher, stub), as a new process has them."""
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
