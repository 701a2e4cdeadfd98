"""NVRTC, the CUDA compiler as a library, from the wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path


class NvrtcError(RuntimeError):
    """NVRTC is not installed, or refuses a file."""


def wheel_folder(part: str) -> Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / part).is_dir():
            return Path(folder) / part
    raise NvrtcError(f"NVRTC: no nvidia/{part}; install nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12")


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(wheel_folder("cuda_nvrtc") / "lib" / "libnvrtc.so.12"))


def why_not() -> str:
    """Why PTX cannot be compiled here; empty if it can."""
    try:
        library()
    except (NvrtcError, OSError) as error:
        return str(error)
    return ""


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_ptx(source: Path, arch: str, include_dirs: Sequence[Path], options: Sequence[str]) -> str:
    """The PTX of a CUDA file; NvrtcError holds what the compiler said."""
    nvrtc, program = library(), ctypes.c_void_p()
    folders = [*include_dirs, wheel_folder("cuda_runtime") / "include"]
    arguments = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device", *(f"-I{f}" for f in folders), *options]
    encoded = map(str.encode, arguments)
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), str(source).encode(), 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(
        program, len(arguments), (ctypes.c_char_p * len(arguments))(*map(str.encode, arguments))
    )
    part = "ProgramLog" if failed else "PTX"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{part}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{part}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise NvrtcError(f"{source} for {arch}:\n{text.value.decode()}")
    return text.value.decode()
