"""Compiles stub_cuda.cpp, a libcuda without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks import shared_library

SOURCE = Path(__file__).with_suffix(".cpp")


def build(library: Path, defines: Iterable[str] = ()) -> None:
    """Compiles the stub into that file.

    Args:
        library: the file to write.
        defines: further flags; `-DcuInit=renamed` makes a library that lacks cuInit.

    Raises:
        BuildError: it cannot be compiled.
    """
    shared_library.build(SOURCE, library, defines)
