"""setuptools' build backend, which asks for NVIDIA's compiler only where CUDA kernels are compiled."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # what pip and build look for in a backend
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The last one for the P100, 90 MB.
NVRTC = ["nvidia-cuda-nvrtc-cu12==12.9.*", "nvidia-cuda-runtime-cu12==12.9.*"]


def nvrtc() -> list[str]:
    """The requirements of compiling the CUDA kernels; none where that is not wanted, not needed or not possible."""
    is_wanted = os.environ.get("FASTATTN_BUILD_CUDA") != "0" and not os.environ.get("FASTATTN_PREBUILT_KERNELS")
    is_there = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return NVRTC if is_wanted and is_there else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel is built with, besides what pyproject.toml names."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *nvrtc()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable installation is built with, besides what pyproject.toml names."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *nvrtc()]
