"""The Triton kernels against the float64 oracle: on a GPU that Triton takes, else in its interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import fastattn
from fastattn import functional, reference
from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from fastattn.params import AttentionParams
from fastattn.triton_kernels import arguments, tiles
from tests.support.cases import AXES, Case, cumulative, full, pairwise
from tests.support.contract import call, check, run
from tests.support.triton_attention import DEVICE, check_once, on_triton

pytestmark = [pytest.mark.triton] if DEVICE == "cpu" else [pytest.mark.triton, pytest.mark.gpu]
VARIED = Case(
    dtype=torch.float16, mask="padding", bias="per-head", band="window", dropout_p=0.3, heads=(4, 2), seqlens=(70, 75)
)


# The backward of short sequences is one kernel or two, here with one (batch, head) for each program.
MODES = {"one": {}, "two": {"multiprocessors": 100, "in_one": False}}


def has_two(case: Case) -> bool:
    return max(case.seqlens) <= 128


def fewer_pairs() -> list[tuple[Case, str]]:
    """Pairs of all axes but the widest, whose values come by turns: two thirds of all pairs, each in one mode.

    A case gets the mode that more of its values have not met.
    """
    axes = {name: values for name, values in AXES.items() if name != "dims"}
    rows = (dict(zip(axes, row, strict=True)) for row in AllPairs(list(axes.values())))
    cases = [Case(**row, dims=dims) for row, dims in zip(rows, itertools.cycle(AXES["dims"]), strict=False)]
    met: set[tuple[str, str, Any]] = set()
    found = []
    for n, case in enumerate(cases):
        meets = {mode: {(mode, *value) for value in vars(case).items()} for mode in sorted(MODES, reverse=n % 2 == 1)}
        mode = max(meets, key=lambda mode: len(meets[mode] - met)) if has_two(case) else "one"
        if has_two(case):
            met |= meets[mode]
        found.append((case, mode))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The interpreter takes seconds per case, so the full product is sampled."""
    if "triton_case" in metafunc.fixturenames:
        cases = full()[::29] + pairwise() if metafunc.config.getoption("full") else []
        values = [(case, mode) for case in cases for mode in MODES if mode == "one" or has_two(case)] or fewer_pairs()
        metafunc.parametrize(("triton_case", "mode"), values, ids=str)


def test_kernels_run_where_the_tests_think() -> None:
    assert (DEVICE == "cpu") == arguments.IS_INTERPRETED


def test_contract(triton_case: Case, mode: str, poisoned: None) -> None:
    with on_triton(**MODES[mode]):
        check_once(triton_case)


def test_every_value_of_every_axis_meets_both_modes() -> None:
    short = [(case, mode) for case, mode in fewer_pairs() if has_two(case)]
    for axis, values in AXES.items():
        for value in values:
            modes = {mode for case, mode in short if getattr(case, axis) == value}
            assert modes == {*MODES} or (axis == "seqlens" and max(value) > 128), (axis, value)


@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_give_the_same_bits(packed: bool, in_one: bool, poisoned: None) -> None:
    with on_triton(in_one=in_one):
        check(replace(VARIED, packed=packed, seqlens=(40, 45)), DEVICE)


# ---- tiles ----


def by_turns(*axes: list[Any]) -> list[Any]:
    """The product of three axes; every other row is slow, so that make test has every two values of two axes."""
    products = itertools.product(*(enumerate(axis) for axis in axes))
    indexed = [(sum(i for i, _ in row) % 2, [value for _, value in row]) for row in products]
    return [pytest.param(*values, marks=pytest.mark.slow if is_odd else ()) for is_odd, values in indexed]


@pytest.mark.parametrize(
    ("band", "packed", "tile"),
    by_turns(["none", "window", "window-bottom-right", "causal-window"], [False, True], [(16, 32), (32, 16)]),
)
def test_contract_in_small_tiles(band: str, packed: bool, tile: tuple[int, int], poisoned: None) -> None:
    case = replace(VARIED, dtype=torch.float32, band=band, packed=packed, heads=(2, 1), seqlens=(50, 41), batch=1)
    with on_triton(*tile):
        check_once(case)


