"""`python -m fastattn.info`: what is installed, which backend each device gets and why, and how to mend it.

`detect` looks at the machine, `gather` draws the conclusions (any machine can be described to it), `render` words them.
Exits with 0 when the CPU or every visible GPU has a working backend, with 1 when a GPU has none or only "torch".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from . import backends, contests
from .backends import CallTraits
from .cuda_kernels import images
from .cuda_kernels.sources import Arch
from .machine import Capability, CpuKernels, System, VisibleGpu, detect, pair

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM = 64  # of the call for which the backends are asked; every class of head_dim takes the same path
LAST_CUDA_12 = '"torch>=2.7.1,<2.15" --index-url https://download.pytorch.org/whl/cu126'

# ---- gather ----


def gather(system: System) -> dict[str, Any]:
    """The report on a machine, in types that JSON knows.

    Args:
        system: the machine; this one's is `detect()`.

    Returns:
        "ok"; "versions", "platform", "compiler", "driver", "driver_cuda", "torch_cuda", "torch_archs"; "kernels": those
        compiled, with their "architectures", "nvrtc", "sources", "commit" and the "reason" if there are none;
        "launcher_problem", "nvrtc", "nvrtc_problem", "cache_dir"; "cpu_kernels": their "isas", the "isa" that runs, the
        source of "threads" and the "reason" if none runs; "devices": for the CPU or each GPU its "name", "capability",
        "torch_has_kernels", "image", "works" and, by dtype, "backends" with the one chosen, "why_not" the preferred
        ones and the calls "left_to_torch", whose kernel is faster; "problems": each with its "problem" and a list of
        "fixes".
    """
    devices = [_device(system, gpu) for gpu in system.gpus or (None,)]
    return {
        "ok": all(device["works"] for device in devices) and not system.is_a_copy,
        "versions": system.versions,
        "platform": system.platform,
        "compiler": system.compiler,
        "driver": system.driver,
        "driver_cuda": _dotted(system.driver_cuda),
        "torch_cuda": system.torch_cuda,
        "torch_archs": list(system.torch_archs),
        "kernels": {
            "architectures": list(map(str, system.kernels.archs)),
            "nvrtc": system.kernels.nvrtc,
            "sources": system.kernels.sources,
            "commit": system.kernels.commit,
            "reason": system.kernels.reason,
        },
        "launcher_problem": system.launcher_problem,
        "nvrtc": system.nvrtc,
        "nvrtc_problem": system.nvrtc_problem,
        "cache_dir": system.cache_dir,
        "cpu_kernels": dataclasses.asdict(system.cpu_kernels),
        "devices": devices,
        "problems": _problems(system, devices),
    }


def _dotted(version: Capability | None) -> str | None:
    return None if version is None else "{}.{}".format(*version)


def _device(system: System, gpu: VisibleGpu | None) -> dict[str, Any]:
    """The report on one GPU, or on the CPU."""
    device_type, capability = ("cpu", None) if gpu is None else ("cuda", gpu.capability)
    chosen = {}
    for dtype in DTYPES:
        call = CallTraits(device_type, capability, dtype, HEAD_DIM, HEAD_DIM)
        refusals = {b.name: _why_not(b, call) for b in backends.BACKENDS if not b.on_request_only}
        backend = next(name for name, reasons in refusals.items() if not reasons)
        why_not = {name: reasons for name, reasons in refusals.items() if reasons}
        row = contests.row(dtype, capability)
        left = None if row is None or row.backend != backend else row.in_words()
        chosen[str(dtype).removeprefix("torch.")] = {"backend": backend, "why_not": why_not, "left_to_torch": left}
    has_kernels = capability is None or (system.torch_sees_gpus and _has_kernels(system.torch_archs, capability))
    is_fused = any(choice["backend"] != "torch" for choice in chosen.values())
    return {
        "name": "CPU" if gpu is None else gpu.name,
        "capability": _dotted(capability),
        "torch_has_kernels": has_kernels,
        "image": None if capability is None else _image(system, capability),
        "works": not _is_misled(system.cpu_kernels) if capability is None else has_kernels and is_fused,
        "backends": chosen,
    }


def _is_misled(cpu: CpuKernels) -> bool:
    """Whether there are CPU kernels, but not those that the environment names: every call will raise."""
    return bool(cpu.isas) and cpu.isa is None


def _why_not(backend: backends.Backend, call: CallTraits) -> list[str]:
    try:
        return backend.why_not(call)
    except ValueError as error:  # a variable of the environment, at which every such call will fail
        return [f"cannot start: {error}"]


def _image(system: System, capability: Capability) -> str:
    """The image of the CUDA kernels that a GPU gets, in words."""
    try:
        arch = images.selected(capability, system.kernels)
    except (images.ImageError, ValueError) as error:
        return f"none: {error}"
    if arch in system.kernels.archs:
        return f"{arch}" if arch.kind == "sm" else f"{arch}, which the driver compiles"
    if system.nvrtc is None:
        return f"none: {system.nvrtc_problem}"
    return f"{arch or 'one'} that NVRTC compiles at the first call"


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
    if system.is_a_copy:
        problems.append(_a_copy(system))
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
        elif device["capability"] is not None and device["torch_has_kernels"] and not device["works"]:
            reasons = device["backends"]["float32"]["why_not"]
            text = "; ".join(f"{name} {', '.join(why)}" for name, why in reasons.items())
            problems.append({"problem": f"no fused backend for {device['name']}, only torch: {text}", "fixes": []})
    if system.kernels_problem is not None:
        problems.append({"problem": system.kernels_problem, "fixes": ["python scripts/build_native.py"]})
    if system.gpus and system.kernels.reason is not None:
        text = f"fastattn is installed without CUDA kernels: {system.kernels.reason}"
        problems.append({"problem": text, "fixes": ["once that is mended, install fastattn again"]})
    cpu = system.cpu_kernels
    if _is_misled(cpu):
        problems.append({"problem": f"no attention on the CPU: {cpu.reason}", "fixes": ["unset FASTATTN_CPU_ISA"]})
    if not cpu.isas and system.compiler is not None and system.platform.startswith("Linux"):
        text = f"fastattn is installed without CPU kernels: {cpu.reason}"
        problems.append({"problem": text, "fixes": ["once that is mended, install fastattn again"]})
    if system.compiler is None:
        text = "no C++ compiler: torch.compile needs one on the CPU, and so does the installation of fastattn"
        problems.append({"problem": text, "fixes": ["sudo apt-get install -y g++"]})
    return problems


def _a_copy(system: System) -> dict[str, Any]:
    """The problem of sources that nothing has been built for, and that are imported all the same."""
    text = "this fastattn is a copy of the sources, for which no kernels were built"
    if system.hidden is None:
        return {"problem": text, "fixes": ["pip install ."]}
    fixes = ["pip install .  # here, which builds them", "start Python in another folder"]
    return {"problem": f"{text}; it hides the one installed in {system.hidden}", "fixes": fixes}


def _unseen(system: System) -> dict[str, Any]:
    """The problem of GPUs that the driver lists and torch does not see."""
    torch_version, names = f"torch {system.versions['torch']}", ", ".join(gpu.name for gpu in system.gpus)
    if system.torch_cuda is None:
        text = f"{torch_version} is built without CUDA, so it cannot use {names}"
        return {"problem": text, "fixes": _torch_fixes(system)}
    # CUDA's minor versions run on each other's drivers, its major ones do not.
    if system.driver_cuda is not None and system.driver_cuda[0] < pair(system.torch_cuda)[0]:
        supported = f"the driver {system.driver} runs CUDA up to {_dotted(system.driver_cuda)}"
        text = f"{supported}, but {torch_version} is built with CUDA {system.torch_cuda}"
        return {"problem": text, "fixes": _torch_fixes(system)}
    text = f"torch.cuda.is_available() is False, although nvidia-smi lists {names}"
    return {"problem": text, "fixes": ['python -c "import torch; torch.cuda.init()"  # says why']}


def _torch_fixes(system: System) -> list[str]:
    """Commands that install a torch with kernels for every GPU; each of them suffices."""
    oldest, newest = min(gpu.capability for gpu in system.gpus), max(gpu.capability for gpu in system.gpus)
    install = "pip install --force-reinstall"  # or pip would keep another build of a version that is asked for
    if oldest < (7, 5):
        has_271 = pair(system.versions["python"] or "") <= (3, 13)
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
    lines += _kernel_lines(report)
    for device in report["devices"]:
        lines += ["", *_device_lines(device)]
    lines += ["", "Problems / fix"]
    for problem in report["problems"]:
        lines.append(f"  - {problem['problem']}")
        lines += [f"      {'or' if i else '  '} {fix}" for i, fix in enumerate(problem["fixes"])]
    return "\n".join(lines if report["problems"] else [*lines, "  none"])


def _kernel_lines(report: dict[str, Any]) -> list[str]:
    kernels = report["kernels"]
    built = f"none: {kernels['reason']}"
    if kernels["architectures"]:
        built = f"{' '.join(kernels['architectures'])}, by NVRTC {kernels['nvrtc']} from sources {kernels['sources']}"
        built += f", commit {kernels['commit'][:10]}" if kernels["commit"] else ""
    launcher, nvrtc_problem, cpu = report["launcher_problem"], report["nvrtc_problem"], report["cpu_kernels"]
    runs = f"none: {cpu['reason']}"
    if cpu["reason"] is None:
        threads = "a pool" if cpu["threads"] == "pool" else cpu["threads"]
        runs = f"{cpu['isa']} of {' '.join(cpu['isas'])}, threads of {threads}"
    return [
        f"{'kernels':<10}{built}",
        f"{'launcher':<10}{'ready' if launcher is None else f'none: {launcher}'}",
        f"{'NVRTC':<10}{report['nvrtc'] or f'none: {nvrtc_problem}'}",
        f"{'cache':<10}{report['cache_dir']}",
        f"{'cpu':<10}{runs}",
        f"{'serves':<10}{_served(kernels['architectures'], report['nvrtc'] is not None)}",
    ]


def _served(architectures: list[str], has_nvrtc: bool) -> str:
    """The GPUs for which there are CUDA kernels, and from where, in words."""
    archs = [Arch.parse(text) for text in architectures]
    ways = [f"{arch.number // 10}.x from {arch.number / 10} on" for arch in archs if arch.kind == "sm"]
    words = [f"GPUs of compute capability {', '.join(ways)} by machine code"] if ways else []
    if compiled := [arch.number for arch in archs if arch.kind == "compute"]:
        words.append(f"from {min(compiled) / 10} on by PTX, which the driver compiles")
    if has_nvrtc:
        words.append("any other from 6.0 on by NVRTC at the first call")
    return "; ".join(words) or "no GPU: there are no CUDA kernels, and nothing to compile them with"


def _device_lines(device: dict[str, Any]) -> list[str]:
    title = device["name"]
    if device["capability"] is not None:
        title += f", compute capability {device['capability']}"
        if not device["torch_has_kernels"]:
            title += ", which torch cannot use"
    lines = [title]
    for dtype, choice in device["backends"].items():
        left = choice["left_to_torch"]
        lines.append(f"  {dtype:<10}{choice['backend']}" + (f"; torch, which is faster, for {left}" if left else ""))
    if device["image"] is not None:
        lines.append(f"  {'image':<10}{device['image']}")
    refusals: dict[str, list[str]] = {}
    for dtype, choice in device["backends"].items():
        for name, reasons in choice["why_not"].items():
            refusals.setdefault(f"  not {name}: it {'; it '.join(reasons)}", []).append(dtype)
    for refusal, dtypes in refusals.items():
        lines.append(refusal if len(dtypes) == len(device["backends"]) else f"{refusal} ({', '.join(dtypes)})")
    return lines


def support_table() -> str:
    """The Markdown table of the README: the calls each backend takes, in order of preference."""
    lines = ["| backend | device | dtypes | head_dim |", "|---|---|---|---|"]
    for backend in backends.BACKENDS:
        name = f"`{backend.name}`" + (" (on request)" if backend.on_request_only else "")
        device = (
            "any" if backend.devices is None else " or ".join(map(backends.DEVICE_NAMES.__getitem__, backend.devices))
        )
        if backend.min_capability is not None:
            device += f", compute capability >= {_dotted(backend.min_capability)}"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        head_dim = "any" if backend.max_head_dim is None else f"1 ... {backend.max_head_dim}"
        lines.append(f"| {name} | {device} | {dtypes} | {head_dim} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, system: System | None = None) -> int:
    """Prints the report on a machine, by default this one; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.info", description="What fastattn finds on this machine.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="print the report as JSON")
    kind.add_argument("--support", action="store_true", help="print what each backend takes, whatever this machine has")
    options = parser.parse_args(arguments)
    if options.support:
        print(support_table())
        return 0
    report = gather(system or detect())
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
