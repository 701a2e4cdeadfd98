"""The CUDA kernels' way to the driver: the table of kernels, and one call from tensors to a launch.

Importing asks nothing of the machine. The first launch, or question about a device, opens libcuda.so.1, or the library
that the environment variable FASTATTN_LIBCUDA names. Everything may be called from any thread.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .params import AttentionParams

class Kernel(NamedTuple):
    """One row of the table in csrc/tiles.cuh."""

    name: str
    pass_: str  # "attention_fwd", "attention_bwd", "attention_bwd_dq", "attention_bwd_dbias", "attention_dbias_sum"
    head_dim: int  # the largest it takes; 0 where there is no tile
    block_m: int  # queries
    block_n: int  # keys
    threads: int  # of a block
    smem: int  # bytes of shared memory of a block

class Driver(NamedTuple):
    """The CUDA driver of this machine."""

    problem: str | None  # why there is none that works, in words
    version: tuple[int, int] | None  # the newest CUDA it runs
    devices: int

KERNELS: tuple[Kernel, ...]
ELEMENTS: tuple[str, ...]  # what a kernel's tensors may hold, by torch's names: "float32", "float16", "bfloat16"

def pack(element: str, p: AttentionParams, buffers: tuple[Tensor | None, ...]) -> bytes:
    """The struct AttentionParams of csrc/attention.h for one call.

    Args:
        element: one of ELEMENTS, the dtype of q.
        p: the problem. The last dimension of q, k and v is contiguous.
        buffers: params.Buffers, None for what the kernel does not need. out, dout, dq, dk, dv: in q's
            dtype and dimensions, the last one contiguous. lse, dlse, delta: (batch, nheads, seqlen_q), packed
            (nheads, total_q), float32, contiguous. dq_sum: the same with head_dim behind. dbias: contiguous.
            dbias_partial: (copies, *dbias.shape) float32, contiguous.

    Raises:
        ValueError: there is no such element, a tensor has other dimensions or strides, a bias another dtype, a number
            more than 32 bits.
    """

def launch(
    kernel: str,
    element: str,
    device: int,
    stream: int,
    grid: tuple[int, int, int],
    p: AttentionParams,
    buffers: tuple[Tensor | None, ...],
) -> None:
    """Queue one kernel on a stream; its module is loaded at the first call. An empty grid launches nothing.

    Args:
        kernel: a name from KERNELS.
        element: as in `pack`.
        device: torch's index of the GPU with the tensors.
        stream: the address of that device's stream, as `torch.cuda.Stream.cuda_stream` gives it.
        grid: blocks in x, y and z; at most 2147483647, 65535, 65535.
        p, buffers: as in `pack`.

    Raises:
        ValueError: there is no such kernel, element or grid, or see `pack`.
        RuntimeError: the driver is missing or refuses; names kernel, element, device, grid, block and shared memory,
            and quotes CUDA. Whatever the image source raises comes through as it is.
    """

def set_image_source(source: Callable[[str, tuple[int, int]], bytes | str]) -> None:
    """Take modules from `source(element, (major, minor))` from now on.

    Args:
        source: returns a cubin or PTX with all kernels of an element type, for a GPU of that compute capability. It is
            called once per device and element type, and must not launch a kernel itself.
    """

def driver() -> Driver:
    """The driver, or why there is none."""

def capability(device: int) -> tuple[int, int]:
    """The compute capability of a GPU.

    Raises:
        RuntimeError: there is no driver or no such device; the same for the two functions below.
    """

def multiprocessors(device: int) -> int:
    """How many multiprocessors a GPU has."""

def max_smem(device: int) -> int:
    """How many bytes of shared memory a block may have on a GPU."""
