"""Triton's own launcher on a stub of libcuda, in a process of its own, because Triton is interpreting in the tests'.

python -m tests.support.triton_on_stub parameters FOLDER     launches every kernel, and compares all parameters
python -m tests.support.triton_on_stub keys FOLDER           calls of many kinds, none of which is compiled
python -m tests.support.triton_on_stub compilations FOLDER   updates of WMT, none of which is compiled
python -m tests.support.triton_on_stub choice FOLDER         what is chosen for a GPU, with or without a compiler

Prints what it found as JSON.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import stub_triton
from benchmarks.lengths import Lengths, updates
from fastattn import backends
from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from fastattn.params import AttentionParams, Backward, Forward
from fastattn.triton_kernels import attention
from fastattn.triton_kernels.launches import Launches
from fastattn.triton_kernels.tiles import Tile

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITY = (9, 0)
HEADS, HEAD_DIM = 8, 64


def run(p: AttentionParams, dlse: bool = False) -> None:
    """Both passes."""
    lse_shape = (p.q.size(1), p.q.size(0)) if p.is_packed() else p.q.shape[:-1]
    out, lse = torch.empty(*p.q.shape[:-1], p.v.size(-1), dtype=p.q.dtype), torch.empty(lse_shape)
    attention.attention_fwd(Forward(out, lse), p)
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.q, p.k, p.v))
    dbias = None if p.bias is None else torch.empty_like(p.bias)
    dlse_tensor = torch.empty(lse_shape) if dlse else None
    attention.attention_bwd(Backward(out, lse, torch.empty_like(out), dlse_tensor, *grads, dbias), p)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int, **arguments: Any) -> AttentionParams:
    """The call on the tensors of a dense one."""
    edges = torch.arange(0, (q.size(0) + 1) * n, n, dtype=torch.int32)
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return varlen_attention_params(*tokens, edges, edges.clone(), n, n, **arguments)


# ---- parameters ----


def flat(value: Any, type_: Any) -> Iterator[tuple[Any, str]]:
    """The parameters that an argument is passed as, with their types."""
    if isinstance(type_, tuple):
        for part in zip(value, type_, strict=True):
            yield from flat(*part)
    elif type_ != "constexpr":
        yield value, type_


def as_bytes(value: Any, type_: str) -> bytes:
    """A parameter as a kernel gets it."""
    if type_.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    formats = {"i32": "<i", "i64": "<q", "fp32": "<f"}
    return struct.pack(formats[type_], value)


def param_sizes(cubin: bytes) -> list[int]:
    """The sizes of a kernel's parameters, as its machine code says them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-elf", file.name], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*0x(\w+)", said)
    by_ordinal = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    return [by_ordinal[i] for i in sorted(by_ordinal)]


class Comparing(stub_triton.StubDevice):
    """Notes how what reaches libcuda differs from the arguments, by Triton's launch and by a repeated one."""

    def __init__(self, stub: Any) -> None:
        super().__init__(CAPABILITY)
        self.stub, self.differences, self.launched = stub, [], Counter[str]()

    def launch(self, kernel: Any, programs: int, tile: Tile, p: AttentionParams, arguments: dict[str, Any]) -> Any:
        compiled = super().launch(kernel, programs, tile, p, arguments)
        sizes = param_sizes(compiled.asm["cubin"])
        self.stub.stub_set_param_sizes((ctypes.c_size_t * len(sizes))(*sizes), len(sizes))
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        types = compiled.src.signature
        values = arguments | blocks
        expected = [as_bytes(*part) for name in kernel.arg_names for part in flat(values[name], types[name])]
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        for how, again in (
            ("Triton's", lambda: kernel[(programs,)](**arguments, **blocks, **options)),
            ("repeated", lambda: super(Comparing, self).launch(kernel, programs, tile, p, arguments)),
        ):
            self.stub.stub_clear()
            again()
            grid, smem, stream, given = last_launch(self.stub)
            self.compare(f"{how} {kernel.__name__}", expected, given, sizes)
            wanted = ((programs, 1, 1), compiled.metadata.shared, stub_triton.STREAM)
            if (grid, smem, stream) != wanted:
                self.differences.append(f"{how} {kernel.__name__}: {(grid, smem, stream)}, not {wanted}")
            self.launched[kernel.__name__] += 1
        self.stub.stub_set_param_sizes(None, 0)
        return compiled

    def compare(self, what: str, expected: list[bytes], given: bytes, sizes: list[int]) -> None:
        """Newer Tritons append pointers to scratch memory, which none of these kernels has."""
        wanted = b"".join(expected)
        scratch = sizes[len(expected) :]
        if [len(x) for x in expected] != sizes[: len(expected)] or scratch not in ([], [8], [8, 8]):
            self.differences.append(f"{what}: parameters of {sizes} bytes, expected {[len(x) for x in expected]}")
        if given[: len(wanted)] != wanted:
            self.differences.append(f"{what}: {given.hex()}, not {wanted.hex()}")


