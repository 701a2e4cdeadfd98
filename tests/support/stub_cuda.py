"""A libcuda without a GPU, and the calls that the launcher made of it.

launcher, stub = load(folder)      # a launcher and a driver of their own, as in a new process
launcher.launch(...)
stub.calls("cuLaunchKernel")
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import shared_library, stub_cuda
from tests.simt.build import BuildError, cached

CAPABILITY_MAJOR, CAPABILITY_MINOR, MULTIPROCESSORS, MAX_SMEM = 75, 76, 16, 97  # attributes of a device


def build(*defines: str) -> Path:
    """The library; skips the test where there is no compiler. `-DcuInit=renamed` makes one that lacks cuInit."""
    try:
        flags = [*shared_library.FLAGS, *defines]
        return cached("stub_cuda.so", [stub_cuda.SOURCE], flags, partial(stub_cuda.build, defines=defines))
    except BuildError as error:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip(str(error))
        raise


def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Stub]:
    """fastattn._launcher and its driver. Both are copies in `folder`, so that nothing is shared with other tests."""
    installed = importlib.util.find_spec("fastattn._launcher")
    if installed is None or installed.origin is None:
        pytest.skip("fastattn._launcher is not built: building it takes a C++ compiler")
    copy, library = folder / Path(installed.origin).name, folder / "libcuda.so"
    shutil.copy(installed.origin, copy)
    shutil.copy(build(), library)
    monkeypatch.setenv("FASTATTN_LIBCUDA", str(library))
    # Under a name of its own: pybind11 gives the same module to the same name.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._launcher", copy)
    assert spec is not None and spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    return launcher, Stub(library)


@dataclass(frozen=True)
class Call:
    """One call of a function of libcuda."""

    name: str
    thread: int
    numbers: tuple[int, ...]  # its arguments; pointers as addresses
    data: bytes  # an image, a kernel's name or a kernel's parameters


@dataclass(frozen=True)
class Launch:
    """The arguments of one cuLaunchKernel."""

    kernel: str
    image: str  # that the kernel is from
    device: int  # of the current context
    grid: tuple[int, ...]
    block: tuple[int, ...]
    smem: int
    stream: int
    params: bytes
    thread: int


class Stub:
    """The stub's own side: what it recorded, and what it shall do."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.stub_image_of.restype = self.library.stub_name_of.restype = ctypes.c_char_p

    def calls(self, name: str = "") -> list[Call]:
        """All calls in their order, or those of one function."""
        found = [self._call(i) for i in range(self.library.stub_calls())]
        return [call for call in found if name in ("", call.name)]

    def names(self) -> list[str]:
        """The functions called, in their order."""
        return [call.name for call in self.calls()]

    def clear(self) -> None:
        """Forget the calls."""
        self.library.stub_clear()

    def launches(self) -> list[Launch]:
        """The kernels launched."""
        return [self._launch(call) for call in self.calls("cuLaunchKernel")]

    def fail(self, function: str, error: int, after: int = 0) -> None:
        """Let the function fail once, after so many calls."""
        self.library.stub_fail(function.encode(), error, after)

    def current_device(self) -> int:
        """The device of this thread's context; -1 without one."""
        return self.library.stub_current_device()

    def make_current(self, device: int) -> None:
        """Push the device's primary context in this thread, as torch does."""
        self.library.stub_make_current(device)

    def _call(self, i: int) -> Call:
        name, thread, numbers = ctypes.c_char_p(), ctypes.c_uint64(), (ctypes.c_uint64 * 10)()
        data, size = ctypes.c_void_p(), ctypes.c_size_t()
        references = (ctypes.byref(x) for x in (name, thread, numbers, data, size))
        self.library.stub_call(i, *references)
        assert name.value is not None
        return Call(name.value.decode(), thread.value, tuple(numbers), ctypes.string_at(data, size.value))

    def _launch(self, call: Call) -> Launch:
        function, *sizes, smem, stream, context = call.numbers
        handle = ctypes.c_void_p(function)
        return Launch(
            kernel=self.library.stub_name_of(handle).decode(),
            image=self.library.stub_image_of(handle).decode(),
            device=self.library.stub_device_of(ctypes.c_void_p(context)),
            grid=tuple(sizes[:3]),
            block=tuple(sizes[3:]),
            smem=smem,
            stream=stream,
            params=call.data,
            thread=call.thread,
        )
