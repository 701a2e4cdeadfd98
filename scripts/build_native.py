"""Builds what is not Python: the CUDA kernels, an image for each element type and architecture, and their launcher.

    python scripts/build_native.py    rebuilds what has changed, into fastattn/ of this tree

Installing fastattn (setup.py) does the same. Ninja works in build/native/, in parallel; each of its edges runs this
script again, for one image or for the launcher. The results are copied into the package: _kernels/ with the images and
build.json, which describes them, and _launcher.*.so. Where a tool is missing, build.json says so, and nothing else is
built. In the environment:

    FASTATTN_BUILD_CUDA         0: build nothing; 1: fail if a tool is missing
    FASTATTN_CUDA_ARCHS         such as "60;75;compute_90": machine code for 6.0 and 7.5, PTX for 9.0 and newer
    FASTATTN_PREBUILT_KERNELS   a folder with images, such as _kernels/ of a wheel: only the launcher is compiled
    FASTATTN_NVRTC_LIB, CXX     the compilers
    MAX_JOBS                    how many edges run at a time; by default, as many as there are cores
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "native"
LAUNCHER = "_launcher" + sysconfig.get_config_var("EXT_SUFFIX")

# The package's modules that import only the standard library, without its __init__, which imports torch.
_package = types.ModuleType("fastattn_without_torch")
_package.__path__ = [str(ROOT / "fastattn")]
sys.modules[_package.__name__] = _package
nvrtc = importlib.import_module(f"{_package.__name__}.cuda_kernels.nvrtc")
kernel_sources = importlib.import_module(f"{_package.__name__}.cuda_kernels.sources")
Arch = kernel_sources.Arch


# ---- what is wanted, and what there is for it ----


@dataclass(frozen=True)
class Settings:
    """The environment's variables, checked."""

    is_wanted: bool | None  # None: if it can be done
    archs: tuple[Arch, ...]
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
        try:
            named = [Arch.parse(arch.strip()) for arch in environment.get("FASTATTN_CUDA_ARCHS", "").split(";") if arch]
        except ValueError as error:
            raise ValueError(f"FASTATTN_CUDA_ARCHS: each of its parts {error}{_supported()}") from None
        prebuilt = environment.get("FASTATTN_PREBUILT_KERNELS")
        return cls(
            is_wanted=None if wanted == "" else wanted == "1",
            archs=tuple(dict.fromkeys(named)) or kernel_sources.DEFAULT_ARCHS,
            prebuilt=Path(prebuilt).absolute() if prebuilt else None,
            compiler=environment.get("CXX") or "c++",
            jobs=int(jobs),
        )

    def image_names(self) -> list[str]:
        return [kernel_sources.image_name(element, arch) for arch in self.archs for element in kernel_sources.ELEMENTS]


def _supported() -> str:
    """The architectures of the compiler found, as the end of an error message."""
    try:
        found = nvrtc.find()
    except nvrtc.NotFound:
        return ""
    numbers = [n for n in found.architectures if n >= kernel_sources.MIN_CAPABILITY]
    return f"; NVRTC {found.version} compiles for {', '.join(map(str, numbers))}"


def why_pure_python(settings: Settings) -> str | None:
    """Why nothing is built, or None if everything needed is there."""
    if settings.is_wanted is False:
        return "FASTATTN_BUILD_CUDA=0"
    if sys.platform != "linux":
        return f"the kernels are built on Linux, and this is {platform.system()}"
    missing = []
    if shutil.which(shlex.split(settings.compiler)[0]) is None:
        missing.append(f"no C++ compiler ({settings.compiler})")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("no headers of Python (python3-dev)")
    missing += [f"no package {name}" for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]
    if settings.prebuilt is None:
        try:
            nvrtc.find()
        except nvrtc.NotFound as error:
            missing.append(str(error))
    return "; ".join(missing) or None


# ---- the build ----


