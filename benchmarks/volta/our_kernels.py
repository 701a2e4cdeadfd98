"""The project's forward kernels for head dimension 64, compiled as a call without features takes them.

Our kernels branch on what a call brings: masks, a bias, dropout, packed sequences. Which branches a call takes is not
seen from machine code that nobody executes, so the same sources are compiled with the arguments known. Registers, and
so the number of resident blocks, are those of the image that is shipped.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.p100.launches import Launch
from benchmarks.p100.machine import cubin
from benchmarks.p100.machine.sass import listing
from benchmarks.p100.passes import Pass, launches
from benchmarks.p100.tracing import INSTALLED
from fastattn.cuda_kernels.nvrtc import Nvrtc
from fastattn.cuda_kernels.sources import Arch, KernelSources, defines, image_name, options, unit

from . import chips, sass
from .prediction import Forward, Kernel
from .public_kernels import ELEMENT_BYTES
from .walk import Tile

LONG = 4096  # tokens that are known instead of a whole number of tiles, so that their loop stays one
_TILE = re.compile(r"attention_fwd(?:_mma)?_d(\d+)_(\d+)x(\d+)")
_SOURCE = """
#ifdef FASTATTN_UNIT
#include "attention_fwd_mma.cuh"
#else
#include "attention_fwd.cuh"
#endif

namespace fastattn {{

__device__ __forceinline__ AttentionParams known(AttentionParams p) {{
    p.q.is_aligned = p.k.is_aligned = p.v.is_aligned = p.out.is_aligned = 1;
    p.q.row = p.k.row = p.v.row = p.out.row = 64;
    p.mask.data = p.bias.data = nullptr;
    p.cu_seqlens_q = p.cu_seqlens_k = p.seqused_k = nullptr;
    p.seed = nullptr;
    p.softcap = 0;
    p.left = p.right = kLongest;
    p.bottom_right = 0;
    p.nheads_k = p.nheads;
    p.head_dim = p.head_dim_v = 64;
    p.seqlen_q = p.seqlen_k = {seqlen};
    return p;
}}

#define FASTATTN_KNOWN(pass, Smem, head_dim, m, n, warps, lanes_x, min_blocks) \\
    extern "C" __global__ void __launch_bounds__(32 * (warps), min_blocks)     \\
        FASTATTN_KERNEL_NAME(pass, head_dim, m, n)(const AttentionParams p) {{  \\
        pass<FASTATTN_ELEMENT, Tile<head_dim, m, n, warps, lanes_x, min_blocks>>(known(p)); \\
    }}
#define FASTATTN_KNOWN_MMA(pass, Smem, head_dim, m, n, warps, min_blocks)      \\
    extern "C" __global__ void __launch_bounds__(32 * (warps), min_blocks)     \\
        FASTATTN_KERNEL_NAME(pass, head_dim, m, n)(const AttentionParams p) {{  \\
        pass<FASTATTN_ELEMENT, MmaTile<FASTATTN_UNIT, MmaShape<head_dim, m, n, warps, min_blocks>>>(known(p)); \\
    }}
#ifdef FASTATTN_UNIT
FASTATTN_KNOWN_MMA({row})
#else
FASTATTN_KNOWN({row})
#endif

}}  // namespace fastattn
"""


class Compiler:
    """A compiler of our kernels, which keeps those that it has compiled once.

    Args:
        nvrtc: NVIDIA's compiler.
        folder: the sources, csrc/.
        images: the folder of the images that are shipped.
    """

    def __init__(self, nvrtc: Nvrtc, folder: Path, images: Path = INSTALLED) -> None:
        self._nvrtc, self._images = nvrtc, images
        self._sources = KernelSources.read(folder)
        self._compiled: dict[tuple[str, str, int, int], Kernel] = {}

    def kernel(self, pass_: Forward, card: chips.Card, element: str) -> Kernel:
        """The kernel that a pass takes on a card.

        Raises:
            ValueError: the head dimension is not 64.
        """
        if pass_.head_dim != 64:
            raise ValueError(f"head_dim: must be 64, got {pass_.head_dim}")
        asked = Pass("forward", pass_.heads, 1, pass_.seqlen, 64, getattr(torch, element))
        has_mma = unit(element, Arch("sm", card.arch)) is not None
        (launch,) = launches(asked, card.multiprocessors, mma=(element,) if has_mma else ())
        found = _TILE.fullmatch(launch.kernel)
        assert found is not None
        head_dim, block_m, block_n = map(int, found.groups())
        known = pass_.seqlen if pass_.seqlen % block_n or pass_.seqlen % block_m else LONG
        key = launch.kernel, element, card.arch, known
        if key not in self._compiled:
            tile = Tile(block_m, block_n, head_dim, launch.threads // 32)
            self._compiled[key] = self._compile(launch, tile, card, element, known)
        return self._compiled[key]

    def _compile(self, launch: Launch, tile: Tile, card: chips.Card, element: str, seqlen: int) -> Kernel:
        arch = Arch("sm", card.arch)
        sizes = f"{tile.head_dim}, {tile.block_m}, {tile.block_n}"
        pass_, _, _ = launch.kernel.rpartition("_d")
        tables = self._sources.files["tiles.cuh"] + self._sources.files["mma_tiles.cuh"]
        row = re.search(rf"KERNEL\(({pass_}, \w+, {sizes}, [^)]*)\)", tables)
        assert row is not None
        compiled = self._nvrtc.compile(
            _SOURCE.format(seqlen=seqlen, row=row[1]),
            str(arch),
            headers=self._sources.files,
            defines=defines(element, arch),
            options=options(arch),
        )
        shipped = cubin.kernels(self._images / image_name(element, arch))[launch.kernel]
        program = sass.parse(listing(compiled.image), launch.kernel)
        return Kernel(program, tile, shipped.registers, launch.smem, ELEMENT_BYTES[element])
