"""The memory that a call on the CPU kernels takes grows with the length, not with its square."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.cpu_runs import on_cpu, results

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LENGTH = 16384
SCORES = LENGTH**2  # bytes that a mask would take; float scores four times as many


def memory(of: str) -> int:
    """VmHWM: the largest resident memory since it was reset, VmRSS: that of now; in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{of}:"))
    return int(line.split()[1]) * 1024


def peak_of(dtype: torch.dtype, seqlen: int, **arguments: object) -> int:
    """Bytes that both passes take beyond what there was."""
    q, k, v = (torch.randn(1, 1, seqlen, 8).to(dtype) for _ in range(3))
    CLEAR.write_text("5")
    before = memory("VmRSS")
    with on_cpu():
        results(q, k, v, **arguments)
    return memory("VmHWM") - before


@pytest.mark.long
@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_scores(dtype: torch.dtype) -> None:
    key = torch.arange(LENGTH)
    limits = {"is_causal": True, "attn_mask": key != 100, "bias": torch.zeros(LENGTH), "dropout_p": 0.1}
    with on_cpu():  # what is loaded at the first call
        results(*torch.randn(3, 1, 1, 64, 8).to(dtype))
    assert peak_of(dtype, LENGTH, **limits) < SCORES / 8


@pytest.mark.long
@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc")
def test_a_matrix_of_scores_would_be_seen() -> None:
    CLEAR.write_text("5")
    before = memory("VmRSS")
    torch.ones(SCORES, dtype=torch.bool)
    assert memory("VmHWM") - before > SCORES / 2
