"""The compilation of csrc/cpu: kernels.cpp gives one object for each instruction set, module.cpp finds those that run.

Only the standard library is imported, so that the installation of fastattn can use this file, too.
"""

from __future__ import annotations

import platform

# Products are fused into sums; nothing reads errno or floating-point exceptions, so that conditional operations may
# become vectors. GCC's notes on vectors as arguments are for functions that others call.
OPTIONS = ("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
KERNEL_OPTIONS = (*OPTIONS, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")

# The instruction sets of each machine with the compiler's options, the best first. module.cpp runs one where the CPU
# has all that they name. NEON is part of every aarch64.
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx512": (*_AVX2, *_AVX512), "avx2": _AVX2, "baseline": ()},
    "aarch64": {"baseline": ()},
}


def isas(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """The rows of ISAS for a machine, by default this one; one that is unknown has the baseline alone."""
    return ISAS.get(machine or platform.machine(), {"baseline": ()})


def kernel_options(isa: str, machine: str | None = None) -> tuple[str, ...]:
    """The compiler's options for the kernels of an instruction set."""
    return (*KERNEL_OPTIONS, *isas(machine)[isa], f"-DFASTATTN_ISA={isa}")
