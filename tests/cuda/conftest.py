"""The launcher on a libcuda that notes what it is called with; installations of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import pytest

from fastattn.cuda_kernels import nvrtc
from fastattn.cuda_kernels.images import Installation
from tests.support.attention_struct import Struct
from tests.support.installation import Recorder, describe
from tests.support.native_build import Tree
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


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Tree:
    """A tree, built once for all tests; only to be read and copied."""
    tree = Tree(tmp_path_factory.mktemp("finished") / "tree")
    tree.said = tree.build()
    return tree


@pytest.fixture
def tree(finished, tmp_path) -> Tree:
    """A tree to change: a copy of the finished one."""
    return finished.copy(tmp_path / "tree")


# ---- installations of the kernels ----


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> None:
    """An environment without variables of the user's, and a cache of the test's own."""
    for name in ("FASTATTN_CUDA_IMAGE", "FASTATTN_NVRTC_LIB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def install(tmp_path) -> Callable[..., Installation]:
    """`describe` in a folder of the test."""
    return partial(describe, tmp_path)


@pytest.fixture
def compiler() -> Recorder:
    try:
        found = nvrtc.find(60)
    except nvrtc.NotFound as error:
        pytest.skip(str(error))
    return Recorder(found.library, found.include)
