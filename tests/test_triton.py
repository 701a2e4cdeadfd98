"""The Triton kernels against the float64 oracle: on a GPU that Triton takes, else in its interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import fastattn
from cases import Case, full, pairwise
from contract import call, check, run
from fastattn import reference
from fastattn.params import AttentionParams
from fastattn.triton_kernels import arguments, tiles
from triton_attention import DEVICE, on_triton

pytestmark = [pytest.mark.triton] if DEVICE == "cpu" else [pytest.mark.triton, pytest.mark.gpu]
VARIED = Case(
    dtype=torch.float16, mask="padding", bias="per-head", band="window", dropout_p=0.3, heads=(4, 2), seqlens=(70, 75)
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The interpreter takes a second per case, so the full product is sampled."""
    if "triton_case" in metafunc.fixturenames:
        sample = full()[::29] if metafunc.config.getoption("full") else []
        metafunc.parametrize("triton_case", sample + pairwise(), ids=str)


def test_kernels_run_where_the_tests_think() -> None:
    assert (DEVICE == "cpu") == arguments.IS_INTERPRETED


def test_contract(triton_case: Case, poisoned: None) -> None:
    with on_triton():
        check(triton_case, DEVICE)


# ---- tiles ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("band", ["none", "window", "window-bottom-right", "causal-window"])
def test_contract_in_small_tiles(band: str, packed: bool, poisoned: None) -> None:
    case = replace(VARIED, dtype=torch.float32, band=band, packed=packed, heads=(2, 1), seqlens=(50, 41), batch=1)
    for block_m, block_n in ((16, 32), (32, 16)):
        with on_triton(block_m, block_n):
            check(case, DEVICE)


@pytest.mark.parametrize("tile", sorted({tile[:2] for row in tiles.TABLE for tile in row.tiles}))
def test_contract_in_every_tile_of_the_table(tile: tuple[int, int], poisoned: None) -> None:
    with on_triton(*tile):
        check(replace(VARIED, heads=(1, 1), seqlens=(tile[0] + 2, tile[1] + 12), batch=1), DEVICE)


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


def test_every_row_of_the_table_can_be_chosen() -> None:
    def sizes(row: tiles.Row) -> tuple[int, int, int]:
        return row.element_size, row.head_dim, row.seqlen_q or 10**6

    chosen = [tiles.choose(row.capability or (99, 0), *sizes(row)) for row in tiles.TABLE]
    assert chosen == [row.tiles for row in tiles.TABLE]
    for element_size in (2, 4):
        for head_dim in range(1, 257):
            assert tiles.choose((8, 0), element_size, head_dim, 1) in chosen
    with pytest.raises(ValueError, match="no tiles for head_dim 257 in elements of 4 bytes"):
        tiles.choose((8, 0), 4, 257, 1)


# ---- sizes and layouts ----


class EveryLength(Case):
    """Packed sequences of every length up to 129, with as many keys in another order."""

    def _lengths(self, longest: int) -> list[int]:
        return [(37 * n if longest == 130 else n) % 131 % (longest + 1) for n in range(self.batch)]


def test_every_length(poisoned: None) -> None:
    case = EveryLength(
        packed=True, seqlens=(129, 130), heads=(1, 1), batch=130, band="window-bottom-right", dims=(16, 8)
    )
    with on_triton():
        check(case, DEVICE)


@pytest.mark.parametrize("head_dim", [3, 20, 33, 100, 129])
def test_any_head_dim(head_dim: int, poisoned: None) -> None:
    with on_triton():
        check(Case(dims=(head_dim, 260 - 2 * head_dim if head_dim > 100 else head_dim + 1)), DEVICE)


@pytest.mark.parametrize("copies", [1, 3, 64])
def test_bias_gradient_in_any_number_of_copies(copies: int, poisoned: None) -> None:
    case = replace(VARIED, dtype=torch.float32, bias="per-key", heads=(2, 1), seqlens=(35, 20))
    with on_triton(16, 16, multiprocessors=copies):
        check(case, DEVICE)


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


def test_lengths_are_cut_to_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong lengths, which only a synchronising check could refuse, give numbers, and touch nothing outside."""
    monkeypatch.setattr(fastattn.checks, "_check_edges", lambda *args: None)
    q, k, v = (torch.randn(20, 2, 16, device=DEVICE) for _ in range(3))
    edges = torch.tensor([0, 9, 40], dtype=torch.int32, device=DEVICE)
    with on_triton():
        out = fastattn.varlen_attention(q, k, v, edges, edges, 8, 8)
    assert out.isfinite().all()
    assert not out[8].any() and not out[17:].any()


def test_no_problem_is_too_small() -> None:
    with on_triton():
        out = fastattn.scaled_dot_product_attention(*(torch.randn(0, 2, 5, 8, device=DEVICE) for _ in range(3)))
        edges = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        inputs = [torch.randn(4, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
        packed = fastattn.varlen_attention(*inputs, edges, edges, 4, 4)
        grads = torch.autograd.grad(packed.sum(), inputs)
    assert out.shape == (0, 2, 5, 8)
    assert not packed.any() and not any(x.any() for x in grads)


# ---- the same bits ----


@pytest.mark.parametrize("dropout_p", [0.3, 0.8, 1 - 2**-40, 1.0])
def test_dropout_bits_are_the_references(dropout_p: float, attended: list[AttentionParams]) -> None:
    """Equal weights, and an identity in the place of v and of the upstream gradient, show every single one."""
    batch, nheads, seqlen_q, seqlen_k = 2, 3, 33, 64
    q, k = torch.zeros(batch, nheads, seqlen_q, 16), torch.zeros(batch, nheads, seqlen_k, 16)
    v = torch.eye(seqlen_k).expand(batch, nheads, -1, -1)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in (q, k, v))
    with on_triton(16, 32):
        out = fastattn.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        upstream = torch.eye(seqlen_q, seqlen_k, device=DEVICE).expand_as(out)
        (dv,) = torch.autograd.grad(out, v, upstream)
    (p,) = attended
    assert p.seed is not None
    kept = reference.dropout_mask(p.seed, batch, nheads, seqlen_q, seqlen_k, dropout_p)
    assert kept.any() == (dropout_p < 0.9)
    rescale = 1 / (1 - dropout_p) if kept.any() else 0.0
    torch.testing.assert_close(out, kept * rescale / seqlen_k, rtol=1e-5, atol=0)
    torch.testing.assert_close(dv[..., :seqlen_q], kept.transpose(-1, -2) * rescale / seqlen_k, rtol=1e-5, atol=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CUDA kernels run in the executor, on CPU tensors")
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_the_cuda_kernels(packed: bool) -> None:
    """The same weights are dropped, so the two differ by roundings only, here of up to 75 terms."""
    simt = pytest.importorskip("simt.attention", reason="the native part is not built")
    case = replace(VARIED, dtype=torch.float32, packed=packed)
    with on_triton():
        actual = run(call, case, case.dtype)
    with simt.on_the_cpu(simt.SourceKernels()):
        expected = run(call, case, case.dtype)
    for name, x in actual.items():
        largest = float(expected[name][expected[name].isfinite()].abs().max())
        torch.testing.assert_close(x, expected[name], rtol=0, atol=75 * torch.finfo(case.dtype).eps * largest)


# ---- TF32 ----


@pytest.mark.parametrize(("allowed", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_products_are_exact_unless_the_user_allows_tf32(allowed: str, precision: str) -> None:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        assert arguments._allows_tf32() == (precision == "tf32")
    finally:
        torch.set_float32_matmul_precision(previous)
