"""Launches kernels of a library made by build.py, and turns what the executor found into an exception.

    library = load("tests/simt/kernels/matmul.cu", checked=True)
    library.launch("matmul", grid=(4, 4), block=(16, 16), params=MatmulParams(...), buffers=[(a, "a", False), ...])

A schedule is the order in which threads (and blocks) get to run between two barriers: "in-order", "reversed", or an
integer, the seed of a random one. A correct kernel gives the same bits in all of them.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.simt.build import EXECUTOR, BuildError, build

MAX_THREADS = 1024
MAX_DYNAMIC_SHARED = 232448
SCHEDULES = ("in-order", "reversed", 1)
HEADERS = (EXECUTOR.resolve(), EXECUTOR.resolve() / "ptx")

Buffer = tuple[torch.Tensor, str, bool]
_running = threading.Lock()


@dataclass(frozen=True)
class Report:
    """One defect. `sites` are "file:line": where it was found and, for a race or a meeting, the other place."""

    kind: str
    address: str
    sites: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        parts = (self.kind, self.address and f"at {self.address}", " after ".join(self.sites), self.text)
        return ": ".join(part for part in parts if part)


class SimtError(AssertionError):
    """A launch with defects, all of them in `reports`."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = tuple(reports)
        super().__init__("\n".join(map(str, reports)))

    @property
    def kinds(self) -> set[str]:
        return {report.kind for report in self.reports}


class _Kernel(ctypes.Structure):
    _fields_ = (("run", ctypes.c_void_p), ("params_bytes", ctypes.c_size_t))


def _tool(name: str, *arguments: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"{name}: not found; it comes with binutils, as the linker does")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


class Library:
    """The kernels of one shared library."""

    def __init__(self, path: Path, checked: bool) -> None:
        self.path, self.checked = path, checked
        self._library = ctypes.CDLL(str(path))
        self._library.simt_report.restype = ctypes.c_char_p
        if checked:
            for offset, size, name in self._shared_arrays():
                self._library.simt_add_shared_array(ctypes.c_size_t(offset), ctypes.c_size_t(size), name.encode())

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        params: bytes | ctypes.Structure,
        *,
        dynamic_smem: int = 0,
        buffers: Sequence[Buffer] = (),
        schedule: str | int = "in-order",
    ) -> None:
        """Run one kernel on CPU memory.

        Args:
            kernel: the name given to SIMT_EXPORT.
            grid, block: one to three sizes.
            params: the kernel's one argument, a struct.
            dynamic_smem: bytes.
            buffers: (tensor, name, writable) of all memory the kernel may touch; used by a checked library.
            schedule: "in-order", "reversed" or the seed of a random order.

        Raises:
            SimtError: defects were found; outputs then mean nothing.
            ValueError: no such kernel, or a launch that no GPU would accept.
        """
        entry = self._kernel(kernel, bytes(params))
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        check_launch(grid, block, dynamic_smem)
        order, seed = _schedule(schedule)
        argument = ctypes.create_string_buffer(bytes(params), max(1, len(bytes(params))))
        with _running:
            if self.checked:
                for tensor, name, writable in buffers:
                    self._add_buffer(tensor, name, writable)
            self._library.simt_launch(
                *(ctypes.byref(entry), argument, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)),
                *(ctypes.c_size_t(dynamic_smem), order, ctypes.c_uint64(seed), int(self.checked)),
            )
            self._library.simt_clear_buffers()
            reports = self._reports()
        if reports:
            raise SimtError(reports)

    def _kernel(self, name: str, params: bytes) -> _Kernel:
        try:
            kernel = _Kernel.in_dll(self._library, f"simt_kernel_{name}")
        except ValueError:
            raise ValueError(f"kernel: {self.path.name} exports no kernel {name!r}") from None
        if kernel.params_bytes != len(params):
            raise ValueError(f"params: {name} takes a struct of {kernel.params_bytes} bytes, got {len(params)}")
        return kernel

    def _add_buffer(self, tensor: torch.Tensor, name: str, writable: bool) -> None:
        if tensor.numel() == 0:
            return
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self._library.simt_add_buffer(
            *(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(extent * tensor.element_size())),
            *(name.encode(), int(writable), tensor.element_size().bit_length() - 1),
        )

    def _shared_arrays(self) -> list[tuple[int, int, str]]:
        """(offset, bytes, name) of the static __shared__ arrays: the library's thread-local symbols."""
        row = re.compile(r"^\s*\d+: ([0-9a-f]+)\s+(\w+) TLS\s+\w+\s+\w+\s+\d+ (.+)$", re.MULTILINE)
        symbols = row.findall(_tool("readelf", "--syms", "--wide", "--demangle", str(self.path)))
        arrays = ((int(offset, 16), int(size, 0), name.split("::")[-1]) for offset, size, name in symbols)
        return sorted({array for array in arrays if array[2] not in ("smem", "simt_storage", "simt_static_storage")})

    def _reports(self) -> list[Report]:
        rows = [self._library.simt_report(ctypes.c_size_t(i)) for i in _until_none(self._library.simt_report)]
        fields = [row.decode().split("\t") for row in rows]
        addresses = {site[1:] for _, _, *sites, _ in fields for site in sites if site.startswith("@")}
        lines = self._source_lines(sorted(addresses))
        reports: dict[tuple, Report] = {}
        for kind, address, *sites, text in fields:
            places = tuple(lines.get(site[1:], Path(site).name) for site in sites if site)
            # Compilers repeat code, so one place in the source may have reported more than once.
            reports.setdefault((kind, places), Report(kind, address, places, text))
        return list(reports.values())

    def _source_lines(self, addresses: list[str]) -> dict[str, str]:
        """The kernel's line for each code address; a line inside the executor's headers gives way to its caller."""
        if not addresses:
            return {}
        output = _tool("addr2line", "--addresses", "--inlines", "--exe", str(self.path), *addresses)
        lines = {}
        for chunk in re.split(r"^0x", output, flags=re.MULTILINE)[1:]:
            address, *frames = chunk.splitlines()
            places = [frame.split(" (")[0] for frame in frames]
            own = [place for place in places if Path(place.split(":")[0]).resolve().parent not in HEADERS]
            lines[f"{int(address, 16):x}"] = Path((own or places)[0]).name
        return lines


