"""The CUDA sources and their compilation: attention.cu gives one image per element type and architecture.

An image is what the driver loads: machine code as a cubin (an ELF file), or PTX as text.

Only the standard library and nvrtc.py are imported, so that the installation of fastattn can use this file, too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .nvrtc import Compiled, Nvrtc, Resources, resources

ELEMENTS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}  # torch's name: the type in C++
MIN_CAPABILITY = 60  # 10 * major + minor

# Constexpr functions without __device__ are for every compiler (-default-device). Subnormals are kept and products are
# fused into sums, which are NVRTC's defaults; the fast exponential is named where it is meant, so no --use_fast_math.
# Nor -lineinfo, which would be two thirds of an image.
OPTIONS = ("--std=c++17", "-default-device")
MACHINE_CODE_OPTIONS = ("--ptxas-options=-v",)  # so that the log has every kernel's resources


class Arch(NamedTuple):
    """The target of an image: "sm_XY", machine code, or "compute_XY", PTX that the driver compiles."""

    kind: str
    number: int  # the compute capability, 10 * major + minor

    @classmethod
    def parse(cls, text: str) -> Arch:
        """Reads "compute_60", "sm_60", or "60", which means "sm_60".

        Raises:
            ValueError: it is none of these, or the kernels need a higher compute capability.
        """
        match = re.fullmatch(r"(?:(sm|compute)_)?(\d{2,3})", text)
        if match is None or int(match[2]) < MIN_CAPABILITY:
            raise ValueError(f"must be like 60, sm_60 or compute_60, and at least {MIN_CAPABILITY}, got {text!r}")
        return cls(match[1] or "sm", int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}_{self.number}"


# PTX says the version of its language, and a driver refuses one newer than itself, whatever the text needs. The kernels
# need 7.0, which CUDA 11.0 brought, and the targets the version that knows them.
PTX_VERSION = (7, 0)
PTX_VERSION_OF_TARGET = ((86, (7, 1)), (87, (7, 4)), (89, (7, 8)), (90, (7, 8)))  # from this target on
NEWEST_KNOWN_TARGET = 90


# Machine code for each architecture that compiles differently; PTX for those to come, and to run the first kernels on
# any newer GPU.
ALL_ARCHS = tuple(map(Arch.parse, ("sm_60", "sm_70", "sm_75", "sm_80", "sm_90", "compute_60", "compute_90")))


# The first compute capability whose tensor cores multiply an element type, and their instruction (csrc/mma_units.cuh).
_UNITS = {"float16": {70: "Mma8x8x4", 75: "Mma16x8x8", 80: "Mma16x8x16"}, "bfloat16": {80: "Mma16x8x16"}}


def unit(element: str, arch: Arch) -> str | None:
    """The instruction of tensor cores in the image of an element type; None: its kernels multiply without them."""
    known = [number for number in _UNITS.get(element, {}) if number <= arch.number]
    return _UNITS[element][max(known)] if known else None


def defines(element: str, arch: Arch) -> dict[str, str]:
    """The macros that an image is compiled with, and their values."""
    name = unit(element, arch)
    return {"FASTATTN_ELEMENT": ELEMENTS[element]} | ({"FASTATTN_UNIT": name} if name else {})


def choose(archs: Iterable[Arch], capability: int) -> Arch | None:
    """The best of the architectures that run on a GPU: machine code of its own major version, else PTX.

    Args:
        archs: what there is.
        capability: the GPU's compute capability, 10 * major + minor.
    """
    runs = [arch for arch in archs if arch.number <= capability]
    machine_code = [arch for arch in runs if arch.kind == "sm" and arch.number // 10 == capability // 10]
    return max(machine_code or [arch for arch in runs if arch.kind == "compute"], default=None)


def image_name(element: str, arch: Arch) -> str:
    """The file of an image, such as "attention_float32.sm_60.cubin"."""
    return f"attention_{element}.{arch}.{'cubin' if arch.kind == 'sm' else 'ptx'}"


@dataclass(frozen=True)
class KernelSources:
    """attention.cu and every header of its folder that it includes, by name."""

    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> KernelSources:
        """Reads the sources from csrc/ or a copy of it."""
        files: dict[str, str] = {}
        names = ["attention.cu"]
        while names:
            name = names.pop()
            if name not in files and (folder / name).is_file():  # files for other compilers only are elsewhere
                files[name] = (folder / name).read_text(encoding="utf-8")
                names += re.findall(r'^\s*#\s*include\s+"([^"]+)"', files[name], re.MULTILINE)
        if not files:
            raise FileNotFoundError(f"no attention.cu in {folder}")
        return cls(dict(sorted(files.items())))

    @property
    def digest(self) -> str:
        """A hash that differs between two versions of the sources."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()[:16]

    def compile(self, nvrtc: Nvrtc, element: str, arch: Arch) -> Compiled:
        """The image for one element type and architecture.

        Args:
            nvrtc: the compiler.
            element: one of ELEMENTS.
            arch: the architecture.

        Raises:
            CompileError: the sources do not compile.
        """
        headers = {name: text for name, text in self.files.items() if name != "attention.cu"}
        compiled = nvrtc.compile(
            self.files["attention.cu"],
            str(arch),
            name="attention.cu",
            headers=headers,
            defines=defines(element, arch),
            options=options(arch),
        )
        return compiled if arch.kind == "sm" else compiled._replace(image=with_oldest_version(compiled.image, arch))


def with_oldest_version(ptx: bytes, arch: Arch) -> bytes:
    """PTX that says the oldest version of its language that its text needs; unchanged for targets not known here."""
    if arch.number > NEWEST_KNOWN_TARGET:
        return ptx
    major, minor = max(
        (version for least, version in PTX_VERSION_OF_TARGET if arch.number >= least), default=PTX_VERSION
    )
    changed, count = re.subn(rb"^\.version \d+\.\d+$", b".version %d.%d" % (major, minor), ptx, count=1, flags=re.M)
    if count == 0:
        raise ValueError(f"the PTX for {arch} says no version")
    return changed


def options(arch: Arch) -> tuple[str, ...]:
    """NVRTC's options for an architecture, besides the architecture itself."""
    return OPTIONS + (MACHINE_CODE_OPTIONS if arch.kind == "sm" else ())


def kernels(compiled: Compiled) -> dict[str, Resources | None]:
    """The kernels of an image; those of machine code with their resources."""
    if compiled.image.startswith(b"\x7fELF"):
        return {**resources(compiled.log)}
    return dict.fromkeys(re.findall(r"\.entry (\w+)", compiled.image.decode()))
