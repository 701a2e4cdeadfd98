"""nvdisasm, NVIDIA's disassembler, and cuobjdump: those that FASTATTN_NVDISASM names, else copies of 12.8 in the cache.

The variable names nvdisasm; cuobjdump, which only takes machine code out of libraries, lies beside it.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from fastattn.cuda_kernels.images import cache_dir

from .wheels import NotFound, download

__all__ = ["NotFound", "cuobjdump", "path"]

# The wheel of this version contains nvdisasm 12.8; what comes with CUDA 13 no longer reads code for sm_60.
WHEEL, PYTHON, PLATFORM = "triton==3.3.1", "3.11", "manylinux_2_27_x86_64"
MEMBER = "triton/backends/nvidia/bin/nvdisasm"


def path() -> Path:
    """The disassembler; it is downloaded at the first call on a machine, with pip.

    Raises:
        NotFound: it cannot be downloaded, or this is no Linux on x86-64.
        ValueError: FASTATTN_NVDISASM names no file.
    """
    return _program("nvdisasm")


def cuobjdump() -> Path:
    """The program that extracts cubins; where it comes from and what it raises is as for `path`."""
    return _program("cuobjdump")


def _program(name: str) -> Path:
    if named := os.environ.get("FASTATTN_NVDISASM"):
        program = Path(named) if name == "nvdisasm" else Path(named).with_name(name)
        if not program.is_file():
            raise ValueError(f"FASTATTN_NVDISASM: must be a file{_beside(name)}, got {named!r}")
        return program
    cached = cache_dir() / f"{name}-12.8"
    if not cached.is_file():
        _extract(MEMBER.replace("nvdisasm", name), cached)
    return cached


def _beside(name: str) -> str:
    return "" if name == "nvdisasm" else f" with {name} beside it"


def _extract(member: str, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        try:
            file = download(WHEEL, PYTHON, PLATFORM, Path(folder))
        except NotFound as error:
            raise NotFound(f"nvdisasm: set FASTATTN_NVDISASM, or make this possible: {error}") from error
        with zipfile.ZipFile(file) as wheel:
            program = Path(wheel.extract(member, folder))
        program.chmod(0o755)
        os.replace(program, to)  # as a whole, so that two processes may do the same
