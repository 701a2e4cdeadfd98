"""The CPU kernels and numbers that are not usual: NaN, infinities, huge and subnormal ones; conversions; exp2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _cpu
from fastattn.cpu_kernels import attention as cpu
from tests.support.cpu_checks import all_halves, check_rounding
from tests.support.cpu_runs import assert_same_bits, each_isa, on_cpu, results

HALF_TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# Up to four queries have a forward pass of their own.
LENGTHS = pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(3, 9), (60, 300)])


def problem(seqlen_q: int, seqlen_k: int, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, 2, n, d) for n in (seqlen_q, seqlen_k, seqlen_k))


def rows_with_nan(x: Tensor) -> Tensor:
    """Of every row of the second head, whether it is NaN; the first head has none."""
    assert not x[0, 0].isnan().any()
    return x[0, 1].isnan().flatten(1).any(1) if x.dim() == 4 else x[0, 1].isnan()


# ---- NaN ----


@each_isa
@LENGTHS
def test_nan_in_a_query(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    q, k, v = problem(seqlen_q, seqlen_k)
    q[0, 1, 1, 5] = torch.nan
    with on_cpu(isa):
        found = results(q, k, v)
    own = torch.arange(seqlen_q) == 1
    assert all(torch.equal(rows_with_nan(found[name]), own) for name in ("out", "lse", "dq"))
    assert all(rows_with_nan(found[name]).all() for name in ("dk", "dv"))


@each_isa
@LENGTHS
def test_nan_in_a_key(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    """It reaches the out and lse of the queries that see it, and of no other."""
    q, k, v = problem(seqlen_q, seqlen_k)
    band = {"is_causal": True, "causal_align": "bottom-right"}
    first = seqlen_q // 2
    with on_cpu(isa):
        clean = results(q, k, v, **band)
        k[0, 1, first + seqlen_k - seqlen_q, 3] = torch.nan
        found = results(q, k, v, **band)
    seeing = torch.arange(seqlen_q) >= first
    assert all(torch.equal(rows_with_nan(found[name]), seeing) for name in ("out", "lse"))
    assert rows_with_nan(found["dq"])[first:].all()
    assert all(rows_with_nan(found[name]).all() for name in ("dk", "dv"))
    assert torch.equal(found["out"][:, :, :first], clean["out"][:, :, :first])


@each_isa
@LENGTHS
def test_nan_in_a_value(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    q, k, v = problem(seqlen_q, seqlen_k)
    with on_cpu(isa):
        clean = results(q, k, v)
        v[0, 1, 2, 3] = torch.nan
        found = results(q, k, v)
    column = torch.arange(8) == 3
    assert torch.equal(found["out"][0, 1].isnan(), column.expand(seqlen_q, 8))
    assert all(rows_with_nan(found[name]).all() for name in ("dq", "dk"))
    assert torch.equal(found["lse"], clean["lse"]) and torch.equal(found["dv"], clean["dv"])


@each_isa
@LENGTHS
def test_nan_in_a_bias(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    q, k, v = problem(seqlen_q, seqlen_k)
    bias = torch.zeros(2, seqlen_q, seqlen_k)
    bias[1, 2, seqlen_k - 1] = torch.nan
    with on_cpu(isa):
        found = results(q, k, v, bias)
    own = torch.arange(seqlen_q) == 2
    assert all(torch.equal(rows_with_nan(found[name]), own) for name in ("out", "lse", "dq"))
    assert torch.equal(found["dbias"][1].isnan(), own[:, None].expand(seqlen_q, seqlen_k))


@each_isa
@LENGTHS
def test_nan_in_an_upstream_gradient(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    q, k, v = problem(seqlen_q, seqlen_k)
    dout = torch.randn(q.shape)
    dout[0, 1, 1, 5] = torch.nan
    with on_cpu(isa):
        found = results(q, k, v, dout=dout)
    assert torch.equal(rows_with_nan(found["dq"]), torch.arange(seqlen_q) == 1)
    assert rows_with_nan(found["dk"]).all() and found["dv"][0, 1, :, 5].isnan().all()


# ---- large and small ----


@each_isa
@LENGTHS
@pytest.mark.parametrize("size", [1e3, 1e6, 1e20, 1e37])
def test_huge_scores(size: float, seqlen_q: int, seqlen_k: int, isa: str) -> None:
    """The largest one has all the weight; a power of 2 of the others would overflow or vanish."""
    q, _, v = problem(seqlen_q, seqlen_k)
    q = torch.ones(q.shape)
    k = torch.randperm(seqlen_k)[None, None, :, None].expand(1, 2, -1, 8).float() - seqlen_k / 2
    k = k * (size / seqlen_k)
    with on_cpu(isa):
        found = results(q, k, v, scale=0.5)
    largest = k[0, 0, :, 0].argmax()
    weight = torch.softmax(4 * k[0, 0, :, 0].double(), 0)[largest]
    assert weight > 0.97
    if weight == 1.0:
        assert torch.equal(found["out"], v[:, :, largest, None].expand_as(q))
    torch.testing.assert_close(found["lse"], (4 * k[..., largest, 0, None]).expand(1, 2, seqlen_q), rtol=1e-5, atol=0.1)


@each_isa
@LENGTHS
def test_scores_far_below_zero(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    """Of a row whose scores are all as small the weights are what they are without that."""
    q, k, v = problem(seqlen_q, seqlen_k)
    with on_cpu(isa):
        plain, low = results(q, k, v), results(q, k, v, torch.full((seqlen_k,), -1024.0))
    for name in plain:
        expected = plain[name] - 1024.0 if name == "lse" else plain[name]
        torch.testing.assert_close(low[name], expected, rtol=0, atol=2e-3)


@each_isa
@LENGTHS
def test_rows_without_keys_beside_others(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    """By an infinite bias, by a mask and by the band: out and gradients are 0, lse is -inf, also beside NaN."""
    q, k, v = problem(seqlen_q, seqlen_k)
    row = torch.arange(seqlen_q)[:, None]
    bias = torch.zeros(seqlen_q, seqlen_k).masked_fill(row == 0, -torch.inf)
    with on_cpu(isa):
        for arguments in (
            {"bias": bias},
            {"attn_mask": (row != 0).expand(seqlen_q, seqlen_k)},
            {"window": (None, seqlen_q - seqlen_k - 1), "causal_align": "top-left"} if seqlen_q > seqlen_k else {},
        ):
            if not arguments:
                continue
            found = results(q, k, v, **arguments)
            assert not found["out"][:, :, 0].any() and not found["dq"][:, :, 0].any()
            assert (found["lse"][:, :, 0] == -torch.inf).all()
            assert found["out"][:, :, 1:].all() and not any(x.isnan().any() for x in found.values())


@each_isa
def test_subnormal_numbers(isa: str) -> None:
    v = torch.tensor([[1e-40, -3e-45, 1.4e-45, 2e-38], [3e-40, 7e-44, 1.4e-45, -1e-39]]).expand(1, 1, 2, 4)
    q, k = torch.full((1, 1, 6, 4), 1e-41), torch.full((1, 1, 2, 4), 1e30)
    for rows in (1, 6):
        with on_cpu(isa):
            out = fastattn.scaled_dot_product_attention(q[:, :, :rows], k, v)
        expected = v.double().mean(2, keepdim=True).expand(1, 1, rows, 4)
        assert float((out.double() - expected).abs().max()) <= 1.5e-45


# ---- dropout ----


@each_isa
@LENGTHS
def test_dropout_of_everything_and_of_nothing(seqlen_q: int, seqlen_k: int, isa: str) -> None:
    q, k, v = problem(seqlen_q, seqlen_k)
    with on_cpu(isa):
        plain, all_dropped = results(q, k, v), results(q, k, v, dropout_p=1.0)
        assert torch.equal(all_dropped["lse"], plain["lse"])
        assert not any(all_dropped[name].any() for name in ("out", "dq", "dk", "dv"))
        assert_same_bits(results(q, k, v, dropout_p=1e-12), plain)


# ---- conversions ----


@each_isa
@HALF_TYPES
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_every_half_number_in_and_out(seqlen_q: int, dtype: torch.dtype, isa: str) -> None:
    """The value of a single key is the result."""
    v = all_halves(dtype)
    q, k = torch.zeros(256, 1, seqlen_q, 8, dtype=dtype), torch.zeros(256, 1, 1, 8, dtype=dtype)
    with on_cpu(isa):
        out = fastattn.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, v.expand_as(out), rtol=0, atol=0, equal_nan=True)


@each_isa
@HALF_TYPES
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_every_half_number_in_a_score(seqlen_q: int, dtype: torch.dtype, isa: str) -> None:
    """The score of a single key is lse, here a number of q, of k and of the bias."""
    x = all_halves(dtype).view(256, 256, 1, 1)
    x = torch.where(x.isfinite() & (x.abs() < 1e30), x, 0)
    ones, v = torch.ones_like(x), torch.zeros_like(x)
    with on_cpu(isa):
        for q, k, bias in ((x, ones, None), (ones, x, None), (0 * ones, ones, x)):
            _, lse = fastattn.scaled_dot_product_attention(
                q.expand(256, 256, seqlen_q, 1), k, v, attn_bias=bias, scale=1.0, return_lse=True
            )
            torch.testing.assert_close(lse, x[..., 0].float().expand(256, 256, seqlen_q), rtol=3e-7, atol=2e-45)


@each_isa
@HALF_TYPES
def test_half_numbers_are_rounded_half_to_even(dtype: torch.dtype, isa: str) -> None:
    with on_cpu(isa):
        check_rounding(dtype)


# ---- 2^x ----


def exp2(x: Tensor, isa: str) -> Tensor:
    y = torch.cat([x, x.new_zeros(-x.numel() % 16)])
    _cpu.exp2(isa, y.data_ptr(), y.numel())
    return y[: x.numel()]


def relative_error(x: Tensor, isa: str) -> float:
    """In units of 2^-24."""
    expected = torch.exp2(x.double())
    return float(((exp2(x, isa).double() - expected) / expected).abs().max()) * 2**24


STATED = {"avx512": 1.34, "avx2": 1.34, "baseline": 1.74}  # by vectors.h, with fused products and without


@each_isa
def test_error_of_exp2(isa: str) -> None:
    steps = torch.arange(2**20) / 2**20
    for low in (-126.0, -64.0, -1.0, 0.0, 125.4):
        assert relative_error(low + 2 * steps, isa) <= STATED[isa]
    assert relative_error(steps - 0.5, isa) > STATED[isa] - 0.15  # not stated too high


@pytest.mark.slow
@each_isa
def test_error_of_exp2_of_every_number(isa: str) -> None:
    """From 2^-14 on, in size; what is smaller gives 1."""
    for part in torch.arange(0x38800000, 0x42FC0001, dtype=torch.int64).split(2**24):
        x = part.to(torch.int32).view(torch.float32)
        for numbers in (-x, x[x < 127.5]):
            assert not numbers.numel() or relative_error(numbers, isa) <= STATED[isa]


@each_isa
def test_exp2_of_what_is_no_usual_number(isa: str) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, -1e38, -1e9, -200.0, -126.00001, -126.0, -0.0, 0.0, 1e-45, -1e-40, nan, 1.0, 127.0])
    y = exp2(x, isa)
    expected = torch.tensor([0, 0, 0, 0, 0, 2.0**-126, 1, 1, 1, 1, nan, 2.0, 2.0**127])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_stated_errors_are_of_all_instruction_sets() -> None:
    assert set(cpu.ISAS) <= set(STATED)
