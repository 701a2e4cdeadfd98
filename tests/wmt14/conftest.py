"""Fixtures of the tests that prepare text."""

from __future__ import annotations

import pytest

from tests.support.wmt14_text import write_text


@pytest.fixture
def files(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"
