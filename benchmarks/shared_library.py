"""Compiles a C++ file beside a benchmark into a shared library."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-pthread")


class BuildError(RuntimeError):
    """The compiler is missing or refuses the file; the message says what it said."""


def build(source: Path, library: Path, flags: Iterable[str] = ()) -> None:
    """Compiles a file by g++ or what CXX names.

    Args:
        source: the file.
        library: the file to write.
        flags: besides FLAGS.

    Raises:
        BuildError: it cannot be compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"{compiler}: not found; {source.name} needs a C++ compiler (or set CXX)")
    done = subprocess.run([compiler, *FLAGS, *flags, source, "-o", library], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{compiler} cannot compile {source}:\n{done.stdout}{done.stderr}")
