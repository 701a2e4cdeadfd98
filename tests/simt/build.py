"""Builds a kernel file and the CPU executor into one shared library, with g++ alone.

A fast build is optimised and runs the kernel as it is; a checked build is instrumented, and the executor judges every
memory access. Both are kept under build/simt by a hash of everything they are made of, so a second build is a look-up.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXECUTOR = Path(__file__).parent
RUNTIME = tuple(EXECUTOR / f"{part}.cpp" for part in ("scheduler", "shadow", "memory", "reports"))
CACHE = ROOT / "build" / "simt"
INCLUDE = (ROOT / "csrc", EXECUTOR)

# Symbols stay local to their library (also what would be unique in the process: static data of templates), and shared
# memory is reached without an initialising wrapper. Kernels look at the same bytes as different types.
COMMON = (
    *("-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-extern-tls-init"),
    *("-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"),
)
FAST = ("-O2",)
# -O1: with more, the compiler joins neighbouring accesses, and reports get harder to read.
CHECKED = (
    *("-O1", "-fsanitize=thread,alignment,bounds", "-fsanitize-recover=all"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
)
INCLUDE_LINE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """The compiler is missing, or refuses a file."""


@functools.cache
def compiler() -> tuple[str, str]:
    """The C++ compiler (g++, or what CXX names) and its version line."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"{name}: not found; the CPU executor needs g++ 12 or newer (or set CXX)")
    return path, run([path, "--version"]).splitlines()[0]


@functools.cache
def processor_flags() -> tuple[str, ...]:
    """Options with which fmaf() is one instruction and not a library call, where the processor has it."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    has_v3 = platform.machine() == "x86_64" and {"avx2", "fma", "bmi2", "f16c", "movbe", "abm"} <= words
    return ("-march=x86-64-v3",) if has_v3 else ()


def run(command: list[str]) -> str:
    """The command's output; BuildError with all of it if the command fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def with_headers(source: Path) -> list[Path]:
    """The file and all project headers it includes, directly or not."""
    found = [source.resolve()]
    for file in found:  # grows while it is walked
        for name in INCLUDE_LINE.findall(file.read_text()):
            candidates = [folder / name for folder in (file.parent, *INCLUDE) if (folder / name).exists()]
            if candidates and candidates[0].resolve() not in found:
                found.append(candidates[0].resolve())
    return found


def cached(
    name: str, files: Iterable[Path], flags: Iterable[str], make: Callable[[Path], None], cache: Path = CACHE
) -> Path:
    """The file `name` of the cache, under a hash of files and flags; make(path) writes it once, whatever the number of
    processes.
    """
    digest = hashlib.sha256("\0".join([*compiler(), *flags]).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    stem, dot, suffix = name.partition(".")
    target = cache / f"{stem}-{digest.hexdigest()[:16]}{dot}{suffix}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                unfinished = Path(folder) / target.name
                make(unfinished)
                unfinished.rename(target)
    return target


def compile_object(source: Path, flags: tuple[str, ...], cache: Path = CACHE) -> Path:
    options = [*COMMON, *processor_flags(), *flags, *(f"-I{folder}" for folder in INCLUDE)]

    def make(target: Path) -> None:
        run([compiler()[0], *options, "-x", "c++", "-c", str(source), "-o", str(target)])

    return cached(f"{source.stem}.o", with_headers(source), options, make, cache)


def build(source: Path | str, *, checked: bool = False, defines: tuple[str, ...] = (), cache: Path = CACHE) -> Path:
    """The shared library with the kernels of `source` and the executor.

    Args:
        source: a C++ or CUDA file that exports its kernels by SIMT_EXPORT.
        checked: instrument every memory access.
        defines: preprocessor definitions, such as ("TILE=16",).
        cache: the folder in which builds are kept.

    Raises:
        BuildError: no compiler, or it refuses the file; holds the command and what the compiler said.
    """
    flags = (*(CHECKED if checked else FAST), *(f"-D{define}" for define in defines))
    return build_library(Path(source), flags, cache)


def build_library(source: Path, flags: tuple[str, ...], cache: Path = CACHE) -> Path:
    """The shared library of the file, compiled with these flags, and of the executor."""
    objects = [compile_object(source, flags, cache), *(compile_object(file, ("-O2",), cache) for file in RUNTIME)]

    def make(target: Path) -> None:
        run([compiler()[0], "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *map(str, objects), "-o", str(target)])

    return cached(f"{source.stem}.so", objects, ["link"], make, cache)
