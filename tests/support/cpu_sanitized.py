"""Run cases on a sanitized library: python -m tests.support.cpu_sanitized LIBRARY CASE ...

In a process of its own, which loads the sanitizers first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.simt.build import ROOT, compiler

# Python leaks by design, and torch does so for its caches.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run_sanitized(library: Path, cases: list[str], seconds: int = 600) -> subprocess.CompletedProcess[str]:
    """Runs the contract for the cases, by their names; the process fails where a sanitizer finds something."""
    asan = subprocess.run([compiler()[0], "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | OPTIONS | {"LD_PRELOAD": asan.stdout.strip(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", __name__, str(library), *cases]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


def main() -> None:
    from tests.support.cases import Case
    from tests.support.contract import check
    from tests.support.cpu_library import Library, on_library
    from tests.support.cpu_runs import in_threads

    library = Library(Path(sys.argv[1]))
    library.use_pool()
    for n, name in enumerate(sys.argv[2:]):
        with on_library(library), in_threads(n % 3 + 1):
            check(Case.parse(name))
    print("right")


if __name__ == "__main__":
    main()
