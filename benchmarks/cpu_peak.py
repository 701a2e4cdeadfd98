"""What a core of this CPU can do at most in float32, measured: no data sheet knows the clock of a shared machine."""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path

from benchmarks.shared_library import build

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = {"avx512": ("-mavx512f", "-mfma"), "avx2": ("-mavx2", "-mfma")}
ROUNDS, REPETITIONS = 4_000_000, 9  # some milliseconds each


def peak_tflops(isa: str | None) -> float:
    """TFLOP/s of one thread's multiply-adds, none waiting for another or for memory: the best of some runs.

    Args:
        isa: of the CPU kernels; vectors are as wide as it has them.

    Raises:
        BuildError: there is no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "cpu_peak.so")
        build(SOURCE, library, ("-ffp-contract=fast", *FLAGS.get(isa or "", ())))
        multiply_add = ctypes.CDLL(str(library)).multiply_add
        multiply_add.restype = ctypes.c_double
        return 1e-12 * max(_rate(multiply_add) for _ in range(REPETITIONS))


def _rate(multiply_add: ctypes._NamedFuncPointer) -> float:
    start = time.thread_time()
    operations: float = multiply_add(ctypes.c_long(ROUNDS), ctypes.byref(ctypes.c_float(0.5)))
    return operations / (time.thread_time() - start)
