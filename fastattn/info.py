"""`python -m fastattn.info`: what is installed, which backend each device gets and why, and how to mend it.

`detect` looks at the machine, `gather` draws the conclusions (any machine can be described to it), `render` words them.
Exits with 0 when the CPU or every visible GPU has a working backend, with 1 when a GPU has none or only "torch".
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .backends import BACKENDS, Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM = 64  # of the call for which the backends are asked; every class of head_dim takes the same path
LAST_CUDA_12 = '"torch>=2.7.1,<2.15" --index-url https://download.pytorch.org/whl/cu126'

Capability = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One visible GPU."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class System:
    """What a machine has, as far as fastattn cares."""

    versions: dict[str, str | None]  # of python and the packages that matter; None: not installed
    platform: str
    compiler: str | None  # "g++ 12.2.0"
    driver: str | None  # "580.65.06"
    driver_cuda: Capability | None  # the newest CUDA version the driver runs
    torch_cuda: str | None  # the CUDA version torch is built with
    torch_archs: tuple[str, ...]  # "sm_80", "compute_90": what torch has kernels for
    gpus: tuple[Gpu, ...]
    torch_sees_gpus: bool


# ---- detect ----


def detect() -> System:
    """Looks at this machine."""
    visible = torch.cuda.is_available()
    driver, listed = _nvidia_smi()
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
    )


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
    """What libcuda says of itself, which needs no GPU and no context."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if libcuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _gpus_of_torch() -> tuple[Gpu, ...]:
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(p.name, (p.major, p.minor)) for p in properties)


def _nvidia_smi() -> tuple[str | None, tuple[Gpu, ...]]:
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
    return rows[0][0], tuple(Gpu(name, _pair(capability)) for _, capability, name in rows)


def _pair(version: str) -> Capability:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# ---- gather ----


def gather(system: System) -> dict[str, Any]:
    """The report on a machine, in types that JSON knows.

    Args:
        system: the machine; this one's is `detect()`.

    Returns:
        "ok"; "versions", "platform", "compiler", "driver", "driver_cuda", "torch_cuda", "torch_archs"; "devices": for
        the CPU or each GPU its "name", "capability", "torch_has_kernels", "works" and, by dtype, "backends" with the
        one chosen and "why_not" the preferred ones; "problems": each with its "problem" and a list of "fixes".
    """
    devices = [_device(system, gpu) for gpu in system.gpus or (None,)]
    return {
        "ok": all(device["works"] for device in devices),
        "versions": system.versions,
        "platform": system.platform,
        "compiler": system.compiler,
        "driver": system.driver,
        "driver_cuda": _dotted(system.driver_cuda),
        "torch_cuda": system.torch_cuda,
        "torch_archs": list(system.torch_archs),
        "devices": devices,
        "problems": _problems(system, devices),
    }


def _dotted(version: Capability | None) -> str | None:
    return None if version is None else "{}.{}".format(*version)


def _device(system: System, gpu: Gpu | None) -> dict[str, Any]:
    """The report on one GPU, or on the CPU."""
    device_type, capability = ("cpu", None) if gpu is None else ("cuda", gpu.capability)
    chosen = {}
    for dtype in DTYPES:
        problem = Problem(device_type, capability, dtype, HEAD_DIM, HEAD_DIM)
        refusals = {b.name: b.why_not(problem) for b in BACKENDS if not b.on_request_only}
        backend = next(name for name, reasons in refusals.items() if not reasons)
        why_not = {name: reasons for name, reasons in refusals.items() if reasons}
        chosen[str(dtype).removeprefix("torch.")] = {"backend": backend, "why_not": why_not}
    has_kernels = capability is None or (system.torch_sees_gpus and _has_kernels(system.torch_archs, capability))
    is_fused = any(choice["backend"] != "torch" for choice in chosen.values())
    return {
        "name": "CPU" if gpu is None else gpu.name,
        "capability": _dotted(capability),
        "torch_has_kernels": has_kernels,
        "works": has_kernels and (is_fused or capability is None),
        "backends": chosen,
    }


