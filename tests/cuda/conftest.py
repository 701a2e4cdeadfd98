"""The launcher on a libcuda that notes what it is called with, and trees in which the native build has run."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from tests.support.attention_struct import Struct
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
    shutil.copytree(finished.folder, tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    copy = Tree.__new__(Tree)
    copy.folder, copy.package = tmp_path / "tree", tmp_path / "tree" / "fastattn"
    return copy
