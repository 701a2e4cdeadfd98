"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, which see what is planted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fastattn.cpu_kernels import attention
from tests.support.cases import SEVERAL_TILES, WITHIN_ONE_TILE, pairwise
from tests.support.cpu_library import CSRC, RACES, SANITIZED, build, build_standalone, changed
from tests.support.cpu_sanitized import run_sanitized

pytestmark = pytest.mark.slow
CASES = [str(case) for case in pairwise() + WITHIN_ONE_TILE + SEVERAL_TILES]


@pytest.mark.parametrize("isa", attention.ISAS)
def test_no_access_outside_and_nothing_undefined(isa: str) -> None:
    found = run_sanitized(build(isa, SANITIZED), CASES)
    assert found.returncode == 0 and found.stdout == "right\n", found.stdout + found.stderr


PLANTED = {
    "a row read past its end": (
        ("elements.h", "    if (count >= kLanes) return load(p);\n", "    return load(p);\n"),
        "ERROR: AddressSanitizer",
    ),
    "dq written past its end": (
        ("elements.h", "    if (count >= kLanes) return store(p, x);\n", "    return store(p, x);\n"),
        "ERROR: AddressSanitizer",
    ),
    "scratch memory too small": (
        ("backward.h", "2 * n * (d + dv) + kBlockN * d + kBlockM", "2 * n * (d + dv) + kBlockM"),
        "ERROR: AddressSanitizer",
    ),
    "a sum that overflows": (("scores.h", "min(p.right, 2 * kLongest)", "p.right"), "signed integer overflow"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str, tmp_path: Path) -> None:
    change, report = PLANTED[name]
    library = build("baseline", SANITIZED, changed(tmp_path, *change), tmp_path)
    found = run_sanitized(library, ["seqlens=17x63,dims=7x7", "seqlens=150x300,dims=13x13"])
    assert found.returncode != 0 and report in found.stderr, found.stdout + found.stderr


def races(csrc: Path, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The program under ThreadSanitizer: libgomp is not instrumented, the pool is."""
    kept = {} if cache is None else {"cache": cache}
    program = build_standalone("baseline", RACES, csrc, **kept)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}  # a race may end in a wait without end
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)


def test_no_races_in_the_pool() -> None:
    found = races(CSRC)
    assert found.returncode == 0 and found.stdout.endswith("right\n"), found.stdout + found.stderr


PLANTED_RACES = {
    "a count without its lock": (
        "threads.h",
        "            lock.lock();\n            if (--left_",
        "            if (--left_",
    ),
    "a key block's task writes dq": ("work.h", "j + kernels.block_n, false, true}", "j + kernels.block_n, true, true}"),
}


@pytest.mark.parametrize("name", PLANTED_RACES)
def test_planted_races_are_found(name: str, tmp_path: Path) -> None:
    found = races(changed(tmp_path, *PLANTED_RACES[name]), tmp_path)
    assert found.returncode != 0 and "data race" in found.stderr, found.stdout + found.stderr
