"""Resources of the Triton kernels, compiled without a GPU: docs/triton_resources.csv.

python scripts/triton_resources.py                    compares the file with what is compiled now, prints what differs
python scripts/triton_resources.py --write            writes it, and the shared memory of the rows of tiles.csv
python scripts/triton_resources.py --every 7          only every seventh line
python scripts/triton_resources.py --only dq float32  only lines that have all these words

Minutes on two cores. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tqdm
import triton
from triton.backends.compiler import GPUTarget

from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from fastattn.params import AttentionParams, Backward, Forward
from fastattn.triton_kernels import attention, tiles
from fastattn.triton_kernels.tiles import Row, Tile

TABLE = Path(__file__).parents[1] / "docs" / "triton_resources.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SMEM_BYTES = 99 << 10  # of a block on the smallest GPUs that the rows for any GPU serve
BATCH, HEADS, LONG = 16, 4, 512

CAPABILITIES = ((8, 0), (9, 0))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (64, 128, 256)
SEQLENS = (16, 32, 64, 128, LONG)
# "common" has a padding mask, too, and "everything" a full mask and bias, and packed sequences with fewer keys.
FEATURES = {
    "common": {"dropout_p": 0.1, "is_causal": True},
    "everything": {
        **{"dropout_p": 0.1, "window": (7, 3), "causal_align": "bottom-right", "enable_gqa": True},
        "softcap": 30.0,
    },
}


class Point(NamedTuple):
    """A kernel, and what it is compiled for."""

    kernel: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    seqlen: int
    features: str

    def __str__(self) -> str:
        capability, dtype = ".".join(map(str, self.capability)), str(self.dtype).removeprefix("torch.")
        seqlen = "any" if self.seqlen == LONG else self.seqlen
        return f"{self.kernel},{capability},{dtype},{self.head_dim},{seqlen},{self.features}"

    def has_kernel(self) -> bool:
        """True for a row of tiles of its own; bfloat16 is like float16, and only its smallest head_dim is kept."""
        is_wanted = self.dtype != torch.bfloat16 or self.head_dim == HEAD_DIMS[0]
        return is_wanted and any(
            (row.kernel, row.dtype, row.head_dim) == (self.kernel, self.dtype, self.head_dim)
            and row.seqlen == (tiles.LONG if self.seqlen == LONG else self.seqlen)
            for row in for_any_gpu()
        )


def for_any_gpu() -> tuple[Row, ...]:
    """The rows that this table is about; those measured on a GPU are its own."""
    return tuple(row for row in tiles.table() if row.capability is None)


def points() -> list[Point]:
    """All points of the table."""
    axes = (tiles.KERNELS, CAPABILITIES, DTYPES, HEAD_DIMS, SEQLENS, FEATURES)
    return [point for values in itertools.product(*axes) if (point := Point(*values)).has_kernel()]


# ---- compilation as for a launch ----


class Driver:
    """Stand-in for Triton's driver, which describes a GPU that this machine lacks."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.arch = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.arch  # by which Triton keeps apart what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def problem(point: Point) -> AttentionParams:
    """A call with the point's features."""
    arguments = dict(FEATURES[point.features])
    heads_k = HEADS // 2 if arguments.get("enable_gqa") else HEADS
    shapes = ((BATCH, heads, point.seqlen, point.head_dim) for heads in (HEADS, heads_k, heads_k))
    q, k, v = (torch.empty(shape, dtype=point.dtype) for shape in shapes)
    scores = (1, HEADS, point.seqlen, point.seqlen)
    if point.features == "common":
        arguments["attn_mask"] = torch.empty((BATCH, 1, 1, point.seqlen), dtype=torch.bool)
        arguments["attn_bias"] = torch.empty(scores, dtype=point.dtype) if point.kernel == "dbias" else None
        return draw_seed(attention_params(q, k, v, **arguments))
    arguments |= {"attn_mask": torch.empty(scores, dtype=torch.bool), "attn_bias": torch.empty(scores, dtype=q.dtype)}
    arguments["seqused_k"] = torch.full((BATCH,), point.seqlen, dtype=torch.int32)
    edges = torch.arange(0, (BATCH + 1) * point.seqlen, point.seqlen, dtype=torch.int32)
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    lengths = (edges, edges, point.seqlen, point.seqlen)
    return draw_seed(varlen_attention_params(*packed, *lengths, **arguments))


