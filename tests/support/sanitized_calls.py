"""Calls of the CUDA kernels under compute-sanitizer, whose references are computed before and outside of it.

python -m tests.support.sanitized_calls make FILE
compute-sanitizer python -m tests.support.sanitized_calls run FILE [BACKEND]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import fastattn
from tests.support.cases import Case
from tests.support.contract import call, call_reference, condition, run
from tests.support.tolerance import Condition, assert_close_to_oracle

# Few blocks, with every feature; more than one tile of queries and of keys, and tiles that are not full.
VARIED = Case(
    dtype=torch.float16, mask="padding", bias="per-head", band="window", dropout_p=0.3, heads=(4, 2), seqlens=(70, 75)
)
CASES = (
    VARIED,
    replace(VARIED, packed=True, dtype=torch.bfloat16),
    replace(VARIED, dtype=torch.float32, seqlens=(130, 270), dims=(64, 64), heads=(2, 1)),
)


def make(file: Path) -> None:
    """Writes what the cases should give."""
    torch.save([expected(case) for case in CASES], file)


def expected(case: Case) -> tuple:
    """The results in float64 and in the case's dtype, and the rounding that it allows."""
    exact, eager = (run(call_reference, case, dtype) for dtype in (torch.float64, case.dtype))
    return exact, eager, vars(condition(case))


def check(file: Path, backend: str, device: str) -> int:
    """Compares the results of a backend with them; returns how many cases there were."""
    for case, (exact, eager, rounding) in zip(CASES, torch.load(file), strict=True):
        with fastattn.use_backend(backend):
            actual = run(call, case, case.dtype, device)
        for name, x in actual.items():
            assert_close_to_oracle(name, x.cpu(), exact[name], eager[name], Condition(**rounding))
    return len(CASES)


def main() -> None:
    what, file, *rest = sys.argv[1:]
    if what == "make":
        make(Path(file))
    else:
        backend = rest[0] if rest else "cuda"
        print(check(Path(file), backend, "cuda" if backend in ("cuda", "triton") else "cpu"), "cases are right")


if __name__ == "__main__":
    main()