def last_launch(stub: Any) -> tuple[tuple[int, ...], int, int, bytes]:
    """Grid, shared memory, stream and parameters of the only launch."""
    launches = []
    for i in range(stub.stub_calls()):
        name, thread, numbers = ctypes.c_char_p(), ctypes.c_uint64(), (ctypes.c_uint64 * 10)()
        data, size = ctypes.c_void_p(), ctypes.c_size_t()
        stub.stub_call(i, *(ctypes.byref(x) for x in (name, thread, numbers, data, size)))
        if name.value in (b"cuLaunchKernelEx", b"cuLaunchKernel"):  # the latter before Triton 3.4
            launches.append((tuple(numbers[1:4]), numbers[7], numbers[8], ctypes.string_at(data, size.value)))
    (launch,) = launches
    return launch


def parameters(stub: Any) -> dict[str, Any]:
    """Every kernel, dense and packed, with as few and as many features as there can be."""
    device = Comparing(stub)
    with attention.on(device):
        q, k, v = (torch.randn(2, HEADS, 48, HEAD_DIM).half() for _ in range(3))
        run(attention_params(q, k, v))
        bias = torch.randn(1, HEADS, 48, 48).half()
        run(draw_seed(packed(q, k, v, 48, attn_bias=bias, dropout_p=0.6, window=(7, 3), softcap=5.0)), dlse=True)
        q, k, v = (torch.randn(2, heads, 500, HEAD_DIM).half() for heads in (HEADS, 2, 2))
        mask, used = torch.ones(2, 1, 1, 500, dtype=torch.bool), torch.tensor([400, 500], dtype=torch.int32)
        run(draw_seed(attention_params(q, k, v, mask, dropout_p=0.1, enable_gqa=True, seqused_k=used)), dlse=True)
    return {"launched": device.launched, "differences": device.differences}


# ---- keys ----


class Asking(stub_triton.StubDevice):
    """Launches nothing; what Triton would compile each launch for, and the key that it is repeated by."""

    def __init__(self) -> None:
        super().__init__(CAPABILITY)
        self.launches, self.now = Launches(), ""
        self.asked: list[tuple[str, str, str]] = []
        if hasattr(triton, "knobs"):
            triton.knobs.runtime.jit_cache_hook = self._refuse
        else:  # before Triton 3.4
            triton.JITFunction.cache_hook = self._refuse

    def _refuse(self, *, key: str, **_: Any) -> bool:
        self.now = str(key)
        return True

    def launch(self, kernel: Any, programs: int, tile: Tile, p: AttentionParams, arguments: dict[str, Any]) -> None:
        arguments = arguments | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        kernel.run(grid=(programs,), warmup=True, **arguments, **options)
        self.asked.append((kernel.__name__, self.now, str((options, self.launches.key(kernel, arguments)))))


def shifted(*shape: int, dtype: torch.dtype, by: int) -> torch.Tensor:
    """A tensor whose first element lies that many elements behind an aligned one."""
    size = torch.Size(shape).numel()
    return torch.empty(size + by, dtype=dtype)[by:].view(shape)


