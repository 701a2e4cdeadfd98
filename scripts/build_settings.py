"""What the native build is told by the environment, and what there is to do it with."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The package's modules that import only the standard library, without its __init__, which imports torch.
_package = types.ModuleType("fastattn_without_torch")
_package.__path__ = [str(ROOT / "fastattn")]
sys.modules[_package.__name__] = _package
nvrtc = importlib.import_module(f"{_package.__name__}.cuda_kernels.nvrtc")
kernel_sources = importlib.import_module(f"{_package.__name__}.cuda_kernels.sources")
gpus = importlib.import_module(f"{_package.__name__}.cuda_kernels.gpus")
cpu_sources = importlib.import_module(f"{_package.__name__}.cpu_kernels.sources")
Arch = kernel_sources.Arch


@dataclass(frozen=True)
class Settings:
    """The environment's variables, checked."""

    is_wanted: bool | None  # None: if it can be done
    archs: tuple[Arch, ...]  # none named: those of the GPUs here, or of the prebuilt kernels
    prebuilt: Path | None
    compiler: str
    jobs: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """Reads and checks the variables; raises ValueError if one has a wrong value."""
        wanted, jobs = environment.get("FASTATTN_BUILD_CUDA", ""), environment.get("MAX_JOBS") or str(os.cpu_count())
        if wanted not in ("", "0", "1"):
            raise ValueError(f"FASTATTN_BUILD_CUDA: must be 0 or 1, got {wanted!r}")
        if not jobs.isdecimal() or int(jobs) < 1:
            raise ValueError(f"MAX_JOBS: must be a number of at least 1, got {jobs!r}")
        prebuilt = environment.get("FASTATTN_PREBUILT_KERNELS")
        return cls(
            is_wanted=None if wanted == "" else wanted == "1",
            archs=_archs(environment.get("FASTATTN_CUDA_ARCHS", "")),
            prebuilt=Path(prebuilt).absolute() if prebuilt else None,
            compiler=environment.get("CXX") or "c++",
            jobs=int(jobs),
        )

    def archs_of_this_machine(self, known: Iterable[int]) -> tuple[Arch, ...]:
        """Machine code for every GPU that is found here, PTX for those that the compiler does not know; without any GPU
        machine code for the P100.

        Args:
            known: the architectures of the compiler.
        """
        known, found = {*known}, gpus.capabilities()
        usable = [number for number in found if number >= kernel_sources.MIN_CAPABILITY]
        newest = max(arch.number for arch in kernel_sources.ALL_ARCHS if arch.kind == "compute")
        archs = [Arch("sm", number) if number in known else Arch("compute", newest) for number in usable]
        archs = list(dict.fromkeys(archs)) or [Arch("sm", kernel_sources.MIN_CAPABILITY)]
        named = ", ".join(f"{number // 10}.{number % 10}" for number in found) or "none"
        others = "any other gets its kernels from NVRTC at the first call; FASTATTN_CUDA_ARCHS=all builds them all"
        print(f"fastattn: GPUs here: {named}; building {', '.join(map(str, archs))}; {others}")
        return tuple(archs)


def _archs(text: str) -> tuple[Arch, ...]:
    if text.strip() == "all":
        return kernel_sources.ALL_ARCHS
    try:
        return tuple(dict.fromkeys(Arch.parse(arch.strip()) for arch in text.split(";") if arch))
    except ValueError as error:
        raise ValueError(f"FASTATTN_CUDA_ARCHS: all, or each of its parts {error}{supported()}") from None


def supported() -> str:
    """The architectures of the compiler found, as the end of an error message."""
    try:
        found = nvrtc.find()
    except nvrtc.NotFound:
        return ""
    numbers = [n for n in found.architectures if n >= kernel_sources.MIN_CAPABILITY]
    return f"; NVRTC {found.version} compiles for {', '.join(map(str, numbers))}"


def why_no_cpu(settings: Settings) -> str | None:
    """Why the CPU kernels are not built, nor anything else in C++, or None if everything needed is there."""
    if sys.platform != "linux":
        return f"the kernels are tested and built on Linux, and this is {platform.system()}"
    missing = []
    if shutil.which(shlex.split(settings.compiler)[0]) is None:
        missing.append(f"no C++ compiler ({settings.compiler})")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("no headers of Python (python3-dev)")
    missing += [f"no package {name}" for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]
    return "; ".join(missing) or None


def why_no_cuda(settings: Settings) -> str | None:
    """Why the CUDA kernels are not built, or None if everything needed is there."""
    if settings.is_wanted is False:
        return "FASTATTN_BUILD_CUDA=0"
    missing = why_no_cpu(settings)
    if settings.prebuilt is None and sys.platform == "linux":
        try:
            nvrtc.find()
        except nvrtc.NotFound as error:
            return f"{missing}; {error}" if missing else str(error)
    return missing