@pytest.mark.parametrize("tile", sorted({row.tile[:2] for row in tiles.table()}))
def test_contract_in_every_tile_of_the_table(tile: tuple[int, int], poisoned: None) -> None:
    with on_triton(*tile):
        check_once(replace(VARIED, heads=(1, 1), seqlens=(tile[0] + 2, tile[1] + 12), batch=1))


@pytest.mark.parametrize(("band", "dropout_p"), [("none", 0.3), ("causal-bottom-right", 0.0)])
def test_short_keys_and_queries_of_several_tiles(band: str, dropout_p: float, poisoned: None) -> None:
    case = replace(VARIED, dtype=torch.float32, band=band, dropout_p=dropout_p, heads=(2, 1), seqlens=(40, 30), batch=1)
    with on_triton(16, 32):
        check_once(case)


@pytest.mark.parametrize(
    ("heads", "packed", "multiprocessors"), by_turns([(4, 4), (3, 3), (4, 2), (3, 1)], [False, True], [1, 4])
)
def test_any_number_of_pairs_per_program(
    heads: tuple[int, int], packed: bool, multiprocessors: int, poisoned: None
) -> None:
    """2 of 12 and of 6, 1 of 9 and of 3; fewer where that leaves multiprocessors idle."""
    case = replace(VARIED, dtype=torch.float32, packed=packed, heads=heads, seqlens=(18, 20), batch=3)
    with on_triton(multiprocessors=multiprocessors):
        check_once(case)


def test_tiles_that_band_or_length_exclude_are_never_loaded() -> None:
    def results(k: Tensor, v: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.scaled_dot_product_attention(*inputs, window=(0, 31))
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.arange(16.0, device=DEVICE).expand_as(out))]

    q, k, v = (torch.randn(1, 1, n, 16, device=DEVICE) for n in (32, 160, 160))
    with on_triton(32, 32):
        expected = results(k, v)
        k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.nan  # a product with any of these is NaN, whatever its weight
        actual = results(k, v)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(actual[2][:, :, 64:], torch.zeros(1, 1, 96, 16, device=DEVICE))


# ---- sizes and layouts ----


class EveryLength(Case):
    """Packed sequences of every length up to 129, with as many keys in another order."""

    def _lengths(self, longest: int) -> list[int]:
        return [(37 * n if longest == self.seqlens[1] else n) % self.batch % (longest + 1) for n in range(self.batch)]


@pytest.mark.slow
def test_every_length(poisoned: None) -> None:
    lengths = {"seqlens": (129, 130), "batch": 130}
    case = EveryLength(packed=True, heads=(1, 1), band="window-bottom-right", dims=(16, 8), **lengths)
    with on_triton():
        check_once(case)


def test_every_short_length(poisoned: None) -> None:
    lengths = {"seqlens": (64, 63), "batch": 65}
    with on_triton():
        check_once(EveryLength(packed=True, heads=(1, 1), band="causal-bottom-right", dims=(8, 16), **lengths))


@pytest.mark.parametrize("head_dim", [3, 20, 33, 100, 129])
def test_any_head_dim(head_dim: int, poisoned: None) -> None:
    with on_triton():
        check_once(Case(dims=(head_dim, 260 - 2 * head_dim if head_dim > 100 else head_dim + 1)))


@pytest.mark.parametrize("copies", [1, 3, 64])
def test_bias_gradient_in_any_number_of_copies(copies: int, poisoned: None) -> None:
    case = replace(VARIED, dtype=torch.float32, bias="per-key", heads=(2, 1), seqlens=(35, 20))
    with on_triton(32, 16, multiprocessors=copies):
        check_once(case)


