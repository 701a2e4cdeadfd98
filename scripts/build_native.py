"""Builds what is not Python: the CUDA kernels, an image for each element type and architecture, and their launcher; the
CPU kernels, an object for each instruction set.

    python scripts/build_native.py    rebuilds what has changed, into fastattn/ of this tree

Installing fastattn (setup.py) does the same. Ninja works in build/native/, in parallel; to make an image it runs this
script again. The results are copied into the package: _kernels/ with the images and build.json, which describes
everything, _launcher.*.so and _cpu.*.so. The CPU kernels take a C++ compiler, the CUDA kernels NVRTC besides. Where a
tool is missing, build.json says so, and what needs it is not built. In the environment:

    FASTATTN_BUILD_CUDA         0: build no CUDA kernels; 1: fail if a tool for them is missing
    FASTATTN_CUDA_ARCHS         such as "60;75;compute_90": machine code for 6.0 and 7.5, PTX for 9.0 and newer
    FASTATTN_PREBUILT_KERNELS   a folder with images, such as _kernels/ of a wheel: NVRTC is not needed
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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "native"
CPU_WORK = WORK / "cpu"
LAUNCHER = "_launcher" + sysconfig.get_config_var("EXT_SUFFIX")
CPU_MODULE = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")

# The package's modules that import only the standard library, without its __init__, which imports torch.
_package = types.ModuleType("fastattn_without_torch")
_package.__path__ = [str(ROOT / "fastattn")]
sys.modules[_package.__name__] = _package
nvrtc = importlib.import_module(f"{_package.__name__}.cuda_kernels.nvrtc")
kernel_sources = importlib.import_module(f"{_package.__name__}.cuda_kernels.sources")
cpu_sources = importlib.import_module(f"{_package.__name__}.cpu_kernels.sources")
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


# ---- the build ----


def build(package: Path) -> None:
    """Builds into a package folder: fastattn/ of this tree, or that of a wheel in the making.

    Raises:
        ValueError: a variable of the environment is wrong.
        RuntimeError: a compiler fails, or a tool is missing although FASTATTN_BUILD_CUDA=1.
    """
    settings, start = Settings.read(os.environ), time.monotonic()
    no_cpu, no_cuda = why_no_cpu(settings), why_no_cuda(settings)
    if settings.is_wanted and no_cuda:
        raise RuntimeError(f"FASTATTN_BUILD_CUDA=1, but the CUDA kernels cannot be built: {no_cuda}")
    cpu: dict = {"reason": no_cpu} if no_cpu else _build_cpu(settings)
    manifest: dict = {"reason": no_cuda}
    files: dict[str, bytes] = {}  # of _kernels/, besides what describes them
    if no_cuda is None:
        # In this tree, the sources lie beside the package.
        manifest, files = _build_cuda(settings, with_sources=package != ROOT / "fastattn")
    files["build.json"] = _json(manifest | {"cpu": cpu})
    extensions = {CPU_WORK / CPU_MODULE: no_cpu, WORK / LAUNCHER: no_cuda}
    _install(package, files, [file for file, reason in extensions.items() if reason is None])
    images = f"without CUDA kernels: {no_cuda}" if no_cuda else _images_in_words(manifest, files)
    sets = f"without CPU kernels: {no_cpu}" if no_cpu else f"with CPU kernels for {', '.join(cpu['isas'])}"
    print(f"fastattn: installed {images}\nfastattn: installed {sets}")
    print(f"fastattn: {time.monotonic() - start:.0f} s")


def _run_ninja(folder: Path, graph: str, jobs: int, failure: str) -> None:
    """Brings a folder up to date, or raises RuntimeError with these words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(graph)
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(jobs)]
    sys.stdout.flush()
    if subprocess.run(command, env=os.environ | _places()).returncode != 0:
        raise RuntimeError(failure)


def _places() -> dict[str, str]:
    """Variables for the edges' commands.

    A graph does not name where the tools are, because pip and others put them elsewhere each time.
    """
    import pybind11

    includes = {"PYBIND11_INCLUDE": pybind11.get_include(), "PYTHON_INCLUDE": sysconfig.get_path("include")}
    return {"PYTHON": sys.executable, **includes}


# ---- C++ ----


def _compiler(settings: Settings) -> str:
    """The C++ compiler as the beginning of a command in a graph."""
    return shlex.join(shlex.split(settings.compiler)).replace("$", "$$")


def _module_options() -> str:
    """Options in a graph for what includes Python.h and pybind11; another version of it means another compilation."""
    version = importlib.import_module("pybind11").__version__
    return f'-DFASTATTN_PYBIND11={version} -isystem "$$PYBIND11_INCLUDE" -isystem "$$PYTHON_INCLUDE"'


DEPENDENCIES = {"depfile": "$out.d", "deps": "gcc"}
WITH_DEPENDENCIES = "$in -o $out -MMD -MF $out.d"


# ---- the CPU kernels ----


