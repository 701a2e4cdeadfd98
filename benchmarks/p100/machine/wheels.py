"""Wheels, fetched with pip for what lies in them; nothing of them is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class NotFound(RuntimeError):
    """The error that a wheel cannot be downloaded; the message says why."""


def download(requirement: str, python: str, platform: str, to: Path, sha256: str | None = None) -> Path:
    """Download the wheel of a requirement into a folder.

    Args:
        requirement: such as "triton==3.3.1", or a file.
        python: the version of Python that it is for.
        platform: its tag, such as "manylinux2014_x86_64".
        to: the folder.
        sha256: what its content must have; by default, any.

    Raises:
        NotFound: it cannot be downloaded, or has another sha256.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    which = ["--only-binary=:all:", f"--python-version={python}", f"--platform={platform}", "--dest", str(to)]
    wanted = [requirement]
    if sha256 is not None:
        hashed = to / "requirement.txt"
        hashed.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        wanted = ["--require-hashes", "--requirement", str(hashed)]
    found = subprocess.run([*pip, *which, *wanted], capture_output=True, text=True)
    wheels = [*to.glob("*.whl")]
    if found.returncode != 0 or not wheels:
        raise NotFound(f"`pip download {requirement}` does not work: {found.stderr.strip()}")
    return wheels[0]
