"""Kernels as PTX, compiled from CUDA C++ or given as text, in the form of the executor's Library.

    library = load_ptx("tests/simt/kernels/matmul.cu", arch="compute_60", checked=True)
    library.launch("matmul", grid=(4, 4), block=(16, 16), params=MatmulParams(...), buffers=[(a, "a", False), ...])

Each kernel becomes a shared library of its own when it is first launched: a test pays for what it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from fastattn.cuda_kernels import nvrtc
from fastattn.cuda_kernels.sources import MIN_CAPABILITY, OPTIONS
from tests.simt.build import ROOT, build_library, cached, with_headers
from tests.simt.executor import Buffer, Library
from tests.simt.ptx.parser import parse_module
from tests.simt.ptx.translate import translate

# Integers wrap around; multiplications and additions are joined only where the PTX says so. What a thread reads before
# it writes is a pattern, and not what another thread left there.
FLAGS = ("-O1", "-g1", "-fwrapv", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-w", "-fira-region=one")
TRANSLATOR = tuple(sorted(Path(__file__).parent.glob("*.py")))


class PtxLibrary:
    """The kernels of one PTX module."""

    def __init__(self, ptx: Path, name: str, checked: bool) -> None:
        self.ptx, self.name, self.checked = ptx, name, checked
        self._libraries: dict[str, Library] = {}

    @functools.cached_property
    def kernels(self) -> tuple[str, ...]:
        functions = parse_module(self.ptx.read_text(), self.name).functions.values()
        return tuple(function.name for function in functions if function.is_entry)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        params: bytes,
        *,
        dynamic_smem: int = 0,
        buffers: Sequence[Buffer] = (),
        schedule: str | int = "in-order",
    ) -> None:
        """Run one kernel; arguments and errors as of Library.launch().

        Raises:
            PtxError: the kernel contains PTX that the translator does not know.
        """
        if kernel not in self._libraries:
            self._libraries[kernel] = Library(self.build(kernel), self.checked)
        self._libraries[kernel].launch(
            kernel, grid, block, params, dynamic_smem=dynamic_smem, buffers=buffers, schedule=schedule
        )

    def build(self, kernel: str) -> Path:
        """The shared library of one kernel."""

        def make(target: Path) -> None:
            target.write_text(translate(parse_module(self.ptx.read_text(), self.name), kernel))

        source = cached(f"{kernel[:100]}.cpp", [self.ptx, *TRANSLATOR], [kernel, self.name], make)
        return build_library(source, (*FLAGS, *(("-DPTX_CHECKED",) if self.checked else ())))


@functools.cache
def compiler() -> nvrtc.Nvrtc:
    """The NVRTC that still compiles for the oldest GPU; nvrtc.NotFound if there is none."""
    return nvrtc.find(MIN_CAPABILITY)


def load_ptx(
    source: Path | str, *, arch: str = "compute_60", checked: bool = False, defines: tuple[str, ...] = ()
) -> PtxLibrary:
    """Compile a CUDA file (or look it up) to PTX, as the package's own are, with the lines of the source.

    Args:
        source: a CUDA file whose kernels are extern "C" and take one struct by value.
        arch: "compute_60" and later.
        checked: judge every memory access.
        defines: preprocessor definitions, such as ("TILE=16",).

    Raises:
        nvrtc.NotFound: there is no NVRTC.
        nvrtc.CompileError: it refuses the file.
    """
    source = Path(source).resolve()
    options = [*OPTIONS, "--generate-line-info", *(f"--define-macro={define}" for define in defines)]
    folders = (source.parent, ROOT / "csrc")

    def make(target: Path) -> None:
        text = source.read_text()
        compiled = compiler().compile(text, arch, name=str(source), include_dirs=folders, options=options)
        target.write_bytes(compiled.image)

    flags = [arch, compiler().version, str(source), *options]
    ptx = cached(f"{source.stem}.ptx", with_headers(source), flags, make)
    return PtxLibrary(ptx, source.with_suffix(".ptx").name, checked)


def load_ptx_text(text: str, *, name: str = "text.ptx", checked: bool = False) -> PtxLibrary:
    """The kernels of given PTX; where it holds no lines of a source, reports name those of the PTX itself."""
    ptx = cached(name, [], [text], lambda target: target.write_text(text))
    return PtxLibrary(ptx, name, checked)