def build(package: Path) -> None:
    """Builds into a package folder: fastattn/ of this tree, or that of a wheel in the making.

    Raises:
        ValueError: a variable of the environment is wrong.
        RuntimeError: a compiler fails, or a tool is missing although FASTATTN_BUILD_CUDA=1.
    """
    settings, start = Settings.read(os.environ), time.monotonic()
    if reason := why_pure_python(settings):
        if settings.is_wanted:
            raise RuntimeError(f"FASTATTN_BUILD_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        print(f"fastattn: installed without CUDA kernels: {reason}")
        _install(package, {"build.json": _json({"reason": reason})}, launcher=None)
        return
    sources = kernel_sources.KernelSources.read(ROOT / "csrc")
    WORK.mkdir(parents=True, exist_ok=True)
    manifest = _take_prebuilt(settings, sources) if settings.prebuilt else _compile(settings, sources)
    folder = settings.prebuilt or WORK
    files = {name: (folder / name).read_bytes() for name in settings.image_names()}
    if package != ROOT / "fastattn":  # there, the sources lie beside it
        files |= {f"src/{name}": text.encode() for name, text in sources.files.items()}
    _install(package, files | {"build.json": _json(manifest)}, WORK / LAUNCHER)
    _report(manifest, files, time.monotonic() - start)


def _compile(settings: Settings, sources: kernel_sources.KernelSources) -> dict:
    """Brings images and launcher up to date; returns what describes them."""
    compiler = nvrtc.find()
    unknown = [str(arch) for arch in settings.archs if arch.number not in compiler.architectures]
    if unknown:
        raise ValueError(
            f"FASTATTN_CUDA_ARCHS: {', '.join(unknown)} cannot be built{_supported()} ({compiler.library})"
        )
    _run_ninja(graph(settings, sources, compiler.version), settings.jobs)
    return {
        "sources": sources.digest,
        "commit": _commit(),
        "nvrtc": compiler.version,
        "options": {str(arch): " ".join(kernel_sources.options(arch)) for arch in settings.archs},
        "architectures": list(map(str, settings.archs)),
        "images": {name: json.loads((WORK / f"{name}.json").read_text()) for name in settings.image_names()},
    }


def _take_prebuilt(settings: Settings, sources: kernel_sources.KernelSources) -> dict:
    """Builds the launcher alone; returns what describes the images of the folder."""
    folder = settings.prebuilt
    missing = [name for name in ["build.json", *settings.image_names()] if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"FASTATTN_PREBUILT_KERNELS: {folder} lacks {', '.join(missing)}")
    manifest = json.loads((folder / "build.json").read_text())
    if manifest["sources"] != sources.digest:
        raise ValueError(
            f"FASTATTN_PREBUILT_KERNELS: {folder} is built from other sources than csrc: "
            f"{manifest['sources']}, not {sources.digest}"
        )
    _run_ninja(graph(settings, sources, nvrtc_version=None), settings.jobs)
    images = {name: manifest["images"][name] for name in settings.image_names()}
    return manifest | {"architectures": list(map(str, settings.archs)), "images": images}


def graph(settings: Settings, sources: kernel_sources.KernelSources, nvrtc_version: str | None) -> str:
    """The text of build.ninja.

    Nothing in it depends on where the tools are, because pip and others put them elsewhere each time.

    Args:
        settings: what to build.
        sources: the kernels.
        nvrtc_version: of the compiler; None if only the launcher is built.
    """
    from ninja import Writer

    text = io.StringIO()
    writer = Writer(text)
    run = '"$$PYTHON" ../../scripts/build_native.py'
    if nvrtc_version is not None:
        writer.rule("image", f"{run} image $element $arch $nvrtc", description="NVRTC $element $arch")
        writer.variable("nvrtc", nvrtc_version)
        how = ["../../fastattn/cuda_kernels/nvrtc.py", "../../fastattn/cuda_kernels/sources.py"]
        for arch in settings.archs:
            for element in kernel_sources.ELEMENTS:
                name = kernel_sources.image_name(element, arch)
                writer.build(
                    [name, f"{name}.json"],
                    "image",
                    [f"../../csrc/{file}" for file in sources.files],
                    implicit=how,
                    variables={"element": element, "arch": str(arch)},
                )
    compiler = shlex.quote(settings.compiler).replace("$", "$$")
    pybind11_version = importlib.import_module("pybind11").__version__
    writer.rule(
        "launcher",
        f"{run} launcher {compiler} {pybind11_version}",
        depfile="$out.d",
        deps="gcc",
        description="C++ $out",
    )
    writer.build(LAUNCHER, "launcher", "../../csrc/launcher.cpp")
    return text.getvalue()


def _run_ninja(graph: str, jobs: int) -> None:
    (WORK / "build.ninja").write_text(graph)
    command = [sys.executable, "-m", "ninja", "-C", str(WORK), "-j", str(jobs)]
    sys.stdout.flush()
    if subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}).returncode != 0:
        raise RuntimeError("the CUDA kernels or their launcher do not compile; FASTATTN_BUILD_CUDA=0 does without them")


