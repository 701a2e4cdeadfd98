"""NVRTC, NVIDIA's compiler as a library: CUDA C++ to machine code or PTX, without a GPU, a driver or a CUDA toolkit.

`find()` takes the first complete copy of these: the file that FASTATTN_NVRTC_LIB names; Python packages, which are
nvidia-cuda-nvrtc-cu12 with nvidia-cuda-runtime-cu12, and what torch itself depends on; a CUDA toolkit of the system.
Only the standard library is imported, so that the installation of fastattn can use this file, too.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HEADERS = ("cuda_fp16.h", "cuda_bf16.h")
INSTALL = "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"

# Folders with libnvrtc below those of sys.path: CUDA 12 packages, CUDA 13 packages, torch builds that include it.
_PACKAGES = ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib", "torch/lib")
_PACKAGE_HEADERS = ("nvidia/cuda_runtime/include", "nvidia/cu13/include")
_LIBRARY = re.compile(r"libnvrtc(-[0-9a-f]{8})?\.so[.0-9]*")  # and not its helpers libnvrtc-builtins, libnvrtc.alt


class NotFound(RuntimeError):
    """There is no NVRTC with the headers it needs; the message says where it was looked for."""


class CompileError(RuntimeError):
    """The source does not compile; the message is the compiler's log."""


class Compiled(NamedTuple):
    """The result of a compilation."""

    image: bytes  # an ELF file for "sm_XY", PTX text for "compute_XY"
    log: str  # warnings, and with --ptxas-options=-v the text that `resources` reads


class Nvrtc:
    """One copy of NVRTC.

    Args:
        library: its shared library.
        include: the folder of the CUDA headers that belong to it.

    Raises:
        OSError: the library cannot be loaded.
    """

    def __init__(self, library: Path, include: Path):
        self.library, self.include = library, include
        self._lib = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    @property
    def architectures(self) -> tuple[int, ...]:
        """The compute capabilities it compiles for, as 10 * major + minor, in ascending order."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(numbers)

    def compile(
        self,
        source: str,
        arch: str,
        *,
        name: str = "source.cu",
        headers: Mapping[str, str] | None = None,
        include_dirs: Sequence[Path] = (),
        defines: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> Compiled:
        """Compiles one translation unit.

        Args:
            source: the text.
            arch: "sm_XY" for machine code, "compute_XY" for PTX.
            name: the name of the source in messages and line information.
            headers: by name, texts that `#include "name"` finds, before any file.
            include_dirs: folders of further headers; those of CUDA are found anyway.
            defines: macros and their values.
            options: further options of NVRTC.

        Raises:
            CompileError: the source or an option is wrong.
        """
        program = ctypes.c_void_p()
        texts = {key.encode(): text.encode() for key, text in (headers or {}).items()}
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(texts),
            _strings(texts.values()),
            _strings(texts.keys()),
        )
        includes = [f"--include-path={folder}" for folder in (*include_dirs, self.include)]
        macros = [f"--define-macro={macro}={value}" for macro, value in (defines or {}).items()]
        arguments = [option.encode() for option in (f"--gpu-architecture={arch}", *includes, *macros, *options)]
        try:
            status = self._lib.nvrtcCompileProgram(program, len(arguments), _strings(arguments))
            log = _without_deprecations(self._read(program, "ProgramLog"))
            if status != 0:
                raise CompileError(f"{name} for {arch}, {self._words(status)}:\n{log}")
            if arch.startswith("compute"):
                return Compiled(self._read(program, "PTX").encode(), log)
            return Compiled(self._read_bytes(program, "CUBIN"), log)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read_bytes(self, program: ctypes.c_void_p, kind: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, buffer)
        return buffer.raw

    def _read(self, program: ctypes.c_void_p, kind: str) -> str:
        return self._read_bytes(program, kind).rstrip(b"\0").decode()

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function} of {self.library}: {self._words(status)}")

    def _words(self, status: int) -> str:
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        return self._lib.nvrtcGetErrorString(status).decode()


def _strings(values: Collection[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*values)


def _without_deprecations(log: str) -> str:
    """The log without one warning, which every compilation for GPUs older than Turing gives: their support will end."""
    known = re.compile(r"nvrtc: warning: Architectures prior to .* are deprecated")
    return "\n".join(line for line in log.splitlines() if not known.match(line))


# ---- resources of a kernel ----


class Resources(NamedTuple):
    """Hardware resources of one kernel, as the assembler reports them."""

    registers: int  # per thread
    stack_bytes: int  # per thread
    spill_bytes: int  # per thread, stored and loaded
    shared_bytes: int  # per block, static; dynamic shared memory comes on top


_RESOURCES = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def resources(log: str) -> dict[str, Resources]:
    """The resources of each kernel, from the log of a compilation to machine code with --ptxas-options=-v."""
    found = {}
    for match in _RESOURCES.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[match["kernel"]] = Resources(
            registers=int(match["registers"]),
            stack_bytes=int(match["stack"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            shared_bytes=int(shared[1]) if shared else 0,
        )
    return found


# ---- finding it ----


class Toolkit(NamedTuple):
    """The folders in which a CUDA toolkit of the system may lie."""

    libraries: tuple[str, ...]
    headers: tuple[str, ...]


SYSTEM = Toolkit(
    libraries=("/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
    headers=("/usr/local/cuda/include", "/usr/include"),
)


def find(capability: int | None = None, toolkit: Toolkit = SYSTEM) -> Nvrtc:
    """The first NVRTC found.

    Args:
        capability: it has to compile for this compute capability, given as 10 * major + minor.
        toolkit: where to look after the folders of sys.path.

    Raises:
        NotFound: there is none; the message says what was found instead, and how to get one.
        ValueError: FASTATTN_NVRTC_LIB names no file.
    """
    refusals = []
    for library in _libraries(toolkit):
        include = _headers_for(library, toolkit)
        if include is None:
            refusals.append(f"{library} has no {' and '.join(HEADERS)}")
            continue
        try:
            nvrtc = Nvrtc(library, include)
        except OSError as error:
            refusals.append(str(error))
            continue
        if capability is None or capability in nvrtc.architectures:
            return nvrtc
        refusals.append(f"{library} does not compile for {capability // 10}.{capability % 10}")
    where = "; ".join(refusals) or "it is in no folder of sys.path and not in the system"
    raise NotFound(f"no usable NVRTC: {where} (to get one: {INSTALL})")


def _libraries(toolkit: Toolkit) -> Iterator[Path]:
    if named := os.environ.get("FASTATTN_NVRTC_LIB"):
        if not Path(named).is_file():
            raise ValueError(f"FASTATTN_NVRTC_LIB: must be a file, got {named!r}")
        yield Path(named)
        return
    below = [Path(folder, sub) for sub in _PACKAGES for folder in sys.path]
    for folder in (*below, *map(Path, toolkit.libraries)):
        if folder.is_dir():
            yield from sorted((f for f in folder.iterdir() if _LIBRARY.fullmatch(f.name)), reverse=True)[:1]


def _headers_for(library: Path, toolkit: Toolkit) -> Path | None:
    """The folder of CUDA headers nearest to a library: those of its own version, if it has any."""
    near = [parent / sub for parent in library.parents[1:3] for sub in ("include", "cuda_runtime/include")]
    below = [Path(folder, sub) for sub in _PACKAGE_HEADERS for folder in sys.path]
    for folder in (*near, *below, *map(Path, toolkit.headers)):
        if all((folder / header).is_file() for header in HEADERS):
            return folder
    return None