def _has_kernels(archs: tuple[str, ...], capability: Capability) -> bool:
    """Machine code (sm_XY) runs on the same major version from X.Y on, PTX (compute_XY) on everything from X.Y on."""
    for arch in archs:
        kind, _, number = arch.rstrip("af").partition("_")
        built = divmod(int(number), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


# ---- problems and their fixes ----


def _problems(system: System, devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    problems = []
    if system.gpus and not system.torch_sees_gpus:
        problems.append(_unseen(system))
    for device in devices:
        if system.torch_sees_gpus and not device["torch_has_kernels"]:
            text = "torch {} has no kernels for {} (sm_{}): it has {}".format(
                system.versions["torch"],
                device["name"],
                device["capability"].replace(".", ""),
                ", ".join(system.torch_archs),
            )
            problems.append({"problem": text, "fixes": _torch_fixes(system)})
        elif device["torch_has_kernels"] and not device["works"]:
            reasons = device["backends"]["float32"]["why_not"]
            text = "; ".join(f"{name} {', '.join(why)}" for name, why in reasons.items())
            problems.append({"problem": f"no fused backend for {device['name']}, only torch: {text}", "fixes": []})
    if system.compiler is None:
        text = "no C++ compiler: torch.compile needs one on the CPU, and fastattn's native code will"
        problems.append({"problem": text, "fixes": ["sudo apt-get install -y g++"]})
    return problems


def _unseen(system: System) -> dict[str, Any]:
    """The problem of GPUs that the driver lists and torch does not see."""
    torch_version, names = f"torch {system.versions['torch']}", ", ".join(gpu.name for gpu in system.gpus)
    if system.torch_cuda is None:
        text = f"{torch_version} is built without CUDA, so it cannot use {names}"
        return {"problem": text, "fixes": _torch_fixes(system)}
    # CUDA's minor versions run on each other's drivers, its major ones do not.
    if system.driver_cuda is not None and system.driver_cuda[0] < _pair(system.torch_cuda)[0]:
        supported = f"the driver {system.driver} runs CUDA up to {_dotted(system.driver_cuda)}"
        text = f"{supported}, but {torch_version} is built with CUDA {system.torch_cuda}"
        return {"problem": text, "fixes": _torch_fixes(system)}
    text = f"torch.cuda.is_available() is False, although nvidia-smi lists {names}"
    return {"problem": text, "fixes": ['python -c "import torch; torch.cuda.init()"  # says why']}


def _torch_fixes(system: System) -> list[str]:
    """What gives every GPU a torch with kernels for it; each one will do."""
    oldest, newest = min(gpu.capability for gpu in system.gpus), max(gpu.capability for gpu in system.gpus)
    install = "pip install --force-reinstall"  # or pip would keep another build of a version that is asked for
    if oldest < (7, 5):
        has_271 = _pair(system.versions["python"] or "") <= (3, 13)
        on_default_index = [f"{install} torch==2.7.1"] if has_271 else []
        return [f"{install} {LAST_CUDA_12}", *on_default_index]
    if system.driver_cuda is None or system.driver_cuda >= (13, 0):
        return [f"{install} torch"]
    if newest < (10, 0):
        return [f"{install} {LAST_CUDA_12}"]
    return ["update the NVIDIA driver to 580 or newer"]


# ---- render ----


def render(report: dict[str, Any]) -> str:
    """The report of `gather` as text for a terminal."""
    lines = [f"{name:<10}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += [
        f"{'system':<10}{report['platform']}",
        f"{'compiler':<10}{report['compiler'] or 'none'}",
        f"{'driver':<10}{report['driver'] or 'none'} (libcuda: {report['driver_cuda'] or 'not found'})",
        f"{'CUDA':<10}{report['torch_cuda'] or 'torch is built without'}"
        + (f", kernels for {', '.join(report['torch_archs'])}" if report["torch_archs"] else ""),
    ]
    for device in report["devices"]:
        lines += ["", *_device_lines(device)]
    lines += ["", "Problems / fix"]
    for problem in report["problems"]:
        lines.append(f"  - {problem['problem']}")
        lines += [f"      {'or' if i else '  '} {fix}" for i, fix in enumerate(problem["fixes"])]
    return "\n".join(lines if report["problems"] else [*lines, "  none"])


def _device_lines(device: dict[str, Any]) -> list[str]:
    title = device["name"]
    if device["capability"] is not None:
        title += f", compute capability {device['capability']}"
        if not device["torch_has_kernels"]:
            title += ", which torch cannot use"
    lines = [title, *(f"  {dtype:<10}{choice['backend']}" for dtype, choice in device["backends"].items())]
    refusals: dict[str, list[str]] = {}
    for dtype, choice in device["backends"].items():
        for name, reasons in choice["why_not"].items():
            refusals.setdefault(f"  not {name}: it {'; it '.join(reasons)}", []).append(dtype)
    for refusal, dtypes in refusals.items():
        lines.append(refusal if len(dtypes) == len(device["backends"]) else f"{refusal} ({', '.join(dtypes)})")
    return lines


def support_table() -> str:
    """What each backend takes, in order of preference, as the Markdown table of the README."""
    lines = ["| backend | device | dtypes | head_dim | in this version |", "|---|---|---|---|---|"]
    for backend in BACKENDS:
        name = f"`{backend.name}`" + (" (on request)" if backend.on_request_only else "")
        capability = _dotted(backend.min_capability)
        device = "any" if capability is None else f"CUDA, compute capability >= {capability}"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        head_dim = "any" if backend.max_head_dim is None else f"1 ... {backend.max_head_dim}"
        file = Path(__file__).parent.joinpath(*backend.module.split(".")[1:]).with_suffix(".py")
        lines.append(f"| {name} | {device} | {dtypes} | {head_dim} | {'yes' if file.exists() else 'no'} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report on this machine; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.info", description="What fastattn finds on this machine.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="print the report as JSON")
    kind.add_argument("--support", action="store_true", help="print what each backend takes, whatever this machine has")
    options = parser.parse_args(arguments)
    if options.support:
        print(support_table())
        return 0
    report = gather(detect())
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
