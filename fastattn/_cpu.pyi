"""The CPU kernels: fused attention in C++, for every instruction set that this CPU has.

Threads are those of the OpenMP runtime that torch has loaded, else a pool. Everything may be called from any thread.
"""

from torch import Tensor

from .params import AttentionParams

ISAS: tuple[str, ...]  # "avx512", "avx2", "baseline": those that run here, the best first
BLOCK_M: int  # queries of a block
BLOCK_N: int  # keys of a block

def attention_fwd(isa: str, element: str, threads: int, p: AttentionParams, buffers: tuple[Tensor | None, ...]) -> None:
    """Fill out and lse; tokens of no sequence get 0 and -inf.

    Args:
        isa: one of ISAS.
        element: the dtype of q: "float32", "float16" or "bfloat16".
        threads: that may work, at most; the bits do not depend on it.
        p: the problem. The last dimension of q, k and v is contiguous.
        buffers: params.Buffers, as _launcher.pack takes them.

    Raises:
        ValueError: there is no such instruction set or element, or what _launcher.pack refuses.
    """

def attention_bwd(isa: str, element: str, threads: int, p: AttentionParams, buffers: tuple[Tensor | None, ...]) -> None:
    """Fill dq, dk and dv, and add to dbias_partial; tokens of no sequence get 0.

    dq_sum is needed unless dq is float32. Args and errors are those of attention_fwd.
    """

def threading() -> str:
    """What gives the threads: "OpenMP", the runtime of this process, or "pool"."""

def use_pool(uses_pool: bool) -> None:
    """Take the pool although there is an OpenMP runtime, or do so no more."""

def random_words(isa: str, words: int, seed: int, b: int, h: int, rows: int, row: int) -> None:
    """Write dropout's random words of queries 0 ... rows - 1 and keys 0 ... row - 1, and up to 64 words behind them.

    Args:
        words: the address of uint32 numbers, (rows, row) of them.
        row: a multiple of 4.
    """

def exp2(isa: str, x: int, count: int) -> None:
    """Replace float32 numbers by 2^x, a multiple of 16 of them, as the softmax does: 0 below 2^-126.

    Args:
        x: their address.
    """