class Recorder(attention.Device):
    """A GPU of that capability that launches nothing and notes each kernel's tile and arguments."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.launches: dict[Any, tuple[Tile, dict[str, Any]]] = {}
        self._gpu = tiles.Gpu(capability, 1, SMEM_BYTES)

    def gpu(self, device: torch.device) -> tiles.Gpu:
        return self._gpu

    def launch(self, kernel: Any, programs: int, tile: Tile, p: AttentionParams, arguments: dict[str, Any]) -> None:
        self.launches[kernel] = (tile, arguments)


def compiled(point: Point, tile: Tile | None = None) -> Any:
    """The point's kernel as a launch compiles it, with its tile of the table or another one."""
    p, recorder = problem(point), Recorder(point.capability)
    wanted = attention.KERNELS[point.kernel]
    out, lse = torch.empty_like(p.q), torch.empty(p.q.shape[:-1])
    lse = lse.T if p.is_packed() else lse
    with attention.on(recorder), tiles.forced(partial(tiles.choose_from, for_any_gpu())):
        attention.attention_fwd(Forward(out, lse), p)
        attention.attention_bwd(Backward(out, lse, out, lse, p.q, p.k, p.v, p.bias), p)
    chosen, arguments = recorder.launches[wanted]
    tile = tile or chosen
    triton.runtime.driver.set_active(Driver(point.capability))
    if "pairs" in arguments:
        arguments["pairs"] = tile.pairs
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return wanted.run(**arguments, **blocks, **options, grid=(1,), warmup=True)


def resources(point: Point, tile: Tile | None = None) -> dict[str, Any]:
    """Resources of the compiled kernel; its stack holds spilled registers alone."""
    kernel = compiled(point, tile)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = dict(re.findall(r"(REG|STACK):(\d+)", said))
    products = set(re.findall(r"\b(?:wg)?mma\S*(m\d+n\d+k\d+)\S*?\.(tf32|f16|bf16)\b", kernel.asm["ptx"]))
    return {
        "registers": int(used["REG"]),
        "spill_bytes": int(used["STACK"]),
        "smem_bytes": kernel.metadata.shared,
        "products": " ".join(sorted(".".join(product) for product in products)),
    }


# ---- the table ----


def line(point: Point) -> dict[str, Any]:
    """The columns of one point."""
    names = ("kernel", "capability", "dtype", "head_dim", "seqlen", "features")
    return dict(zip(names, str(point).split(","), strict=True)) | resources(point) | {"triton": triton.__version__}


def lines(wanted: Iterable[Point]) -> Iterator[dict[str, Any]]:
    """The table's lines, in the order of the points."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        yield from pool.imap(line, wanted)


def render(table: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def note_smem(measured: list[dict[str, Any]]) -> None:
    """Writes into tiles.csv how much shared memory the rows for any GPU take at most."""
    rows = list(tiles.table())
    for i, row in enumerate(rows):
        dtype = "float16" if row.dtype == torch.bfloat16 else str(row.dtype).removeprefix("torch.")
        is_its = {"kernel": row.kernel, "dtype": dtype, "head_dim": str(row.head_dim)}
        is_its["seqlen"] = "any" if row.seqlen == tiles.LONG else str(row.seqlen)
        taken = [line["smem_bytes"] for line in measured if is_its.items() <= line.items()]
        if row.capability is None:
            rows[i] = row._replace(smem_bytes=max(taken))
    tiles.write(tiles.TABLE, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth line")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only lines with all these words")
    options = parser.parse_args()
    wanted = [point for point in points() if set(options.only) <= set(str(point).split(","))][:: options.every]
    measured = list(tqdm.tqdm(lines(wanted), total=len(wanted), unit="kernel", disable=None))
    now = render(measured).splitlines(keepends=True)
    if options.write:
        note_smem(measured)
        TABLE.write_text("".join(now))
        return 0
    names = tuple(f"{point}," for point in wanted)
    recorded = [row for row in TABLE.read_text().splitlines(keepends=True) if row.startswith(("kernel,", *names))]
    sys.stdout.writelines(difflib.unified_diff(recorded, now, TABLE.name, "compiled now", n=0))
    return int(recorded != now)


if __name__ == "__main__":
    sys.exit(main())
