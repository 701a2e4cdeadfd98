"""The CPU kernels of a folder of sources, built by g++ alone with any flags, in the place of fastattn._cpu.

with on_library(build("baseline", flags=SANITIZED)):
    fastattn.scaled_dot_product_attention(q, k, v)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from torch import Tensor

import fastattn
from fastattn import _launcher
from fastattn.cpu_kernels import attention
from fastattn.params import AttentionParams
from tests.simt.build import ROOT, cached, compiler, run, with_headers
from tests.support.poison import fresh_memory_is_nan

CSRC = ROOT / "csrc"
DRIVER = ROOT / "tests" / "cpu" / "driver.cpp"
CACHE = ROOT / "build" / "cpu"
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
COMMON = (
    *("-std=c++17", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
OPTIMIZED = ("-O2",)
# What one of them finds ends the process; null + offset is what an empty tensor's rows are.
SANITIZED = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=pointer-overflow",
)


def build(isa: str, flags: tuple[str, ...] = OPTIMIZED, csrc: Path = CSRC, cache: Path = CACHE) -> Path:
    """The library of csrc/cpu for one instruction set.

    Args:
        csrc: a folder with attention.h and cpu/.

    Raises:
        BuildError: no compiler, or it refuses the sources.
    """
    options = [*COMMON, *flags, *ISA_FLAGS[isa], f"-DFASTATTN_ISA={isa}", f"-I{csrc / 'cpu'}"]
    files = with_headers(csrc / "cpu" / "kernels.cpp") + with_headers(csrc / "cpu" / "work.h") + [DRIVER]

    def make(target: Path) -> None:
        run([compiler()[0], *options, "-shared", str(DRIVER), "-o", str(target), "-ldl", "-lpthread"])

    return cached(f"{isa}.so", files, [*COMMON, *flags, isa], make, cache)


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


@contextmanager
def on_library(library: Library) -> Iterator[None]:
    """Every attention call inside, in every thread, runs on the library; fresh memory holds NaN."""
    with mock.patch.object(attention, "_cpu", library), fresh_memory_is_nan(), fastattn.use_backend("cpu"):
        yield
