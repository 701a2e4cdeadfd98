"""The launches of a call: kernels, grids, workspace; and the proof that the table of cases reaches every kernel."""

from __future__ import annotations

import threading

import pytest
import torch

from fastattn.arguments import attention_params
from fastattn.params import UNBOUNDED, AttentionParams, Forward
from tests.simt.attention import on_the_cpu
from tests.support.cases import SEVERAL_TILES, WITHIN_ONE_TILE, Case, pairwise
from tests.support.contract import call

cuda = pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built")
launches = pytest.importorskip("benchmarks.p100.launches")
EVERYWHERE = UNBOUNDED, UNBOUNDED, False  # no band
CAUSAL = UNBOUNDED, 0, False
HALF = ("float16", "bfloat16")
MANY = 1000  # multiprocessors: more than there are blocks


def problem(
    seqlens: tuple[int, int] = (70, 75),
    heads: tuple[int, int] = (4, 2),
    batch: int = 3,
    dtype: torch.dtype = torch.float32,
    **arguments: object,
) -> AttentionParams:
    q = torch.randn(batch, heads[0], seqlens[0], 16, dtype=dtype)
    k, v = (torch.randn(batch, heads[1], seqlens[1], 16, dtype=dtype) for _ in range(2))
    return attention_params(q, k, v, enable_gqa=heads[0] != heads[1], **arguments)


# ---- choice ----


@pytest.mark.parametrize(
    ("pass_", "dims", "seqlens", "name"),
    [
        ("attention_fwd", (1, 1), (1, 1), "d32_32x32"),
        ("attention_fwd", (32, 32), (32, 64), "d32_32x32"),
        ("attention_fwd", (32, 32), (64, 64), "d32_64x64"),
        ("attention_fwd", (32, 32), (33, 33), "d32_64x64"),  # four small tiles or one large, both of 64 x 64 scores
        ("attention_fwd", (32, 32), (65, 65), "d32_32x32"),  # 96 x 96 scores or 128 x 128
        ("attention_fwd", (32, 32), (150, 200), "d32_32x32"),  # 160 x 224 or 192 x 256
        ("attention_fwd", (32, 32), (1000, 1000), "d32_64x64"),
        ("attention_fwd", (0, 0), (0, 0), "d32_32x32"),
        ("attention_fwd", (33, 8), (64, 64), "d64_64x64"),
        ("attention_fwd", (8, 64), (32, 32), "d64_32x32"),
        ("attention_fwd", (64, 64), (65, 65), "d64_96x96"),
        ("attention_fwd", (64, 64), (96, 96), "d64_96x96"),
        ("attention_fwd", (64, 64), (97, 97), "d64_64x64"),
        ("attention_fwd", (65, 65), (1, 1), "d128_64x32"),
        ("attention_fwd", (72, 200), (1, 1), "d256_64x32"),
        ("attention_fwd_mma", (1, 1), (1, 1), "d32_32x32"),
        ("attention_fwd_mma", (32, 32), (64, 64), "d32_64x64"),
        ("attention_fwd_mma", (64, 64), (32, 32), "d64_32x32"),
        ("attention_fwd_mma", (64, 64), (64, 32), "d64_64x32"),
        ("attention_fwd_mma", (64, 64), (82, 82), "d64_32x32"),  # 96 x 96 scores or 128 x 96
        ("attention_fwd_mma", (64, 64), (128, 96), "d64_64x32"),
        ("attention_fwd_mma", (64, 64), (1000, 1000), "d64_64x32"),
        ("attention_fwd_mma", (65, 65), (1, 1), "d128_64x32"),
        ("attention_fwd_mma", (72, 200), (1, 1), "d256_48x16"),
        ("attention_bwd", (32, 32), (64, 64), "d32_32x32"),
        ("attention_bwd", (64, 64), (64, 64), "d64_64x64"),
        ("attention_bwd", (64, 64), (64, 32), "d64_32x32"),
        ("attention_bwd", (64, 64), (65, 65), "d64_48x96"),
        ("attention_bwd", (64, 64), (96, 96), "d64_48x96"),
        ("attention_bwd", (64, 64), (97, 97), "d64_64x64"),
        ("attention_bwd", (128, 128), (64, 64), "d128_32x32"),
        ("attention_bwd", (8, 129), (64, 64), "d256_32x32"),
        ("attention_bwd_dq", (64, 64), (64, 64), "d64_32x32"),
        ("attention_bwd_dbias", (8, 8), (64, 64), "d256_32x32"),
    ],
)
def test_choice(pass_: str, dims: tuple[int, int], seqlens: tuple[int, int], name: str) -> None:
    assert cuda.choose_kernel(pass_, *dims, *seqlens, *EVERYWHERE).name == f"{pass_}_{name}"


