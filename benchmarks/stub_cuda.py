"""Compiles stub_cuda.cpp, a libcuda without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-pthread")


class BuildError(RuntimeError):
    """The compiler is missing or refuses the file; the message says what it said."""


def build(library: Path, defines: Iterable[str] = ()) -> None:
    """Compiles the stub into that file, by g++ or what CXX names.

    Args:
        library: the file to write.
        defines: further flags; `-DcuInit=renamed` makes a library that lacks cuInit.

    Raises:
        BuildError: it cannot be compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"{compiler}: not found; stub_cuda.cpp needs a C++ compiler (or set CXX)")
    done = subprocess.run([compiler, *FLAGS, *defines, SOURCE, "-o", library], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{compiler} cannot compile {SOURCE}:\n{done.stdout}{done.stderr}")