def _build_cpu(settings: Settings) -> dict:
    """Brings them up to date; returns what describes them."""
    failure = "the CPU kernels do not compile; CXX names another compiler, CXX=none does without any kernels"
    _run_ninja(CPU_WORK, cpu_graph(settings), settings.jobs, failure)
    return {"isas": list(cpu_sources.isas())}


def cpu_graph(settings: Settings) -> str:
    """The text of build.ninja for the CPU kernels: an object for each instruction set, and the module that has them."""
    from ninja import Writer

    text = io.StringIO()
    writer, source = Writer(text), "../../../csrc/cpu"
    writer.rule(
        "object", f"{_compiler(settings)} $options -c {WITH_DEPENDENCIES}", description="CPU $out", **DEPENDENCIES
    )
    writer.rule("link", f"{_compiler(settings)} -shared -s $in -o $out -ldl -lpthread", description="CPU $out")
    objects = [f"{isa}.o" for isa in cpu_sources.isas()]
    for isa, name in zip(cpu_sources.isas(), objects, strict=True):
        options = " ".join(cpu_sources.kernel_options(isa))
        writer.build(name, "object", f"{source}/kernels.cpp", variables={"options": options})
    options = " ".join([*cpu_sources.OPTIONS, _module_options()])
    writer.build("module.o", "object", f"{source}/module.cpp", variables={"options": options})
    writer.build(CPU_MODULE, "link", ["module.o", *objects])
    return text.getvalue()


# ---- the CUDA kernels ----

CUDA_FAILURE = "the CUDA kernels or their launcher do not compile; FASTATTN_BUILD_CUDA=0 does without them"


def _build_cuda(settings: Settings, with_sources: bool) -> tuple[dict, dict[str, bytes]]:
    """Brings images and launcher up to date; returns what describes them, and the files of _kernels/."""
    sources = kernel_sources.KernelSources.read(ROOT / "csrc")
    manifest = _take_prebuilt(settings, sources) if settings.prebuilt else _compile(settings, sources)
    folder = settings.prebuilt or WORK
    files = {name: (folder / name).read_bytes() for name in settings.image_names()}
    if with_sources:
        files |= {f"src/{name}": text.encode() for name, text in sources.files.items()}
    return manifest, files


def _compile(settings: Settings, sources: kernel_sources.KernelSources) -> dict:
    """Brings images and launcher up to date; returns what describes them."""
    compiler = nvrtc.find()
    unknown = [str(arch) for arch in settings.archs if arch.number not in compiler.architectures]
    if unknown:
        raise ValueError(
            f"FASTATTN_CUDA_ARCHS: {', '.join(unknown)} cannot be built{_supported()} ({compiler.library})"
        )
    _run_ninja(WORK, graph(settings, sources, compiler.version), settings.jobs, CUDA_FAILURE)
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
    _run_ninja(WORK, graph(settings, sources, nvrtc_version=None), settings.jobs, CUDA_FAILURE)
    images = {name: manifest["images"][name] for name in settings.image_names()}
    return manifest | {"architectures": list(map(str, settings.archs)), "images": images}


def graph(settings: Settings, sources: kernel_sources.KernelSources, nvrtc_version: str | None) -> str:
    """The text of build.ninja for images and launcher.

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
    options = f"-std=c++17 -O2 -DNDEBUG -fPIC -shared -fvisibility=hidden -s {_module_options()}"
    writer.rule(
        "launcher",
        f"{_compiler(settings)} {options} {WITH_DEPENDENCIES} -ldl",
        description="C++ $out",
        **DEPENDENCIES,
    )
    writer.build(LAUNCHER, "launcher", "../../csrc/launcher.cpp")
    return text.getvalue()


def _commit() -> str | None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or None


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=1).encode()


def _install(package: Path, kernels: Mapping[str, bytes], extensions: Iterable[Path]) -> None:
    """Makes the package's native part these files alone. They replace old ones, which a process may still be using."""
    files = {package / "_kernels" / name: content for name, content in kernels.items()}
    files |= {package / extension.name: extension.read_bytes() for extension in extensions}
    for old in (*package.glob("_kernels/**/*"), package / LAUNCHER, package / CPU_MODULE):
        if old.is_file() and old not in files:
            old.unlink()
    for file, content in files.items():
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(file.name + ".new")
            new.write_bytes(content)
            new.replace(file)


def _images_in_words(manifest: dict, files: Mapping[str, bytes]) -> str:
    """What was built of the CUDA kernels; prints a line for each architecture."""
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
    return f"with {total} CUDA kernels in {len(manifest['images'])} images, {size:.1f} MB, NVRTC {manifest['nvrtc']}"


# ---- an image, by ninja in build/native/ ----


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


def main(arguments: list[str]) -> None:
    """Compiles one image, or everything for this tree."""
    match arguments:
        case []:
            build(ROOT / "fastattn")
        case ["image", element, arch, version]:
            image(element, arch, version)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
