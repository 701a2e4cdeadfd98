"""nvdisasm, NVIDIA's disassembler: the one that FASTATTN_NVDISASM names, else a copy of 12.8 in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastattn.cuda_kernels.images import cache_dir

# The wheel of this version contains nvdisasm 12.8; what comes with CUDA 13 no longer reads code for sm_60.
WHEEL = "triton==3.3.1"
MEMBER = "triton/backends/nvidia/bin/nvdisasm"
_CACHED = "nvdisasm-12.8"


class NotFound(RuntimeError):
    """The error that there is no nvdisasm and none can be downloaded; the message says how to name one."""


def path() -> Path:
    """The program; it is downloaded at the first call on a machine, with pip.

    Raises:
        NotFound: it cannot be downloaded, or this is no Linux on x86-64.
        ValueError: FASTATTN_NVDISASM names no file.
    """
    if named := os.environ.get("FASTATTN_NVDISASM"):
        if not Path(named).is_file():
            raise ValueError(f"FASTATTN_NVDISASM: must be a file, got {named!r}")
        return Path(named)
    cached = cache_dir() / _CACHED
    if not cached.is_file():
        _download(cached)
    return cached


def _download(to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        platform = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_27_x86_64"]
        found = subprocess.run([*pip, *platform, "--dest", folder, WHEEL], capture_output=True, text=True)
        wheels = [*Path(folder).glob("*.whl")]
        if found.returncode != 0 or not wheels:
            raise NotFound(
                f"nvdisasm: set FASTATTN_NVDISASM, or make `pip download {WHEEL}` work: {found.stderr.strip()}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            program = Path(wheel.extract(MEMBER, folder))
        program.chmod(0o755)
        os.replace(program, to)  # as a whole, so that two processes may do the same
