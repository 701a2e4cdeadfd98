"""Builds what is not Python: the CUDA kernels, an image for each element type and architecture, and their launcher; the
CPU kernels, an object for each instruction set.

    python scripts/build_native.py    rebuilds what has changed, into fastattn/ of this tree

Installing fastattn (setup.py) does the same. Ninja works in build/native/, in parallel; to make an image it runs this
script again. The results are copied into the package: _kernels/ with the images and build.json, which describes
everything, _launcher.*.so and _cpu.*.so. The CPU kernels take a C++ compiler, the CUDA kernels NVRTC besides. Where a
tool is missing, build.json says so, and what needs it is not built. In the environment:

    FASTATTN_BUILD_CUDA         0: build no CUDA kernels; 1: fail if a tool for them is missing
    FASTATTN_CUDA_ARCHS         such as "60;75;compute_90": machine code for 6.0 and 7.5, PTX for 9.0 and newer; all:
                                that of every release; by default, what the GPUs found here run, without one 6.0
    FASTATTN_PREBUILT_KERNELS   a folder with images, such as _kernels/ of a wheel: NVRTC is not needed
    FASTATTN_NVRTC_LIB, CXX     the compilers
    MAX_JOBS                    how many edges run at a time; by default, as many as there are cores
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from build_settings import ROOT, Arch, Settings, cpu_sources, kernel_sources, nvrtc, supported, why_no_cpu, why_no_cuda

TREE = ROOT / "fastattn"
WORK = ROOT / "build" / "native"
CPU_WORK = WORK / "cpu"
LAUNCHER = "_launcher" + sysconfig.get_config_var("EXT_SUFFIX")
CPU_MODULE = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")

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
        manifest, files = _build_cuda(settings, with_sources=package != TREE)
    files["build.json"] = _json(manifest | {"cpu": cpu})
    built = {CPU_WORK / CPU_MODULE: no_cpu, WORK / LAUNCHER: no_cuda}
    extensions = [file for file, reason in built.items() if reason is None]
    _install(package, files, extensions)
    if package != TREE:
        _install_here(manifest, files, extensions)
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


def image_names(archs: Iterable[Arch | str]) -> list[str]:
    """The files of the images for these architectures."""
    parsed = [Arch.parse(str(arch)) for arch in archs]
    return [kernel_sources.image_name(element, arch) for arch in parsed for element in kernel_sources.ELEMENTS]


def _build_cuda(settings: Settings, with_sources: bool) -> tuple[dict, dict[str, bytes]]:
    """Brings images and launcher up to date; returns what describes them, and the files of _kernels/."""
    sources = kernel_sources.KernelSources.read(ROOT / "csrc")
    manifest = _take_prebuilt(settings, sources) if settings.prebuilt else _compile(settings, sources)
    folder = settings.prebuilt or WORK
    names = image_names(manifest["architectures"])
    files = {name: (folder / name).read_bytes() for name in names}
    if with_sources:
        files |= {f"src/{name}": text.encode() for name, text in sources.files.items()}
    return manifest, files


def _compile(settings: Settings, sources: kernel_sources.KernelSources) -> dict:
    """Brings images and launcher up to date; returns what describes them."""
    compiler = nvrtc.find()
    archs = settings.archs or settings.archs_of_this_machine(compiler.architectures)
    unknown = [str(arch) for arch in archs if arch.number not in compiler.architectures]
    if unknown:
        raise ValueError(f"FASTATTN_CUDA_ARCHS: {', '.join(unknown)} cannot be built{supported()} ({compiler.library})")
    _run_ninja(WORK, graph(settings, archs, sources, compiler.version), settings.jobs, CUDA_FAILURE)
    return {
        "sources": sources.digest,
        "commit": _commit(),
        "nvrtc": compiler.version,
        "options": {str(arch): " ".join(kernel_sources.options(arch)) for arch in archs},
        "architectures": list(map(str, archs)),
        "images": {name: json.loads((WORK / f"{name}.json").read_text()) for name in image_names(archs)},
    }


def _take_prebuilt(settings: Settings, sources: kernel_sources.KernelSources) -> dict:
    """Builds the launcher alone; returns what describes the images of the folder."""
    folder = settings.prebuilt
    there = folder / "build.json"
    manifest = json.loads(there.read_text()) if there.is_file() else {}
    archs = settings.archs or tuple(map(Arch.parse, manifest.get("architectures", ())))
    missing = [name for name in ("build.json", *image_names(archs)) if not (folder / name).is_file()]
    if missing or not archs:
        raise ValueError(f"FASTATTN_PREBUILT_KERNELS: {folder} lacks {', '.join(missing) or 'images'}")
    if manifest["sources"] != sources.digest:
        raise ValueError(
            f"FASTATTN_PREBUILT_KERNELS: {folder} is built from other sources than csrc: "
            f"{manifest['sources']}, not {sources.digest}"
        )
    _run_ninja(WORK, graph(settings, (), sources, nvrtc_version=None), settings.jobs, CUDA_FAILURE)
    images = {name: manifest["images"][name] for name in image_names(archs)}
    return manifest | {"architectures": list(map(str, archs)), "images": images}


def graph(
    settings: Settings, archs: Sequence[Arch], sources: kernel_sources.KernelSources, nvrtc_version: str | None
) -> str:
    """The text of build.ninja for images and launcher.

    Args:
        settings: the compiler.
        archs: of the images.
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
        for arch in archs:
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


def _install_here(manifest: dict, files: Mapping[str, bytes], extensions: Iterable[Path]) -> None:
    """Gives this tree what an installation from it gets: who starts Python in this folder imports the package here.

    A tree that has been built with more architectures keeps them.
    """
    there = TREE / "_kernels" / "build.json"
    before = json.loads(there.read_text()) if there.is_file() else {}
    is_current = manifest.get("sources") in (None, before.get("sources"))
    if is_current and {*manifest.get("architectures", ())} < {*before.get("architectures", ())}:
        files = {str(x.relative_to(there.parent)): x.read_bytes() for x in there.parent.rglob("*") if x.is_file()}
        extensions = {TREE / LAUNCHER, *extensions} if (TREE / LAUNCHER).is_file() else extensions
    _install(TREE, {name: content for name, content in files.items() if not name.startswith("src/")}, extensions)


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
            build(TREE)
        case ["image", element, arch, version]:
            image(element, arch, version)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
