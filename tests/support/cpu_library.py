"""The CPU kernels of a folder of sources, built by g++ alone with any flags, in the place of fastattn._cpu.

with on_library(build("baseline", flags=SANITIZED)):
    fastattn.scaled_dot_product_attention(q, k, v)
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor

import fastattn
from fastattn import _launcher
from fastattn.cpu_kernels.sources import kernel_options
from fastattn.params import AttentionParams
from tests.simt.build import ROOT, cached, compiler, run, with_headers
from tests.support.cpu_runs import NOT_BUILT
from tests.support.poison import fresh_memory_is_nan

attention = pytest.importorskip("fastattn.cpu_kernels.attention", reason=NOT_BUILT)
CSRC = ROOT / "csrc"
DRIVER = ROOT / "tests" / "cpu" / "driver.cpp"
STANDALONE = DRIVER.with_name("standalone.cpp")
CACHE = ROOT / "build" / "cpu"
OPTIMIZED = ("-O2",)
# What one of them finds ends the process. Not an offset to null, where the rows of an empty tensor are.
SANITIZED = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=pointer-overflow",
)
RACES = ("-O1", "-g", "-fsanitize=thread")


def build(isa: str, flags: tuple[str, ...] = OPTIMIZED, csrc: Path = CSRC, cache: Path = CACHE) -> Path:
    """The library of csrc/cpu for one instruction set.

    Args:
        csrc: a folder with attention.h and cpu/.

    Raises:
        BuildError: no compiler, or it refuses the sources.
    """
    return _linked(DRIVER, f"{isa}.so", isa, ("-shared", *flags), csrc, cache, compiler()[0])


def build_standalone(
    isa: str, flags: tuple[str, ...] = OPTIMIZED, csrc: Path = CSRC, cache: Path = CACHE, cxx: str | None = None
) -> Path:
    """The program that compares the kernels with a plain computation; cxx: another compiler, for another machine."""
    return _linked(STANDALONE, isa, isa, flags, csrc, cache, cxx or compiler()[0])


def _linked(source: Path, name: str, isa: str, flags: tuple[str, ...], csrc: Path, cache: Path, cxx: str) -> Path:
    options = [*kernel_options(isa, "x86_64"), "-fno-gnu-unique", *flags]
    headers = [file for name in ("kernels.cpp", "work.h") for file in with_headers(csrc / "cpu" / name)]

    def make(target: Path) -> None:
        run([cxx, *options, f"-I{csrc / 'cpu'}", str(source), "-o", str(target), "-ldl", "-lpthread"])

    return cached(name, [*headers, DRIVER, source], [cxx, *options], make, cache)


class Library:
    """The functions of fastattn._cpu that run kernels, by a library that `build` made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loaded = ctypes.CDLL(str(path))

    def use_pool(self) -> None:
        self.loaded.fastattn_use_pool()

    def attention_fwd(
        self, isa: str, element: str, threads: int, p: AttentionParams, buffers: tuple[Tensor | None, ...]
    ) -> None:
        self._run(False, element, threads, p, buffers)

    def attention_bwd(
        self, isa: str, element: str, threads: int, p: AttentionParams, buffers: tuple[Tensor | None, ...]
    ) -> None:
        self._run(True, element, threads, p, buffers)

    def _run(
        self, is_backward: bool, element: str, threads: int, p: AttentionParams, buffers: tuple[Tensor | None, ...]
    ) -> None:
        packed = _launcher.pack(element, p, buffers)
        self.loaded.fastattn_run(packed, int(is_backward), _launcher.ELEMENTS.index(element), threads)


def changed(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc in the folder, in one file of which a text is replaced."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC / "cpu", csrc / "cpu")
    shutil.copy(CSRC / "attention.h", csrc)
    path = csrc / "cpu" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return csrc


@contextmanager
def on_library(library: Library) -> Iterator[None]:
    """Every attention call inside, in every thread, runs on the library; fresh memory holds NaN."""
    with mock.patch.object(attention, "_cpu", library), fresh_memory_is_nan(), fastattn.use_backend("cpu"):
        yield