def _commit() -> str | None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or None


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=1).encode()


def _install(package: Path, kernels: Mapping[str, bytes], launcher: Path | None) -> None:
    """Makes the package's native part these files alone. They replace old ones, which a process may still be using."""
    files = {package / "_kernels" / name: content for name, content in kernels.items()}
    if launcher is not None:
        files[package / LAUNCHER] = launcher.read_bytes()
    for old in (*package.glob("_kernels/**/*"), *package.glob(LAUNCHER)):
        if old.is_file() and old not in files:
            old.unlink()
    for file, content in files.items():
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(file.name + ".new")
            new.write_bytes(content)
            new.replace(file)


def _report(manifest: dict, files: Mapping[str, bytes], seconds: float) -> None:
    total = 0
    for arch in manifest["architectures"]:
        images = {name: image for name, image in manifest["images"].items() if f".{arch}." in name}
        counts = [len(image["kernels"]) for image in images.values()]
        used = [kernel for image in images.values() for kernel in image["kernels"].values() if kernel is not None]
        line = f"  {arch:<11}{' + '.join(map(str, counts))} = {sum(counts)} kernels"
        line += f", {sum(len(files[name]) for name in images) / 1e6:.1f} MB"
        if used:
            spilled = sum(kernel["spill_bytes"] > 0 for kernel in used)
            line += f", at most {max(kernel['registers'] for kernel in used)} registers, {spilled} kernels spill"
        print(line)
        total += sum(counts)
    size = sum(len(files[name]) for name in manifest["images"]) / 1e6
    images = f"{total} kernels in {len(manifest['images'])} images"
    print(f"fastattn: {images}, {size:.1f} MB, NVRTC {manifest['nvrtc']}, {seconds:.0f} s")


# ---- the edges, run by ninja in build/native/ ----


def image(element: str, arch: str, version: str) -> None:
    """Compiles one image, and writes a .json file beside it with its kernels and their resources."""
    compiler, start = nvrtc.find(), time.monotonic()
    if compiler.version != version:
        raise RuntimeError(f"{compiler.library} is NVRTC {compiler.version}, but the build has begun with {version}")
    target = Arch.parse(arch)
    compiled = kernel_sources.KernelSources.read(ROOT / "csrc").compile(compiler, element, target)
    kernels = {name: used and used._asdict() for name, used in sorted(kernel_sources.kernels(compiled).items())}
    name = kernel_sources.image_name(element, target)
    Path(f"{name}.json").write_bytes(_json({"seconds": round(time.monotonic() - start, 1), "kernels": kernels}))
    Path(name).write_bytes(compiled.image)
    if warnings := [line for line in compiled.log.splitlines() if "warning" in line]:
        print("\n".join(warnings))


def launcher(compiler: str, pybind11_version: str) -> None:
    """Compiles the launcher."""
    import pybind11

    if pybind11.__version__ != pybind11_version:
        raise RuntimeError(f"this is pybind11 {pybind11.__version__}, but the build has begun with {pybind11_version}")
    includes = [f"-isystem{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    options = ["-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-shared", "-fvisibility=hidden", "-s"]
    files = ["../../csrc/launcher.cpp", "-o", LAUNCHER, "-MMD", "-MF", f"{LAUNCHER}.d"]
    command = [*shlex.split(compiler), *options, *includes, *files, "-ldl"]
    sys.exit(subprocess.run(command).returncode)


def main(arguments: list[str]) -> None:
    """Runs one edge, or everything for this tree."""
    match arguments:
        case []:
            build(ROOT / "fastattn")
        case ["image", element, arch, version]:
            image(element, arch, version)
        case ["launcher", compiler, version]:
            launcher(compiler, version)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
