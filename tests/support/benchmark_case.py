"""Tiny cases of the benchmark of attention; benchmarks are run from the repository's root and not installed."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import torch


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def case(mask: str = "none", dtype: torch.dtype = torch.float32, **changes):
    """A tiny one."""
    return dataclasses.replace(module("cases").square("masks", 2, 2, 9, 16, mask, dtype), **changes)


def packed(mask: str = "none"):
    """Three sentences end to end."""
    lengths = {"lengths_q": (3, 9, 5), "lengths_k": (3, 9, 5)}
    return case(mask, layout="packed", batch=3, **lengths)
