"""The native build on a small tree of its own: one CUDA kernel, two architectures, a few lines of C++."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = "60;compute_80"
IMAGES = {f"attention_{e}.{a}" for e in ("float32", "float16", "bfloat16") for a in ("sm_60.cubin", "compute_80.ptx")}

KERNELS = """
#include "table.h"
extern "C" __global__ void first(FASTATTN_ELEMENT* x) { x[0] = FASTATTN_ELEMENT(kFactor); }
extern "C" __global__ void second() {}
"""
TABLE = """
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "elsewhere.h"
#endif
constexpr float kFactor = 3.0f;
"""
LAUNCHER = '#include "driver.h"\nextern "C" int answer() { return kAnswer; }\n'
CPU_KERNELS = """
#include "../attention.h"
#include "vectors.h"
#define JOINED(a, b) a##b
#define KERNELS_OF(isa) JOINED(isa, _kernels)
extern "C" int KERNELS_OF(FASTATTN_ISA)() { return kLanes + kLongest; }
"""
CPU_MODULE = '#include "../attention.h"\n#include "work.h"\nextern "C" int longest() { return kLongest + kWork; }\n'
SOURCES = {
    "attention.cu": KERNELS,
    "table.h": TABLE,
    "launcher.cpp": LAUNCHER,
    "driver.h": "constexpr int kAnswer = 42;\n",
    "attention.h": "constexpr int kLongest = 1;\n",
    "cpu/kernels.cpp": CPU_KERNELS,
    "cpu/vectors.h": "constexpr int kLanes = 4;\n",
    "cpu/module.cpp": CPU_MODULE,
    "cpu/work.h": "constexpr int kWork = 2;\n",
}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "scripts" / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))  # where it finds its own modules, as a script does
    spec.loader.exec_module(module)
    return module


build_native = load()
build_settings = sys.modules["build_settings"]
LAUNCHER_FILE, CPU_FILE = build_native.LAUNCHER, build_native.CPU_MODULE
EXTENSIONS = {LAUNCHER_FILE, CPU_FILE}
ISAS = list(build_native.cpu_sources.isas())
CPU = {"isas": ISAS}  # in build.json
CPU_EDGES = f"{len(ISAS) + 2} CPU"  # the objects, that of the module, the link
Settings = build_native.Settings
lacking = build_native.why_no_cuda(Settings.read({}))
needs_tools = pytest.mark.skipif(lacking is not None, reason=f"the native build: {lacking}")

MODULES = [f"cuda_kernels/{name}" for name in ("__init__", "gpus", "nvrtc", "sources")]
MODULES += [f"cpu_kernels/{name}" for name in ("__init__", "sources")]


class Tree:
    """A copy of the build's own files with small sources."""

    said = ""  # output of the first build

    def __init__(self, folder: Path):
        self.folder, self.package = folder, folder / "fastattn"
        files = [
            *(f"scripts/build_{name}.py" for name in ("native", "settings", "backend")),
            *(f"fastattn/{name}.py" for name in MODULES),
        ]
        for name in [*files, "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (self.package / "__init__.py").write_text("")
        for name, text in SOURCES.items():
            self.write(f"csrc/{name}", text)

    def copy(self, folder: Path) -> Tree:
        """Another tree with everything that was built in this one."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
        copy = Tree.__new__(Tree)
        copy.folder, copy.package = folder, folder / "fastattn"
        return copy

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
        environment = inherited | {"FASTATTN_CUDA_ARCHS": ARCHS} | environment
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)

    def build(self, **environment: str) -> str:
        """Runs the build, which has to succeed; returns its output."""
        result = self.run("scripts/build_native.py", **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def failure(self, **environment: str) -> str:
        """Runs the build, which has to fail; returns its output."""
        result = self.run("scripts/build_native.py", **environment)
        assert result.returncode != 0, result.stdout
        return result.stdout + result.stderr

    @property
    def manifest(self) -> dict:
        return json.loads((self.package / "_kernels/build.json").read_text())

    @property
    def built(self) -> set[str]:
        """The files of the native part in the package."""
        names = {str(file.relative_to(self.package)) for file in self.package.rglob("*") if file.is_file()}
        return {name.removeprefix("_kernels/") for name in names if name.startswith("_kernels/") or name in EXTENSIONS}


def edges(output: str) -> set[str]:
    """The edges that ninja ran, by kind and with their number: {"6 NVRTC", "1 C++", "5 CPU"}."""
    ran = re.findall(r"^\[\d+/\d+\] (NVRTC|C\+\+|CPU)", output, re.MULTILINE)
    is_idle = [bool(re.search(r"^ninja: no work to do", part, re.MULTILINE)) for part in output.split("Entering")[1:]]
    assert is_idle and bool(ran) is not all(is_idle)
    return {f"{ran.count(kind)} {kind}" for kind in set(ran)}
