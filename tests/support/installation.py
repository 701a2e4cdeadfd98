"""Installations of the kernels, described by files, and compilers that note what they compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastattn.cuda_kernels import nvrtc
from fastattn.cuda_kernels.images import Installation
from fastattn.cuda_kernels.sources import ELEMENTS, Arch, KernelSources, image_name

KERNEL = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
extern "C" __global__ void f(float* x) { *x = sizeof(FASTATTN_ELEMENT); }
"""
SOURCES = KernelSources({"attention.cu": KERNEL})


def describe(folder: Path, *archs: str, reason: str | None = None, compiler: nvrtc.Nvrtc | None = None) -> Installation:
    """An installation in the folder: its architectures, or the reason for none. Images hold their names.

    Args:
        folder: of the test.
        archs: the architectures of its images.
        reason: why it has none.
        compiler: the only one that it finds.
    """
    kernels = folder / "_kernels"
    (kernels / "src").mkdir(parents=True)
    for name, text in SOURCES.files.items():
        (kernels / "src" / name).write_text(text)
    for arch in map(Arch.parse, archs):
        for element in ELEMENTS:
            (kernels / image_name(element, arch)).write_text(image_name(element, arch))
    manifest = {"architectures": archs, "nvrtc": "12.9", "sources": SOURCES.digest, "commit": None}
    (kernels / "build.json").write_text(json.dumps({"reason": reason} if reason else manifest))
    here = Installation(kernels, csrc=folder / "none")
    return here if compiler is None else replace(here, find=only(compiler))


class Recorder(nvrtc.Nvrtc):
    """A compiler that notes what it compiles, in order: element type and architecture."""

    def __init__(self, library: Path, include: Path):
        super().__init__(library, include)
        self.compiled: list[tuple[str, str]] = []

    def compile(self, source: str, arch: str, **how) -> nvrtc.Compiled:
        self.compiled.append((how["defines"]["FASTATTN_ELEMENT"], arch))
        return super().compile(source, arch, **how)


def only(compiler: nvrtc.Nvrtc) -> Callable[[int | None], nvrtc.Nvrtc]:
    """The search for a compiler on a machine that has this one alone."""

    def find(capability: int | None) -> nvrtc.Nvrtc:
        if capability is None or capability in compiler.architectures:
            return compiler
        raise nvrtc.NotFound(f"{compiler.library} does not compile for {capability}")

    return find