def _until_none(report) -> itertools.takewhile:
    return itertools.takewhile(lambda i: report(ctypes.c_size_t(i)) is not None, itertools.count())


def _schedule(schedule: str | int) -> tuple[int, int]:
    if isinstance(schedule, int):
        return 2, schedule
    if schedule not in ("in-order", "reversed"):
        raise ValueError(f"schedule: 'in-order', 'reversed' or an integer seed, got {schedule!r}")
    return int(schedule == "reversed"), 0


def check_launch(grid: Sequence[int], block: Sequence[int], dynamic_smem: int) -> None:
    """Raises ValueError for a launch that no GPU would accept."""
    threads = block[0] * block[1] * block[2]
    if min(block) < 1 or threads > MAX_THREADS or block[2] > 64:
        raise ValueError(f"block: 1 to {MAX_THREADS} threads, at most 64 in z, got {tuple(block)}")
    if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
        raise ValueError(f"grid: 1 to 65535 blocks in y and z, below 2^31 in x, got {tuple(grid)}")
    if not 0 <= dynamic_smem <= MAX_DYNAMIC_SHARED:
        raise ValueError(f"dynamic_smem: 0 to {MAX_DYNAMIC_SHARED} bytes, got {dynamic_smem}")


def load(source: Path | str, *, checked: bool = False, defines: tuple[str, ...] = ()) -> Library:
    """Build (or look up) the library of a kernel file and load it; arguments as of build()."""
    return Library(build(source, checked=checked, defines=defines), checked)


def guarded(tensor: torch.Tensor, margin: int = 1 << 16) -> torch.Tensor:
    """A contiguous copy with nothing else within `margin` bytes: an access past its end hits no other tensor."""
    margin //= tensor.element_size()
    memory = torch.zeros(tensor.numel() + 2 * margin, dtype=tensor.dtype)
    return memory[margin : margin + tensor.numel()].view(tensor.shape).copy_(tensor)
