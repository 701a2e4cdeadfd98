"""Derivatives of the CPU kernels in every way of asking, and operands that are not what lies in their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from tests.support.cases import cumulative
from tests.support.cpu_runs import assert_same_bits, on_cpu, results
from tests.support.derivatives import FIRST, FORWARD, SECOND

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.FastattnFallbackWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
MODES = FIRST | FORWARD | SECOND


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_asking(mode: str) -> None:
    x, k, v = (torch.randn(1, 2, n, 4) for n in (3, 5, 5))
    assert fastattn.explain(x, k, v).backend == "cpu"

    def call(x: Tensor) -> Tensor:
        return fastattn.scaled_dot_product_attention(x, k.to(x.dtype), v.to(x.dtype))

    with fastattn.use_backend("reference"):
        expected = MODES[mode](call, x.double())
    actual = MODES[mode](call, x)
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("mode", FIRST)
def test_first_derivatives_run_on_the_kernels(mode: str) -> None:
    x, k, v = (torch.randn(1, 2, n, 4) for n in (3, 5, 5))
    with fastattn.use_backend("cpu"):
        derivative = FIRST[mode](lambda x: fastattn.scaled_dot_product_attention(x, k, v), x)
    assert derivative.isfinite().all() and derivative.abs().max() > 0


@pytest.mark.parametrize("mode", FORWARD | SECOND)
def test_what_the_kernels_do_not_compute_is_refused(mode: str) -> None:
    x, k, v = (torch.randn(1, 2, n, 4) for n in (3, 5, 5))
    with fastattn.use_backend("cpu"), pytest.raises(NotImplementedError, match="reference"):
        MODES[mode](lambda x: fastattn.scaled_dot_product_attention(x, k, v), x)


def negated(x: Tensor) -> Tensor:
    """The same values, as memory that is still to be negated."""
    lazy = torch._neg_view(-x)
    assert lazy.is_neg()
    return lazy


@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "dout", "all"])
def test_a_negation_that_is_still_to_be_done(which: str) -> None:
    shapes = {"q": (1, 2, 5, 8), "k": (1, 2, 6, 8), "v": (1, 2, 6, 8), "bias": (5, 6), "dout": (1, 2, 5, 8)}
    plain = {name: torch.randn(shape) for name, shape in shapes.items()}
    lazy = {name: negated(x) if which in (name, "all") else x for name, x in plain.items()}
    with on_cpu():
        assert_same_bits(results(**lazy), results(**plain))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "a column": lambda edges: torch.stack([edges, edges + 50], 1)[:, 0],
    "every second": lambda edges: edges.repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("form", STRIDED)
def test_cumulative_lengths_with_a_stride(form: str) -> None:
    x, edges = torch.randn(7, 2, 8), cumulative([3, 0, 4])
    with on_cpu():
        expected = fastattn.varlen_attention(x, x, x, edges, edges, 4, 4)
        for q, k in ((STRIDED[form](edges), edges), (edges, STRIDED[form](edges))):
            assert torch.equal(fastattn.varlen_attention(x, x, x, q, k, 4, 4), expected)
