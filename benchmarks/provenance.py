"""The origin of numbers: the device, the versions and the commit."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastattn
from benchmarks import host
from fastattn.backends import CallTraits, choose
from fastattn.info import DTYPES, HEAD_DIM, gather
from fastattn.machine import detect

TILES = Path(fastattn.__file__).parent / "triton_kernels/tiles.csv"
# What benchmarks write: a change of it is no change of the sources.
MEASURED = ("benchmarks/results", "fastattn/triton_kernels/tiles.csv")


def device_name(device: torch.device) -> str:
    """The GPU's name, such as "Tesla P100-SXM2-16GB", or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {host.model()}"


def folder_name(device: torch.device) -> str:
    """The device's name as part of a path, such as tesla-p100-sxm2-16gb."""
    return re.sub("[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def provenance(device: torch.device) -> dict[str, Any]:
    """The origin of the numbers of a run, in types that JSON knows."""
    report = gather(detect())
    return {
        "device": device_name(device),
        "driver": report["driver"],
        "cuda": report["torch_cuda"],
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_before": host.load(),
        "cpu": host.facts() if device.type == "cpu" else None,
        "backends": _choices(device),
        "versions": report["versions"],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", *(f":!{path}" for path in MEASURED))),
        "tiles": hashlib.sha256(TILES.read_bytes()).hexdigest()[:16],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _choices(device: torch.device) -> dict[str, str]:
    """The backend that fastattn takes for the usual call, by dtype."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    calls = [CallTraits(device.type, capability, dtype, HEAD_DIM, HEAD_DIM) for dtype in DTYPES]
    return {str(call.dtype).removeprefix("torch."): choose(call).name for call in calls}


def _git(*arguments: str) -> str | None:
    """The answer of git; None outside a repository or without git."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None
