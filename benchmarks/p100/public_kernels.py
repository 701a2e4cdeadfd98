"""The only public attention kernels for sm_60 whose times on the P100's die are published, traced like our own.

They are xformers' memory-efficient kernels. The wheel of xformers 0.0.16 has their machine code; it is fetched with pip
into the cache, and nothing of it is part of this project. Tensors lie in memory as in xformers' own benchmarks: forward
one head, (batch, tokens, dim); backward q, k, v and their gradients packed, (batch, tokens, 3, heads, dim).

The parameters are xformers' structs `Params`: their order and the places of their members are those of its sources, and
agree with the offsets that the machine code reads.
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.cuda_kernels.images import cache_dir

from . import chip
from .machine import cubin, nvdisasm, sass, wheels
from .machine.execute import execute
from .machine.memory import LOCAL, SECTOR_BYTES
from .machine.trace import BlockTrace
from .passes import Pass
from .tracing import Block, BlockKind, Occupancy, TracedLaunch, block_of

WHEEL, PYTHON, PLATFORM = "xformers==0.0.16", "3.10", "manylinux2014_x86_64"
SHA256 = "a64a77663258b696bef3986488cd7df4f35e320355a7fe0bf86e8eff41726f0e"
LIBRARY = "xformers/_C.so"
BLOCK = (32, 4)  # threads in x and y
ROWS = 64  # of a tile of the backward
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the largest entry of a result


class PublicKernel(NamedTuple):
    """A kernel of the wheel."""

    name: str  # in its cubin
    block_m: int  # queries of a block
    smem: int  # bytes: the size of its struct SharedStorage, which is up to where it accesses shared memory


_TYPES = {torch.float32: "fN7cutlass4arch4Sm50E", torch.float16: "N7cutlass6half_tENS1_4arch4Sm50E"}
_BACKWARD_TYPES = {torch.float32: "N7cutlass4arch4Sm50Ef", torch.float16: "N7cutlass4arch4Sm50ENS1_6half_tE"}
# By element type and whether the head dimension is above 64.
_FORWARD_SMEM = {
    (torch.float32, False): 21248,
    (torch.float32, True): 24960,
    (torch.float16, False): 11008,
    (torch.float16, True): 12672,
}
_BACKWARD_SMEM = {
    (torch.float32, False): 37120,
    (torch.float32, True): 37120,
    (torch.float16, False): 19164,
    (torch.float16, True): 19164,
}


def kernel_of(pass_: Pass) -> PublicKernel:
    """The kernel that xformers takes for a pass on compute capability 6.0."""
    is_wide = pass_.head_dim > 64
    if pass_.head_dim > 128:
        raise ValueError(f"head_dim: must be at most 128, got {pass_.head_dim}")
    if pass_.is_backward:
        types = _BACKWARD_TYPES[pass_.dtype]
        name = f"_Z33attention_kernel_backward_batchedI23AttentionBackwardKernelI{types}Lb1ELi{128 if is_wide else 64}"
        return PublicKernel(f"{name}EEEvNT_6ParamsE", ROWS, _BACKWARD_SMEM[pass_.dtype, is_wide])
    block_m, keys = (32, 128) if is_wide else (64, 64)
    name = f"_Z24attention_kernel_batchedI15AttentionKernelI{_TYPES[pass_.dtype]}Lb1ELi{block_m}ELi{keys}"
    return PublicKernel(f"{name}ELb1EEEvNT_6ParamsE", block_m, _FORWARD_SMEM[pass_.dtype, is_wide])


_ALL = [
    kernel_of(Pass(direction, 1, 1, 1, head_dim, dtype)).name
    for direction in ("forward", "backward")
    for dtype in TOLERANCE
    for head_dim in (64, 128)
]


def folder(arch: str = "sm_60", kernels: Sequence[str] = _ALL) -> Path:
    """The folder with a cubin for each kernel, `<number>.cubin`; at the first call on a machine, the wheel is fetched.

    Args:
        arch: the architecture of the machine code.
        kernels: their names.

    Raises:
        NotFound: the wheel or cuobjdump cannot be downloaded.
    """
    cached = cache_dir() / f"xformers-0.0.16-{arch}"
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            chosen = _extracted(Path(scratch), arch, kernels)
            if not cached.is_dir():
                os.replace(chosen, cached)
    return cached


def _extracted(scratch: Path, arch: str, kernels: Sequence[str]) -> Path:
    program = nvdisasm.cuobjdump().resolve()
    file = wheels.download(WHEEL, PYTHON, PLATFORM, scratch, SHA256)
    with zipfile.ZipFile(file) as wheel:
        library = Path(wheel.extract(LIBRARY, scratch)).resolve()
    all_, chosen = scratch / "all", scratch / "chosen"
    for made in (all_, chosen):
        made.mkdir()
    subprocess.run([program, "-xelf", arch, library], check=True, capture_output=True, cwd=all_)
    for file in all_.iterdir():
        if file.stat().st_size:
            for name in {*kernels} & {*cubin.kernels(file)}:
                os.link(file, chosen / f"{kernels.index(name)}.cubin")
    if missing := [name for n, name in enumerate(kernels) if not (chosen / f"{n}.cubin").is_file()]:
        raise wheels.NotFound(f"{WHEEL}: has not the kernels {missing}")
    return chosen


# ---- calls ----


@dataclass
class _Call:
    """A launch on real tensors, of which the first (batch, head) is filled."""

    grid: tuple[int, int, int]
    params: bytes
    buffers: list[tuple[Tensor, str, bool]]
    results: dict[str, tuple[Tensor, Tensor]]  # what the kernel fills, and what it should be


def _forward(pass_: Pass, seqlen: int) -> _Call:
    """The call for sequences cut to a length; the tensors are positive, as torch.rand makes them for the benchmark."""
    d, n = pass_.head_dim, seqlen
    torch.manual_seed(0)
    q, k, v = (torch.rand(n, d).to(pass_.dtype) for _ in range(3))
    out = torch.full((n, d), math.nan, dtype=pass_.dtype)
    q64, k64, v64 = (x.double() for x in (q, k, v))
    expected = torch.softmax(q64 @ k64.T / math.sqrt(d), -1) @ v64
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, out.data_ptr(), 0, 0)
    of_a_row, of_a_head, of_a_batch = (d,) * 3, (d,) * 3, (pass_.seqlen * d,) * 3
    sizes, is_causal = (d, d, n, n), False
    params = struct.pack(
        "<8Qf4i?3x3i3i3q2i",
        *pointers,
        1 / math.sqrt(d),
        *sizes,
        is_causal,
        *of_a_row,
        *of_a_head,
        *of_a_batch,
        pass_.batch,
        1,
    )
    buffers = [(q, "q", False), (k, "k", False), (v, "v", False), (out, "out", True)]
    grid = (-(-n // kernel_of(pass_).block_m), 1, pass_.batch * pass_.nheads)
    return _Call(grid, params, buffers, {"out": (out, expected)})


def _backward(pass_: Pass, seqlen: int) -> _Call:
    """The call for sequences cut to a length; delta comes from torch for float32, and from the kernel for float16."""
    d, n, heads, dtype = pass_.head_dim, seqlen, pass_.nheads, pass_.dtype
    torch.manual_seed(0)
    qkv = torch.rand(n, 3, heads, d).to(dtype)
    q, k, v = (qkv[:, which, 0].double() for which in range(3))
    scale = 1 / math.sqrt(d)
    scores = q @ k.T * scale
    weights = torch.softmax(scores, -1)
    out, dout = torch.zeros(n, heads, d, dtype=dtype), torch.ones(n, heads, d, dtype=dtype)
    out[:, 0], dout[:, 0] = (weights @ v).to(dtype), torch.randn(n, d).to(dtype)
    dout64 = dout[:, 0].double()
    rows = -(-n // 32) * 32
    lse = torch.full((rows,), math.inf)
    lse[:n] = torch.logsumexp(scores, -1)
    delta64 = (dout64 * out[:, 0].double()).sum(-1)
    is_half = dtype == torch.float16
    delta = torch.full((n,), math.nan) if is_half else delta64.float()
    grads = torch.full((n, 3, heads, d), math.nan, dtype=dtype)
    workspace = torch.full((_workspace(pass_, n),), math.nan)
    pointers = [x.data_ptr() for x in (*qkv.unbind(1), lse, out, dout, delta, *grads.unbind(1))]
    in_batch, in_packed_batch = pass_.seqlen * heads * d, 3 * pass_.seqlen * heads * d
    params = struct.pack(
        "<13Qf5i?3x4ib3xq3i4x5qi4x8q",
        *(*pointers, workspace.data_ptr() if is_half else 0, 0, 0),
        *(scale, d, d, n, n, heads),
        False,
        *(3 * heads * d, 3 * heads * d, 3 * heads * d, heads * d),
        3,  # gradients of q, k and v are packed
        d,
        *(d, d, d, in_batch, in_packed_batch, in_packed_batch, in_packed_batch, rows, pass_.batch),
        *(in_batch, in_packed_batch, in_packed_batch, in_packed_batch, d, d, d, d),
    )
    buffers = [(qkv, "qkv", False), (dout, "dout", False), (out, "out", False), (lse, "lse", False)]
    buffers += [(delta, "delta", is_half), (grads, "grads", True), (workspace, "workspace", True)]
    dscores = weights * (dout64 @ v.T - delta64[:, None]) * scale
    expected = {"dq": dscores @ k, "dk": dscores.T @ q, "dv": weights.T @ dout64}
    results = {name: (grads[:, which, 0], x) for which, (name, x) in enumerate(expected.items())}
    return _Call((1, heads, pass_.batch), params, buffers, results)


def _workspace(pass_: Pass, seqlen: int) -> int:
    """The floats of a (batch, head) for sums that do not stay in registers."""
    if pass_.dtype == torch.float32:
        return 4
    one = -(-seqlen // ROWS) * ROWS * (-(-pass_.head_dim // ROWS) * ROWS)
    return max(4, one * (2 * (pass_.head_dim > 64) + (seqlen > ROWS)))


class PublicTracer:
    """A tracer of passes as xformers' kernels compute them, which keeps what it has executed.

    Args:
        multiprocessors: their number on the card.
    """

    def __init__(self, multiprocessors: int) -> None:
        self._folder, self._multiprocessors = folder(), multiprocessors
        self._programs: dict[str, tuple[sass.Program, int]] = {}
        self._executed: dict[tuple[object, ...], dict[int, BlockTrace]] = {}
        self._blocks: dict[tuple[object, ...], Block] = {}
        self.errors: dict[Pass, float] = {}  # by pass with one sequence of the length that was executed

    def trace(self, pass_: Pass, seqlen: int) -> list[TracedLaunch]:
        """The launch of a pass, whose blocks are executed as if its sequences were no longer than `seqlen`."""
        kernel = kernel_of(pass_)
        program, registers = self._program(kernel.name)
        threads = BLOCK[0] * BLOCK[1]
        resident = chip.resident_blocks(threads, registers, kernel.smem)
        tiles = 1 if pass_.is_backward else -(-pass_.seqlen // kernel.block_m)
        pairs = pass_.batch * pass_.nheads
        at_once = min(resident * self._multiprocessors, tiles * pairs)
        sharing = dict.fromkeys(("q", "out", "qkv", "dout", "lse", "delta", "grads", "workspace", LOCAL), 1.0)
        sharing |= dict.fromkeys(("k", "v"), float(min(tiles, at_once)))
        traces = self._execute(pass_, seqlen, kernel, program)
        is_ragged = not pass_.is_backward and pass_.seqlen % kernel.block_m != 0
        counts = {0: tiles - 1, max(traces): 1} if is_ragged and tiles > 1 else {0: tiles}
        kinds = []
        for tile, count in counts.items():
            key = (kernel.name, pass_.head_dim, pass_.nheads, seqlen, tile, at_once, sharing["k"])
            if key not in self._blocks:
                self._blocks[key] = block_of(traces[tile], chip.L2_BYTES // SECTOR_BYTES // at_once, sharing)
            kinds.append(BlockKind(self._blocks[key], count * pairs))
        occupancy = Occupancy(threads, registers, kernel.smem, resident)
        return [TracedLaunch(kernel.name, str(pass_.dtype), program, occupancy, tuple(kinds))]

    def error(self, pass_: Pass, seqlen: int) -> float:
        """The largest error of what was computed for a pass of this length, as a share of the largest entry."""
        return self.errors[_alike(pass_, seqlen)]

    def _program(self, name: str) -> tuple[sass.Program, int]:
        if name not in self._programs:
            file = self._folder / f"{_ALL.index(name)}.cubin"
            self._programs[name] = sass.disassemble(file, name), cubin.kernels(file)[name].registers
        return self._programs[name]

    def _execute(self, pass_: Pass, seqlen: int, kernel: PublicKernel, program: sass.Program) -> dict[int, BlockTrace]:
        """The traces of the first tile and of the last one, whose results are checked."""
        key = _alike(pass_, seqlen)
        if key not in self._executed:
            call = (_backward if pass_.is_backward else _forward)(pass_, seqlen)
            tiles = sorted({0, call.grid[0] - 1})
            blocks = [(tile, 0, 0) for tile in tiles]
            traces = execute(program, call.grid, BLOCK, kernel.smem, call.params, call.buffers, blocks)
            rows = [*range(seqlen)]
            if not pass_.is_backward:
                of_tiles = (range(tile * kernel.block_m, (tile + 1) * kernel.block_m) for tile in tiles)
                rows = [row for tile in of_tiles for row in tile if row < seqlen]
            errors = [(got[rows] - want[rows]).abs().max() / want.abs().max() for got, want in call.results.values()]
            self.errors[key] = worst = float(max(errors))
            if not worst < TOLERANCE[pass_.dtype]:
                raise ValueError(f"{pass_}, {seqlen} tokens: the public kernel's result is wrong by {worst:.1e}")
            self._executed[key] = {tile: traces[block] for tile, block in zip(tiles, blocks, strict=True)}
        return self._executed[key]


def _alike(pass_: Pass, seqlen: int) -> Pass:
    """A pass in whose place the same is executed."""
    return pass_._replace(batch=1, seqlen=seqlen)
