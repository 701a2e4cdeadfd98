"""Compiles the Triton kernels of one case ahead of time, without a GPU, and prints what they take of it.

    python tests/triton_compile.py 80 "dtype=float16,dims=64x64,dropout_p=0.3"

One JSON object per kernel: its name, bytes of shared memory, registers, and bytes of the
stack, which only spilled registers need. Triton must
not be in its interpreter here: TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cases import Case
from contract import call, leaf
from fastattn import backends
from fastattn.triton_kernels import attention, tiles

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel as a launch with these arguments compiles it."""
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        is_plain_int = isinstance(value, int) and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (is_plain_int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        is_divisible = is_plain_int and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, torch.Tensor) or (is_divisible and name not in constants):
            divisible[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, divisible)


def resources(kernel: Any, arguments: dict[str, Any], tile: tiles.Tile, arch: int) -> dict[str, Any]:
    """What the compiled kernel takes."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source(kernel, arguments), GPUTarget("cuda", arch, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = dict(re.findall(r"(REG|STACK):(\d+)", said))
    found = {"registers": int(used["REG"]), "stack": int(used["STACK"])}
    return {"kernel": kernel.fn.__name__, "tile": list(tile), "shared": compiled.metadata.shared, **found}


def launched(case: Case, capability: tuple[int, int]) -> list[tuple[Any, dict[str, Any], tiles.Tile]]:
    """Every launch of a forward and backward of the case: kernel, arguments and tile."""
    launches = []

    def record(kernel, programs, tile, p, arguments):
        launches.append((kernel, arguments | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}, tile))

    tensors, others = case.make()
    inputs = tuple(None if x is None else leaf(x, case.dtype) for x in tensors)
    with (
        mock.patch.object(attention, "_launch", record),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(backends.Backend, "why_not", lambda backend, problem: []),
        backends.use_backend("triton"),
    ):
        results = call(inputs, others)
        torch.autograd.grad(results, [x for x in inputs if x is not None], [torch.ones_like(x) for x in results])
    return launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", type=int, help="compute capability without the dot, such as 80")
    parser.add_argument("case", type=Case.parse, nargs="+", help="fields that differ from the default, name=value,...")
    options = parser.parse_args()
    for case in options.case:
        for kernel, arguments, tile in launched(case, divmod(options.arch, 10)):
            print(json.dumps(resources(kernel, arguments, tile, options.arch)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
