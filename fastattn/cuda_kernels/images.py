"""The compiled CUDA kernels: the image (cubin or PTX) that a GPU gets, installed or else compiled at run time.

Two variables of the environment are read at each call. FASTATTN_CUDA_IMAGE, such as "compute_60" or "sm_80", names the
image that every GPU gets instead of the one chosen here; it is compiled if this installation lacks it. With
FASTATTN_CACHE_DIR, what was compiled is kept there and not in ~/.cache/fastattn.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import nvrtc
from .sources import ELEMENTS, MIN_CAPABILITY, Arch, KernelSources, choose, image_name, options, unit


class ImageError(RuntimeError):
    """There is no image for a GPU; the message says why, and what to do."""


@dataclass(frozen=True)
class Installed:
    """The compiled kernels of an installation."""

    archs: tuple[Arch, ...]
    nvrtc: str | None  # the version that compiled them
    sources: str | None  # KernelSources.digest of their sources
    commit: str | None
    reason: str | None  # why there are none


def selected(capability: tuple[int, int], have: Installed) -> Arch | None:
    """The architecture of the image that a GPU gets; None if it has to be compiled at run time, whatever it will be.

    Args:
        capability: the GPU's compute capability.
        have: the images to select from; here, `installed()`.

    Raises:
        ImageError: the GPU is too old.
        ValueError: FASTATTN_CUDA_IMAGE names nothing, or nothing that runs there.
    """
    number = 10 * capability[0] + capability[1]
    if number < MIN_CAPABILITY:
        raise ImageError(
            f"the CUDA kernels need compute capability >= {_dotted(MIN_CAPABILITY)}, got {_dotted(number)}"
        )
    text = os.environ.get("FASTATTN_CUDA_IMAGE")
    if not text:
        return choose(have.archs, number)
    try:
        forced = Arch.parse(text)
    except ValueError as error:
        raise ValueError(f"FASTATTN_CUDA_IMAGE: {error}") from None
    if choose([forced], number) is None:
        raise ValueError(f"FASTATTN_CUDA_IMAGE: {forced} does not run on compute capability {_dotted(number)}")
    return forced


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def has_mma(element: str, capability: tuple[int, int]) -> bool:
    """Whether tensor cores multiply in the image of an element type that a GPU gets: it has other kernels then.

    Args:
        element: "float32", "float16" or "bfloat16".
        capability: the GPU's compute capability.

    Raises:
        ImageError: the GPU is too old.
        ValueError: FASTATTN_CUDA_IMAGE names nothing, or nothing that runs there.
    """
    arch = selected(capability, installed()) or Arch("sm", 10 * capability[0] + capability[1])
    return unit(element, arch) is not None


@dataclass(frozen=True)
class Installation:
    """Where an installation has its kernels, their sources and a compiler."""

    kernels: Path  # the folder of the images and their build.json
    csrc: Path  # the sources, unless that folder contains them: beside the package, if it is editable
    find: Callable[[int | None], nvrtc.Nvrtc] = nvrtc.find  # the compiler for run time

    def manifest(self) -> dict[str, Any]:
        """The build.json of scripts/build_native.py."""
        try:
            return json.loads((self.kernels / "build.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"reason": "fastattn is not installed: this is a copy of its files"}

    def installed(self) -> Installed:
        """The compiled kernels, as build.json describes them."""
        manifest = self.manifest()
        return Installed(
            archs=tuple(Arch.parse(arch) for arch in manifest.get("architectures", ())),
            nvrtc=manifest.get("nvrtc"),
            sources=manifest.get("sources"),
            commit=manifest.get("commit"),
            reason=manifest.get("reason"),
        )

    def sources(self) -> KernelSources:
        """The CUDA sources: those that the installation contains or, in an editable one, those beside the package.

        Raises:
            FileNotFoundError: it has neither.
        """
        contained = self.kernels / "src"
        return KernelSources.read(contained if contained.is_dir() else self.csrc)

    def check_current(self, have: Installed) -> None:
        """Raises ImageError if the sources beside an editable installation are no longer those of its images."""
        now = self.sources().digest
        if have.sources != now:
            message = f"csrc has changed since its kernels were compiled ({have.sources}, now {now})"
            raise ImageError(f"{message}; to compile them: python scripts/build_native.py")

    def image(self, element: str, capability: tuple[int, int]) -> bytes:
        """The image of all kernels for one element type, as cuModuleLoadData takes it.

        Machine code for exactly this compute capability, else for the highest lower one of the same major version, else
        the newest PTX, which the driver compiles, else what NVRTC makes of the sources now, kept for the next time.

        Args:
            element: "float32", "float16" or "bfloat16".
            capability: the GPU's compute capability.

        Raises:
            ImageError: the GPU is too old, the sources have changed since they were compiled, or there is no image that
                runs and none can be compiled.
            ValueError: element is none of these, or FASTATTN_CUDA_IMAGE names nothing that runs there.
        """
        if element not in ELEMENTS:
            raise ValueError(f"element: must be one of {', '.join(ELEMENTS)}, got {element!r}")
        have = self.installed()
        arch = selected(capability, have)
        if arch in have.archs:
            self.check_current(have)
            return (self.kernels / image_name(element, arch)).read_bytes()
        return self._compile(element, 10 * capability[0] + capability[1], arch)

    def _compile(self, element: str, capability: int, forced: Arch | None) -> bytes:
        """An image from the cache of this user or, the first time, from NVRTC."""
        try:
            files = self.sources()
            arch, compiler = self._compiler_for(capability, forced)
        except (FileNotFoundError, nvrtc.NotFound) as error:
            have = self.installed()
            archs = ", ".join(map(str, have.archs)) or f"none ({have.reason})"
            wanted = forced or f"compute capability {_dotted(capability)}"
            fix = f"install fastattn again with FASTATTN_CUDA_ARCHS={forced or capability}"
            raise ImageError(f"no compiled CUDA kernels for {wanted}: there are {archs}; {error}; or {fix}") from None
        file = cached_file(files.digest, compiler.version, options(arch), element, arch)
        content = _read_checked(file)
        if content is None:
            where = f"{arch}, once; they are kept in {file.parent}"
            print(f"fastattn: NVRTC {compiler.version} compiles the {element} kernels for {where}", file=sys.stderr)
            content = files.compile(compiler, element, arch).image
            _write_checked(file, content)
        return content

    def _compiler_for(self, capability: int, forced: Arch | None) -> tuple[Arch, nvrtc.Nvrtc]:
        """Machine code for the GPU itself if an NVRTC knows it, else PTX for the newest that the first one knows."""
        if forced is not None:
            return forced, self.find(forced.number)
        with contextlib.suppress(nvrtc.NotFound):
            return Arch("sm", capability), self.find(capability)
        compiler = self.find(None)
        known = [Arch("compute", number) for number in compiler.architectures if number >= MIN_CAPABILITY]
        arch = choose(known, capability)
        if arch is None:
            raise nvrtc.NotFound(f"NVRTC {compiler.version} compiles for nothing that runs there ({nvrtc.INSTALL})")
        return arch, compiler


HERE = Installation(kernels=Path(__file__).parents[1] / "_kernels", csrc=Path(__file__).parents[2] / "csrc")
installed, sources, image = HERE.installed, HERE.sources, HERE.image


# ---- what was compiled at run time ----


def cache_dir() -> Path:
    """The folder of images that were compiled at run time."""
    if named := os.environ.get("FASTATTN_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def cached_file(sources: str, version: str, flags: tuple[str, ...], element: str, arch: Arch) -> Path:
    """The file of an image that was compiled at run time, under a hash of everything it depends on.

    Args:
        sources: KernelSources.digest.
        version: that of NVRTC.
        flags: its options.
        element: the element type.
        arch: the architecture.
    """
    key = repr((sources, version, flags, element, arch))
    return cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.{image_name(element, arch)}"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _read_checked(file: Path) -> bytes | None:
    """A file of the cache, whose first bytes are the digest of the others; None if there is none or it is damaged."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    content = stored[32:]
    return content if stored[:32] == _digest(content) else None


def _write_checked(file: Path, content: bytes) -> None:
    """Replaces the file as a whole: other processes may write it, too. If that fails, the next one compiles again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
            new.write(_digest(content) + content)
        os.replace(new.name, file)