def test_a_bias_in_float32_beside_half_tensors() -> None:
    q, k, v = (torch.randn(2, 2, 33, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    bias, results = torch.randn(2, 33, 33, device=DEVICE, requires_grad=True), []
    for backend in (on_triton(), fastattn.use_backend("reference")):
        with backend:
            out = fastattn.scaled_dot_product_attention(q, k, v, attn_bias=bias)
            upstream = torch.arange(16, device=DEVICE).expand_as(out).to(out.dtype)
            results.append((out, *torch.autograd.grad(out, bias, upstream)))
    (out, dbias), (expected_out, expected) = results
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(out, expected_out, rtol=0, atol=2e-2)
    torch.testing.assert_close(dbias, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Memory whose ends are further apart than 32 bits can say; on the CPU a file with holes."""
    size = 2**31 + 2**32 + 2**20
    if DEVICE == "cpu":
        file = tmp_path_factory.mktemp("huge") / "storage"
        return torch.from_file(str(file), shared=True, size=size, dtype=torch.float16)
    if torch.cuda.mem_get_info()[0] < 4 * size:
        pytest.skip("needs 26 GB of free memory on the GPU")
    return torch.empty(size, dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "heads", "rows"])
@pytest.mark.parametrize("in_one", [False, True])
def test_offsets_beyond_32_bits(in_one: bool, far: int, huge: Tensor) -> None:
    """An offset that wraps around would end up inside of the memory, too, but at the wrong place."""

    def placed(x: Tensor, memory: Tensor, place: int) -> Tensor:
        strides = list(x.stride())
        strides[far] = 2**30
        return memory.as_strided(x.shape, strides, 2**31 + place).copy_(x)

    shape = [2, 2, 3, 16]
    shape[far] = 5
    scores = (*shape[:3], shape[2])
    q, k, v, dout = (torch.randn(shape, device=DEVICE).half() for _ in range(4))
    mask, bias = torch.rand(scores, device=DEVICE) > 0.3, torch.randn(scores, device=DEVICE).half()
    results = []
    for is_far in (False, True):
        tensors = [q, k, v, bias, dout]
        if is_far:
            tensors = [placed(x, huge, 4096 * i) for i, x in enumerate(tensors)]
        *inputs, upstream = tensors
        attn_mask = placed(mask, huge.view(torch.uint8).view(torch.bool), 2**20) if is_far else mask
        with on_triton(in_one=in_one):
            *qkv, attn_bias = (x.detach().requires_grad_() for x in inputs)
            out = fastattn.scaled_dot_product_attention(*qkv, attn_mask, attn_bias=attn_bias)
            results.append((out, *torch.autograd.grad(out, [*qkv, attn_bias], upstream)))
    for near, far_away in zip(*results, strict=True):
        assert near.any() and torch.equal(near, far_away)


def test_lengths_are_cut_to_the_tensors() -> None:
    """Wrong lengths, which only a synchronising check could refuse, give numbers, and touch nothing outside."""
    q, k, v = (torch.randn(20, 2, 16, device=DEVICE) for _ in range(3))
    right, wrong = torch.tensor([[0, 8, 16], [0, 9, 40]], dtype=torch.int32, device=DEVICE)
    p = varlen_attention_params(q, k, v, right, right, 8, 8)
    with on_triton():
        out, _ = functional.attend(p.replace(cu_seqlens_q=wrong, cu_seqlens_k=wrong))
    assert out.isfinite().all()
    assert not out[8].any() and not out[17:].any()


@pytest.mark.parametrize("in_one", [False, True])
def test_numbers_of_keys_are_cut_to_the_places(in_one: bool) -> None:
    """Wrong ones, which only a synchronising check could refuse, are none or all, dense or packed."""
    q, k, v = (torch.randn(2, 2, 8, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    edges = cumulative([8, 8]).to(DEVICE)
    right, wrong = torch.tensor([[0, 8], [-3, 40]], dtype=torch.int32, device=DEVICE)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    for p in (attention_params(q, k, v), varlen_attention_params(*packed, edges, edges, 8, 8)):
        results = []
        for used in (right, wrong):
            with on_triton(in_one=in_one):
                out, _ = functional.attend(p.replace(seqused_k=used))
                results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)])
        for x, y in zip(*results, strict=True):
            assert y.isfinite().all() and y.any() and torch.equal(x, y)


def test_no_problem_is_too_small() -> None:
    with on_triton():
        out = fastattn.scaled_dot_product_attention(*(torch.randn(0, 2, 5, 8, device=DEVICE) for _ in range(3)))
        edges = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        inputs = [torch.randn(4, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
        packed = fastattn.varlen_attention(*inputs, edges, edges, 4, 4)
        grads = torch.autograd.grad(packed.sum(), inputs)
    assert out.shape == (0, 2, 5, 8)
    assert not packed.any() and not any(x.any() for x in grads)


# ---- softcap ----


@pytest.mark.parametrize("softcap", [1e-30, 1e-3, 0.7, 50.0, 1e6, 1e30])
def test_any_softcap(softcap: float, poisoned: None) -> None:
    """Scores far above it, and scores of which the exponential alone would leave nothing."""
    with on_triton():
        check_once(Case(softcap=softcap, bias="per-head", heads=(1, 1), batch=1))


def test_tanh_is_accurate_relative_to_its_size() -> None:
    """One query dimension, k = 1, v = 0: lse is a single capped score."""
    small = torch.logspace(-30, 1.5, 400, dtype=torch.float64)
    q = torch.cat([small, -small, torch.linspace(0.5, 0.75, 200, dtype=torch.float64)]).float()[None, None, :, None]
    one = torch.ones(1, 1, 1, 1)
    with on_triton():
        inputs = (x.to(DEVICE) for x in (q, one, one))
        _, lse = fastattn.scaled_dot_product_attention(*inputs, scale=1.0, softcap=1.0, return_lse=True)
    expected = q[..., 0].double().tanh()
    error = (lse.cpu().double() - expected).abs() / expected.abs()
    assert error.max() <= 8 * torch.finfo(torch.float32).eps


# ---- the same bits ----


@pytest.mark.parametrize("dropout_p", [0.3, 0.8, 1 - 2**-40, 1.0])
def test_dropout_bits_are_the_references(dropout_p: float) -> None:
    """Equal weights, and an identity in the place of v and of the upstream gradient, show every single one."""
    batch, nheads, seqlen_q, seqlen_k = 2, 3, 33, 64
    q, k = torch.zeros(batch, nheads, seqlen_q, 16), torch.zeros(batch, nheads, seqlen_k, 16)
    v = torch.eye(seqlen_k).expand(batch, nheads, -1, -1)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in (q, k, v))
    p = draw_seed(attention_params(q, k, v, dropout_p=dropout_p))
    assert p.seed is not None
    with on_triton(16, 32):
        out, _ = functional.attend(p)
        upstream = torch.eye(seqlen_q, seqlen_k, device=DEVICE).expand_as(out)
        (dv,) = torch.autograd.grad(out, v, upstream)
    kept = reference.dropout_mask(p.seed, batch, nheads, seqlen_q, seqlen_k, dropout_p)
    assert kept.any() == (dropout_p < 0.9)
    rescale = 1 / (1 - dropout_p) if kept.any() else 0.0
    torch.testing.assert_close(out, kept * rescale / seqlen_k, rtol=1e-5, atol=0)
    torch.testing.assert_close(dv[..., :seqlen_q], kept.transpose(-1, -2) * rescale / seqlen_k, rtol=1e-5, atol=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CUDA kernels run in the executor, on CPU tensors")
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_the_cuda_kernels(packed: bool) -> None:
    """The same weights are dropped, so the two differ by roundings only, here of up to 75 terms."""
    simt = pytest.importorskip("tests.simt.attention", reason="the native part is not built")
    case = replace(VARIED, dtype=torch.float32, packed=packed)
    with on_triton():
        actual = run(call, case, case.dtype)
    with simt.on_the_cpu(simt.SourceKernels()):
        expected = run(call, case, case.dtype)
    for name, x in actual.items():
        largest = float(expected[name][expected[name].isfinite()].abs().max())
        torch.testing.assert_close(x, expected[name], rtol=0, atol=75 * torch.finfo(case.dtype).eps * largest)


# ---- TF32 ----


@pytest.mark.parametrize(("allowed", "precision"), [("highest", "tf32x3"), ("high", "tf32")])
def test_float32_products_are_exact_unless_the_user_allows_tf32(allowed: str, precision: str) -> None:
    p = AttentionParams(*[torch.empty(1, 1, 1, 16)] * 3, *[None] * 6, 1, 1, 1.0, 0.0, 0.0, 1, 1, False)
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        assert arguments.inputs(p)["PRECISION"] == precision
    finally:
        torch.set_float32_matmul_precision(previous)