@pytest.mark.parametrize(
    ("pass_", "seqlens", "band", "name"),
    [
        ("attention_fwd", (64, 64), CAUSAL, "d64_32x32"),  # three small tiles of four
        ("attention_fwd", (96, 96), CAUSAL, "d64_32x32"),  # six of nine
        ("attention_fwd", (96, 96), (UNBOUNDED, 90, False), "d64_96x96"),
        ("attention_fwd", (64, 1000), (UNBOUNDED, 0, True), "d64_64x64"),
        ("attention_fwd", (256, 256), CAUSAL, "d64_64x64"),
        ("attention_bwd", (64, 64), CAUSAL, "d64_64x64"),
        ("attention_bwd", (96, 96), CAUSAL, "d64_32x32"),
    ],
)
def test_choice_in_a_band(pass_: str, seqlens: tuple[int, int], band: tuple[int, int, bool], name: str) -> None:
    assert cuda.choose_kernel(pass_, 64, 64, *seqlens, *band).name == f"{pass_}_{name}"


@pytest.mark.parametrize("seqlens", [(1, 1), (64, 64), (100, 37), (37, 100), (5, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("band", [(UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (0, UNBOUNDED), (20, 7), (-3, 40), (40, -35)])
def test_scores_are_those_of_the_tiles_in_the_band(seqlens: tuple[int, int], band: tuple[int, int]) -> None:
    (n, m), (left, right) = seqlens, band
    offset = torch.arange(m) - torch.arange(n)[:, None]
    is_allowed = (offset >= -left) & (offset <= right)
    for kernel in (k for k in launches.KERNELS.values() if k.block_m):
        tiles = sum(
            int(tile.any()) for rows in is_allowed.split(kernel.block_m) for tile in rows.split(kernel.block_n, dim=1)
        )
        assert cuda.computed_scores(kernel, n, m, left, right) == tiles * kernel.block_m * kernel.block_n


@pytest.mark.parametrize("pass_", ["attention_fwd", "attention_fwd_mma", "attention_bwd"])
def test_a_larger_tile_never_computes_many_more_scores(pass_: str) -> None:
    def scores(kernel: object, n: int, m: int) -> int:
        sizes = zip((n, m), (kernel.block_m, kernel.block_n), strict=True)
        return torch.tensor([-(-length // block) * block for length, block in sizes]).prod().item()

    chosen = set()
    for n in range(1, 200, 7):
        for m in range(1, 200, 5):
            kernel, smaller = (cuda.choose_kernel(pass_, 64, 64, *lengths, *EVERYWHERE) for lengths in ((n, m), (1, 1)))
            assert scores(kernel, n, m) <= cuda.SCORE_COST[pass_] * scores(smaller, n, m), (n, m)
            chosen.add(kernel.name)
    assert chosen == {kernel.name for kernel in launches.KERNELS.values() if kernel.name.startswith(f"{pass_}_d64")}


# ---- grids ----


def test_forward_grid() -> None:
    (launch,) = launches.record(problem(), backward=False)
    assert (launch.kernel, launch.element, launch.grid) == ("attention_fwd_d32_32x32", "float32", (3, 4, 3))


def test_forward_on_tensor_cores() -> None:
    """Only of the elements that they multiply, and never the backward."""
    for dtype, name in ((torch.float16, "attention_fwd_mma_d32_32x32"), (torch.bfloat16, "attention_fwd_d32_32x32")):
        for is_backward, passes in ((False, [name]), (True, ["attention_bwd_d32_32x32"])):
            recorded = launches.record(problem(dtype=dtype), is_backward, multiprocessors=1, mma=("float16",))
            assert [launch.kernel for launch in recorded] == passes


def test_backward_grids() -> None:
    whole = launches.record(problem(), backward=True, multiprocessors=1)
    assert [(x.kernel, x.grid) for x in whole] == [("attention_bwd_d32_32x32", (1, 2, 3))]
    split = launches.record(problem(), backward=True, multiprocessors=MANY)
    assert [(x.kernel, x.grid) for x in split] == [
        ("attention_bwd_dq_d32_32x32", (3, 4, 3)),  # it writes what the other reads, so it is first
        ("attention_bwd_d32_32x32", (3, 2, 3)),
    ]


@pytest.mark.parametrize(("multiprocessors", "is_split"), [(3, False), (4, True)])
def test_the_backward_is_split_where_blocks_are_few(multiprocessors: int, is_split: bool) -> None:
    """The backward has six blocks here and asks for two on each multiprocessor."""
    assert len(launches.record(problem(), True, multiprocessors)) == 1 + is_split
    assert len(launches.record(problem(seqlens=(70, 32)), True, multiprocessors)) == 1, "one tile of keys"


def test_bias_gradient_grids() -> None:
    p = problem(attn_bias=torch.randn(4, 1, 75, dtype=torch.float16), dtype=torch.float16)
    *_, dbias, dbias_sum = launches.record(p, backward=True, multiprocessors=10)
    assert (dbias.kernel, dbias.element, dbias.grid) == ("attention_bwd_dbias_d256_32x32", "float16", (12, 2, 1))
    assert (dbias_sum.kernel, dbias_sum.grid) == ("attention_dbias_sum", (2, 1, 1))
    assert {name: tuple(x.shape) for x, name, _ in dbias.buffers}["dbias_partial"] == (2, 1, 4, 1, 75)


def test_no_more_blocks_for_sequences_than_a_grid_has() -> None:
    p = problem(seqlens=(1, 40), heads=(1, 1), batch=70000, attn_bias=torch.randn(1, 1, 40))
    grids = [x.grid for x in launches.record(p, backward=False)]
    for multiprocessors in (1, 100000):
        grids += [x.grid for x in launches.record(p, backward=True, multiprocessors=multiprocessors)]
    assert [z for *_, z in grids] == [65535, 65535, 1, 1, 65535, 65535, 1, 1]


def test_nothing_to_do_launches_nothing() -> None:
    for p in (problem(batch=0), problem(heads=(0, 0))):
        assert launches.record(p, backward=False) == launches.record(p, backward=True) == []


@pytest.mark.parametrize(
    ("dtype", "seqlen_k", "multiprocessors", "expected"),
    [
        (torch.float16, 75, 1, (3, 4, 70, 16)),
        (torch.float32, 75, 1, None),  # dq itself keeps the sums
        (torch.float16, 32, 1, None),  # one tile of keys: nothing to keep
        (torch.float16, 75, MANY, None),  # the split keeps them in registers
    ],
)
def test_float_sums_of_dq(dtype: torch.dtype, seqlen_k: int, multiprocessors: int, expected: object) -> None:
    recorded = launches.record(problem(seqlens=(70, seqlen_k), dtype=dtype), True, multiprocessors)
    sums = [tuple(x.shape) for launch in recorded for x, name, _ in launch.buffers if name == "dq_sum"]
    assert sums == ([] if expected is None else [expected])


# ---- the table of cases ----


class Nothing:
    """Stand-in for the kernels: a launch leaves its results as they are."""

    def library(self, kernel: str, element: str) -> Nothing:
        return self

    def launch(self, *args: object, **kwargs: object) -> None:
        pass


def launched(case: Case, multiprocessors: int, mma: tuple[str, ...] = ()) -> list[launches.Launch]:
    """The launches of a case, forward and backward."""
    tensors, arguments = case.make()
    inputs = [None if x is None else x.requires_grad_() for x in tensors]
    with on_the_cpu(Nothing(), multiprocessors=multiprocessors), launches.recording(multiprocessors, mma) as recorded:
        results = call(inputs, arguments)
        torch.autograd.grad(results, [x for x in inputs if x is not None], [torch.ones_like(x) for x in results])
    return recorded


@pytest.fixture(scope="module")
def several_tiles() -> set[tuple[str, str]]:
    """(kernel, element) of all launches of the table with more than one tile of queries and of keys."""
    found = set()
    for case in pairwise() + SEVERAL_TILES:
        for launch in [*launched(case, 1), *launched(case, MANY), *launched(case, 1, HALF)]:
            kernel = launches.KERNELS[launch.kernel]
            blocks = kernel.block_m, kernel.block_n
            if kernel.block_m == 0 or all(n > block for n, block in zip(case.seqlens, blocks, strict=True)):
                found.add((launch.kernel, launch.element))
    return found


@pytest.mark.parametrize("kernel", launches.KERNELS)
def test_every_kernel_has_several_tiles_in_some_case(kernel: str, several_tiles: set[tuple[str, str]]) -> None:
    elements = {element for name, element in several_tiles if name == kernel}
    if launches.KERNELS[kernel].pass_.endswith("_mma"):
        assert "float16" in elements and elements <= {*HALF}  # test_tensor_cores.py has all for both
    else:
        assert "float32" in elements and len(elements) > 1, elements


def test_every_backward_has_rows_whose_keys_are_all_in_one_tile() -> None:
    """The backward takes delta of such rows from the tile, so every kernel needs a case with them."""
    backward = {k.name for k in launches.KERNELS.values() if k.pass_ == "attention_bwd"}
    kernels = [launch.kernel for case in WITHIN_ONE_TILE for launch in launched(case, 1) if launch.kernel in backward]
    assert sorted(kernels) == sorted(backward)
    for case, name in zip(WITHIN_ONE_TILE, kernels, strict=True):
        kernel = launches.KERNELS[name]
        assert case.seqlens[0] > kernel.block_m and case.seqlens[1] <= kernel.block_n, case


# ---- the device ----


def test_a_device_holds_in_every_thread() -> None:
    """As in autograd's, which run the backward pass of a GPU."""
    p = problem()
    with launches.recording(1) as recorded:
        thread = threading.Thread(target=cuda.attention_fwd, args=(Forward(*launches.empty_results(p)), p))
        thread.start()
        thread.join()
    assert [launch.kernel for launch in recorded] == ["attention_fwd_d32_32x32"]


def test_devices_nest_and_end() -> None:
    p = problem()
    with launches.recording(1) as outer:
        with pytest.raises(RuntimeError), launches.recording(1) as inner:
            raise RuntimeError
        cuda.attention_fwd(Forward(*launches.empty_results(p)), p)
    assert len(outer) == 1 and not inner
    assert type(cuda._device.value) is cuda.Device


def test_sequences_beyond_a_grid_are_taken_in_turn() -> None:
    p = problem(batch=5)
    recorder = launches.Recorder(1)
    recorder.max_grid_z = 2
    with cuda.on(recorder):
        cuda.attention_fwd(Forward(*launches.empty_results(p)), p)
    (launch,) = recorder.launches
    assert launch.grid[2] == 2
