"""A plausibility check: the predicted rate of a textbook SGEMM, beside published rates of the P100."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

from fastattn.cuda_kernels import nvrtc

from . import chip
from .machine import cubin, sass
from .machine.execute import execute
from .machine.memory import SECTOR_BYTES
from .machine.trace import BlockTrace
from .tracing import BlockKind, Occupancy, TracedLaunch, block_of

SOURCE = Path(__file__).with_name("sgemm.cu")
TILE, THREADS = 128, 256  # as in the source
# TFLOP/s of cuBLAS's SGEMM of square matrices on "Tesla P100", from the times in the README of github.com/hma02/
# cublasHgemm-P100; which of the two cards it was is not said.
CUBLAS = {1024: 3.58, 4096: 7.61, 8192: 8.54, 32768: 8.72}


def trace(folder: Path, m: int, n: int, k: int, multiprocessors: int) -> TracedLaunch:
    """The traced launch for a product of (m, k) and (k, n), compiled into a folder.

    Raises:
        nvrtc.NotFound: there is no compiler.
    """
    file = folder / "sgemm.cubin"
    file.write_bytes(nvrtc.find(60).compile(SOURCE.read_text(), "sm_60", name=SOURCE.name).image)
    a, b, c = torch.empty(k, m), torch.empty(k, n), torch.empty(m, n)
    program, traced = run(file, a, b, c)
    used = cubin.kernels(file)["sgemm"]
    occupancy = Occupancy(THREADS, used.registers, used.static_smem, chip.resident_blocks(THREADS, *used))
    columns, blocks = n // TILE, m // TILE * (n // TILE)
    at_once = min(occupancy.resident * multiprocessors, blocks)
    sharing = {"a": min(columns, at_once), "b": max(1.0, at_once / columns), "c": 1.0}
    one = block_of(traced, chip.L2_BYTES // SECTOR_BYTES // at_once, sharing)
    return TracedLaunch("sgemm", "float32", program, occupancy, (BlockKind(one, blocks),))


def run(
    file: Path, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, alpha: float = 1.0
) -> tuple[sass.Program, BlockTrace]:
    """Fill the first tile of c with that of alpha a^T b.

    Args:
        file: the cubin.
        a: (k, m) float32.
        b: (k, n) float32.
        c: (m, n) float32.
        alpha: a factor.
    """
    program = sass.disassemble(file, "sgemm")
    (k, m), n = a.shape, b.shape[1]
    params = struct.pack("<3Q3if", *(x.data_ptr() for x in (a, b, c)), m, n, k, alpha)
    buffers = [(a, "a", False), (b, "b", False), (c, "c", True)]
    smem = cubin.kernels(file)["sgemm"].static_smem
    grid = (n // TILE, m // TILE, 1)
    (trace,) = execute(program, grid, THREADS, smem, params, buffers, [(0, 0, 0)]).values()
    return program, trace
