"""A description of the machine, as far as fastattn depends on it: facts, no conclusions."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .cuda_kernels import images, nvrtc

Capability = tuple[int, int]


@dataclass(frozen=True)
class VisibleGpu:
    """One visible GPU."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class CpuKernels:
    """The CPU kernels of an installation, as they are in this process."""

    isas: tuple[str, ...]  # "avx512", "avx2", "baseline": the instruction sets that can run here, the best first
    isa: str | None  # the one that runs
    threads: str | None  # what gives them: "OpenMP" or "pool"
    reason: str | None  # why none runs


@dataclass(frozen=True)
class System:
    """One machine: its software, its visible GPUs and the state of fastattn's installation."""

    versions: dict[str, str | None]  # of python and the packages that matter; None: not installed
    platform: str
    compiler: str | None  # "g++ 12.2.0"
    driver: str | None  # "580.65.06"
    driver_cuda: Capability | None  # the newest CUDA version the driver runs
    torch_cuda: str | None  # the CUDA version torch is built with
    torch_archs: tuple[str, ...]  # such as "sm_80", "compute_90": those torch has kernels for
    gpus: tuple[VisibleGpu, ...]
    torch_sees_gpus: bool
    kernels: images.Installed
    kernels_problem: str | None  # why the compiled kernels cannot be used although there are some
    launcher_problem: str | None  # why the kernels' launcher cannot be imported
    nvrtc: str | None  # "12.9 (its file)": the compiler for run time
    nvrtc_problem: str | None  # why there is none
    cache_dir: str  # of kernels compiled at run time
    cpu_kernels: CpuKernels
    is_a_copy: bool  # of the sources, without anything that an installation makes
    hidden: str | None  # the folder of the installed fastattn that such a copy hides


def detect(installation: images.Installation = images.HERE) -> System:
    """Looks at this machine.

    Args:
        installation: where its kernels are.
    """
    visible = torch.cuda.is_available()
    driver, listed = _nvidia_smi()
    kernels, (compiler, nvrtc_problem) = installation.installed(), _nvrtc(installation)
    return System(
        versions={name: _version(name) for name in ("python", "fastattn", "torch", "triton", "numpy")},
        platform=platform.platform(),
        compiler=_compiler(),
        driver=driver,
        driver_cuda=_driver_cuda(),
        torch_cuda=torch.version.cuda,
        torch_archs=tuple(torch.cuda.get_arch_list()),
        gpus=_gpus_of_torch() if visible else listed,
        torch_sees_gpus=visible,
        kernels=kernels,
        kernels_problem=_kernels_problem(installation, kernels),
        launcher_problem=_launcher_problem(),
        nvrtc=compiler,
        nvrtc_problem=nvrtc_problem,
        cache_dir=str(images.cache_dir()),
        cpu_kernels=_cpu_kernels(installation),
        is_a_copy=not (installation.kernels / "build.json").is_file(),
        hidden=_installed_elsewhere(installation.kernels.parent),
    )


def _installed_elsewhere(package: Path) -> str | None:
    """The folder of an installed fastattn that is not the package in this one."""
    try:
        found = Path(str(importlib.metadata.distribution("fastattn").locate_file("fastattn")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return str(found) if found.is_dir() and found.resolve() != package.resolve() else None


def _version(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    if package == "torch":
        return str(torch.__version__)  # unlike the metadata, it names the build: 2.13.0+cpu
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        return None
    found = subprocess.run([name, "-dumpfullversion"], capture_output=True, text=True)
    return f"{name} {found.stdout.strip()}"


def _driver_cuda() -> Capability | None:
    """The CUDA version of libcuda, which is asked without a GPU or a context."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if libcuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _gpus_of_torch() -> tuple[VisibleGpu, ...]:
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(VisibleGpu(p.name, (p.major, p.minor)) for p in properties)


def _nvidia_smi() -> tuple[str | None, tuple[VisibleGpu, ...]]:
    """The driver's version, and the GPUs of the machine unless they are hidden: torch may be unable to see them."""
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None, ()
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        return None, ()
    rows = [line.split(", ", maxsplit=2) for line in answer.stdout.splitlines()]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return rows[0][0], ()
    return rows[0][0], tuple(VisibleGpu(name, pair(capability)) for _, capability, name in rows)


def _kernels_problem(installation: images.Installation, kernels: images.Installed) -> str | None:
    try:
        if kernels.archs:
            installation.check_current(kernels)
    except (images.ImageError, FileNotFoundError) as error:
        return str(error)
    return None


def _launcher_problem() -> str | None:
    try:
        importlib.import_module("._launcher", __package__)
    except ImportError as error:
        return str(error)
    return None


def _cpu_kernels(installation: images.Installation) -> CpuKernels:
    try:
        module = importlib.import_module("._cpu", __package__)
    except ImportError as error:
        manifest = installation.manifest()
        return CpuKernels((), None, None, manifest.get("cpu", manifest).get("reason") or str(error))
    try:
        isa = importlib.import_module(".cpu_kernels.attention", __package__).isa()
    except ValueError as error:  # FASTATTN_CPU_ISA names none of them
        return CpuKernels(module.ISAS, None, None, str(error))
    return CpuKernels(module.ISAS, isa, module.threading(), None)


def _nvrtc(installation: images.Installation) -> tuple[str | None, str | None]:
    """The compiler for run time, or why there is none."""
    try:
        found = installation.find(None)
    except (nvrtc.NotFound, ValueError) as error:
        return None, str(error)
    return f"{found.version} ({found.library})", None


def pair(version: str) -> Capability:
    """The first two parts of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