def keys() -> dict[str, Any]:
    """Launches with one key and more than one kernel; how many kinds there were."""
    device = Asking()
    dtypes, lengths, shifts = (torch.float16, torch.float32), (1, 9, 16, 80), (0, 1, 8)
    with attention.on(device):
        for dtype, n, by, heads, is_packed in itertools.product(dtypes, lengths, shifts, (1, 2, 16), (False, True)):
            q, k, v = (shifted(3, heads, n, 24, dtype=dtype, by=by if i else 0) for i in range(3))
            mask = shifted(3, 1, 1, n, dtype=torch.bool, by=by)
            bias = shifted(1, heads, n, n, dtype=dtype, by=by)
            for features in ({}, {"attn_mask": mask}, {"attn_bias": bias}, {"dropout_p": 0.5}, {"window": (n, 1)}):
                make = packed if is_packed else attention_params
                arguments = (q, k, v, n) if is_packed else (q, k, v)
                run(draw_seed(make(*arguments, **features)))
    by_key = defaultdict(set)
    for name, wanted, key in device.asked:
        by_key[name, key].add(wanted)
    mixed = [name for (name, _), wanted in by_key.items() if len(wanted) > 1]
    return {"mixed": mixed, "keys": len(by_key), "kernels": len({wanted for _, wanted, _ in device.asked})}


# ---- compilations ----


def update(lengths: Lengths, is_packed: bool) -> None:
    """The three attentions of a Transformer with dropout, on tensors as its projections make them."""
    source, target = lengths
    for queries, key_lengths, is_causal in ((source, source, False), (target, target, True), (target, source, False)):
        run(draw_seed(problem(queries, key_lengths, is_causal, is_packed)))


def problem(queries: tuple[int, ...], keys: tuple[int, ...], is_causal: bool, is_packed: bool) -> AttentionParams:
    """One of them."""
    nq, nk, batch = max(queries), max(keys), len(queries)
    shape_q, shape_k = ((sum(queries),), (sum(keys),)) if is_packed else ((batch, nq), (batch, nk))
    parts = 3 if queries is keys else 2
    projected = torch.empty(*shape_k, parts, HEADS, HEAD_DIM, dtype=torch.float16).unbind(-3)
    q = projected[0] if parts == 3 else torch.empty(*shape_q, HEADS, HEAD_DIM, dtype=torch.float16)
    k, v = projected[-2:]
    if is_packed:
        edges = (torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32) for side in (queries, keys))
        given = {"is_causal": is_causal, "causal_align": "top-left", "dropout_p": 0.1}
        return varlen_attention_params(q, k, v, *edges, nq, nk, **given)
    mask = None if is_causal else torch.empty(batch, 1, 1, nk, dtype=torch.bool)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention_params(q, k, v, mask, is_causal=is_causal, dropout_p=0.1)


def compilations(count: int = 200) -> dict[str, list[int]]:
    """By layout the update at which each kernel is met first."""
    chosen = updates(count)
    random.Random(0).shuffle(chosen)
    found = {}
    for layout in ("padded", "packed"):
        device, first = Asking(), {}
        with attention.on(device):
            for number, lengths in enumerate(chosen):
                update(lengths, layout == "packed")
                for name, wanted, _ in device.asked:
                    first.setdefault((name, wanted), number)
                device.asked.clear()
        found[layout] = sorted(first.values())
    return found


# ---- choice ----


def choice(folder: Path) -> dict[str, Any]:
    """The backend of a call on a GPU, and why it is not Triton."""
    torch.cuda.is_available = lambda: True
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    explanation = backends.explain_choice(backends.CallTraits("cuda", CAPABILITY, torch.float16, HEAD_DIM, HEAD_DIM))
    return {"backend": explanation.backend, "refusals": explanation.refusals}


def main() -> None:
    what, folder = sys.argv[1:]
    if what == "choice":
        print(json.dumps(choice(Path(folder))))
        return
    _, stub = stub_triton.start(Path(folder), CAPABILITY)
    calls = {"parameters": lambda: parameters(stub), "keys": keys, "compilations": compilations}
    print(json.dumps(calls[what]()))


if __name__ == "__main__":
    main()
