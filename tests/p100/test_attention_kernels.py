"""The machine code of the attention kernels for sm_60, executed: the contract of every backend. It needs nvdisasm."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.p100.machine import control, nvdisasm, sass
from benchmarks.p100.machine.execute import Execution, execute
from benchmarks.p100.machine.instructions import step_of
from benchmarks.p100.machine.memory import Access, GlobalMemory
from fastattn.arguments import attention_params
from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.sources import ELEMENTS
from tests.support.cases import SEVERAL_TILES, WITHIN_ONE_TILE, Case, pairwise
from tests.support.contract import check
from tests.support.p100_small_kernels import compiled, listing

REASON = "the native part is not built"
launches = pytest.importorskip("benchmarks.p100.launches", reason=REASON)
tracing = pytest.importorskip("benchmarks.p100.tracing", reason=REASON)
on_the_cpu = pytest.importorskip("tests.simt.attention", reason=REASON).on_the_cpu
pytestmark = pytest.mark.slow
CASES = pairwise() + WITHIN_ONE_TILE + SEVERAL_TILES


@pytest.fixture(scope="module", autouse=True)
def disassembler() -> None:
    try:
        nvdisasm.path()
    except nvdisasm.NotFound as error:
        pytest.skip(str(error))


@functools.cache
def program(kernel: str, element: str) -> sass.Program:
    cubins = tracing.Cubins(tracing.INSTALLED)
    file = cubins.file(element)
    if not file.is_file():
        pytest.skip(f"there is no machine code for sm_60 here: {images.installed().reason or file.name}")
    return cubins.program(kernel, element)


class MachineCode:
    """The kernels of an element type on the executor of machine code, as tests/simt/attention.py launches them."""

    def __init__(self, element: str):
        self.element = element

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        params: bytes,
        *,
        dynamic_smem: int,
        buffers: Sequence[tuple[Tensor, str, bool]],
        schedule: object,
    ) -> None:
        execute(program(name, self.element), grid, block[0], dynamic_smem, params, buffers)


class MachineCodeKernels:
    def has_mma(self, element: str) -> bool:
        return False

    def library(self, kernel: str, element: str) -> MachineCode:
        return MachineCode(element)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_contract(number: int) -> None:
    """Every other case takes the backward in two kernels, as on a card that it does not fill."""
    with on_the_cpu(MachineCodeKernels(), multiprocessors=1000 if number % 2 else 1):
        check(CASES[number])


@pytest.mark.parametrize("seqlens", [(82, 82), (129, 300)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_contract_of_longer_rows(dtype: torch.dtype, dim: int, seqlens: tuple[int, int]) -> None:
    case = Case(dtype=dtype, seqlens=seqlens, dims=(dim, dim), heads=(1, 1), batch=1)
    with on_the_cpu(MachineCodeKernels(), multiprocessors=1 if seqlens[0] < 100 else 1000):
        check(case)


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_instruction_is_understood(element: str) -> None:
    unknown = set()
    for kernel in (name for name, k in launches.KERNELS.items() if not k.pass_.endswith("_mma")):
        code = program(kernel, element)
        state = Execution(code, [(0, 0, 0)], (32, 1), 0, {0: bytes(1 << 12), 2: code.constants}, GlobalMemory([])).state
        for instruction in code.instructions:
            try:
                if instruction.op in ("LDG", "STG", "LDS", "STS"):
                    Access(instruction, state)
                elif instruction.op not in control.OPERATIONS:
                    step_of(instruction, state)
            except ValueError as error:
                unknown.add(str(error))
    assert not unknown


@pytest.mark.parametrize("length", [64, 192, 384])
def test_multiplications_and_sectors_of_blocks(length: int) -> None:
    """The multiplications are those of the two products, the sectors those of q, k, v, out and lse."""
    tensors = (torch.randn(1, 1, length, 64) for _ in range(3))
    (launch,) = launches.record(attention_params(*tensors), backward=False)
    code, kernel = program(launch.kernel, launch.element), launches.KERNELS[launch.kernel]
    traces = execute(code, launch.grid, launch.threads, launch.smem, launch.params_bytes, launch.buffers)
    is_ffma = np.array([i.op == "FFMA" for i in code.instructions])
    keys = -(-length // kernel.block_n) * kernel.block_n
    for (tile, *_), block in traces.items():
        rows = min(kernel.block_m, length - tile * kernel.block_m)
        ffma = sum(int(warp.lanes[is_ffma[warp.index]].sum()) for warp in block.warps)
        assert 2 * 64 * rows * length <= ffma <= 1.03 * 2 * 64 * kernel.block_m * keys
        row = 64 * 4 // 32  # sectors
        read, written = ({name: len(x) for name, x in which.items()} for which in (block.read, block.written))
        assert read == {"q": rows * row, "k": length * row, "v": length * row}
        assert written == {"out": rows * row, "lse": rows // 8}


def test_the_listing_is_that_of_the_source() -> None:
    compiler = nvrtc.find(60)
    if compiler.version != "12.9":
        pytest.skip(f"the listing is that of NVRTC 12.9, here is {compiler.version}")
    assert compiled() == listing()
