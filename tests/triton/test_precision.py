"""float32 products as tensor cores compute them: three of TF32 numbers are within the tolerance of float32, one is not.

Triton's "tf32x3" writes a float32 number as a TF32 number (11 significant bits, rounded to nearest, ties away from
zero) and another of what is left, and multiplies small by big, big by small and big by big. The products themselves are
exact; what is lost is small by small (2^-22 of the product), the last bits of small, and what the sum loses. How a
tensor core sums is not documented but measured (Fasi et al. 2021): it aligns a few terms to the largest, cuts what does
not fit and adds. Here it cuts to the 24 bits of a float32, without the extra bits that the measured ones keep, after
every 4 products: the real error should be no larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from tests.support.cases import Case, pairwise
from tests.support.triton_attention import DEVICE, check_once, on_triton

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has tensor cores: test_triton.py's float32 cases use them"),
]
TERMS = 4  # products that are added at a time


def to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest TF32 number, ties away from zero: 13 of float32's 24 bits are dropped."""
    return ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """x to a multiple of the last of 24 bits of the largest, towards zero."""
    unit = np.exp2(np.frexp(largest)[1] - 24.0)
    return np.trunc(x / unit) * unit


def tensor_core(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums + a @ b, of matrices of TF32 numbers."""
    a, b, sums = a.astype(np.float64), b.astype(np.float64), sums.astype(np.float64)
    for k in range(0, a.shape[1], TERMS):
        terms = [sums, *(a[:, i, None] * b[None, i] for i in range(k, k + TERMS))]
        largest = np.max(np.abs(terms), axis=0)
        total = np.sum([cut(term, largest) for term in terms], axis=0)
        sums = cut(total, np.abs(total))
    return sums.astype(np.float32)


def tf32(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """One product: what a user who allows TF32 gets."""
    return tensor_core(to_tf32(a), to_tf32(b), sums)


def tf32x3(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Three products."""
    big_a, big_b = to_tf32(a), to_tf32(b)
    small_a, small_b = to_tf32(a - big_a), to_tf32(b - big_b)
    sums = tensor_core(big_a, small_b, tensor_core(small_a, big_b, sums))
    return tensor_core(big_a, big_b, sums)


@contextmanager
def products(multiply: Callable[..., np.ndarray]) -> Iterator[list[str]]:
    """Every tl.dot inside is this; the precisions that the kernels asked for."""
    asked = []

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        assert a.data.dtype == b.data.dtype == np.float32
        asked.append(str(input_precision))
        return interpreter.TensorHandle(multiply(a.data, b.data, d.data), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield asked


FLOAT32 = [replace(case, batch=2) for case in pairwise() if case.dtype == torch.float32 and min(case.seqlens) > 1]
LARGE_HEADS = [Case(dims=(n, n), seqlens=(33, 40), batch=1, **more) for n in (64, 256) for more in ({}, {"scale": 0.3})]


@pytest.mark.parametrize(
    ("case", "in_one"),
    [
        pytest.param(case, in_one, id=f"{case}-{in_one}", marks=() if in_one == bool(n % 2) else pytest.mark.slow)
        for n, case in enumerate(FLOAT32[::4] + LARGE_HEADS)
        for in_one in (False, True)
    ],
)
def test_three_tf32_products_are_within_the_tolerance_of_float32(case: Case, in_one: bool, poisoned: None) -> None:
    with on_triton(in_one=in_one), products(tf32x3) as asked:
        check_once(case)
    assert set(asked) == {"INPUT_PRECISION.TF32x3"}


def test_one_tf32_product_is_not() -> None:
    with on_triton(), products(tf32), pytest.raises(AssertionError, match="exceeds"):
        check_once(Case(dims=(64, 64), seqlens=(64, 65)))


def test_the_emulation() -> None:
    ones = np.float32([1, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11])
    assert to_tf32(ones).tolist() == [1, 1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-10]
    small = np.full((1, 4), 2**-13, np.float32)
    assert tensor_core(small, small.T, np.ones((1, 1), np.float32)) == 1.0  # each term is cut, not their sum
    a, b = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
    exact, zeros = a.astype(np.float64) @ b.astype(np.float64), np.zeros((64, 64), np.float32)
    errors = [float(np.abs(multiply(a, b, zeros) - exact).max()) for multiply in (tf32, tf32x3)]
    assert errors[0] > 1e-3 and errors[1] < 2e-5
