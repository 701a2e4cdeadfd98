"""xformers' memory-efficient forward kernels for head dimensions up to 64, from the wheel that has the P100's, too."""

from __future__ import annotations

from benchmarks.p100 import public_kernels
from benchmarks.p100.machine import cubin

from . import chips, sass
from .prediction import Kernel
from .walk import Tile

TILE = Tile(64, 64, 64, 4)
ELEMENT_BYTES = {"float16": 2, "float32": 4}


def names(arch: int) -> list[str]:
    """The kernels for float16 and float32, in the order of ELEMENT_BYTES."""
    elements = (f"N7cutlass6half_tENS1_4arch4Sm{arch}E", f"fN7cutlass4arch4Sm{arch}E")
    begin = "_Z24attention_kernel_batchedI15AttentionKernelI"
    return [f"{begin}{element}Lb1ELi64ELi64ELb1EEEvNT_6ParamsE" for element in elements]


def kernel(card: chips.Card, element: str) -> Kernel:
    """The kernel that xformers takes on a card; its shared memory is not known, and taken not to limit its blocks.

    Raises:
        NotFound: the wheel or cuobjdump cannot be downloaded.
    """
    all_ = names(card.arch)
    number = [*ELEMENT_BYTES].index(element)
    file = public_kernels.folder(f"sm_{card.arch}", all_) / f"{number}.cubin"
    registers = cubin.kernels(file)[all_[number]].registers
    return Kernel(sass.disassemble(file, all_[number]), TILE, registers, 0, ELEMENT_BYTES[element])
