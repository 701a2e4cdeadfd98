"""How close a result must be: the only numbers of that kind in the tests.

An implementation is compared with a float64 oracle and allowed a small multiple of the error that plain torch code
makes in the same dtype ("eager"), plus a few units in the last place of the largest value:

    max|actual - oracle| <= FACTOR * max|eager - oracle| + ROUNDINGS * eps(dtype) * max|oracle|

FACTOR: a kernel adds in another order than eager and rounds the weights once more before the second product; each of
the two is an error of eager's own size, hence 2 for out and lse. A gradient goes through one such step more: 3.
ROUNDINGS: where eager happens to be exact, the rounding of the inputs of the last product (2), of its result (1) and of
the dtype's representation (1) remain.

All that follows from the scores may further differ by what the form of the computation decides:

    out:    eps(float32) * scores * max|oracle|            lse:    eps(float32) * scores
    dV:     2 * eps(float32) * scores * max|oracle|        dQ, dK, dbias:    the same + eps(dtype) * terms

scores is the largest |bias| + |scale| * sum |q| |k| of an allowed key. Whether the scale goes to q, to k, half to
each or to the product moves a score by one rounding of its terms, and a weight by as much in proportion. A backward
that stores only out and lse gets the weights back as exp(S - lse), with one such rounding more (|lse| is at most
scores + the log of the length). In dQ, dK and dbias its delta comes from an out that is rounded to the dtype, so that
dP - delta is exact only relative to the absolute terms of both: terms is the largest value of the gradient computed
with |dP| + |delta| for dP - delta, and absolute values everywhere. Where a row has one key, the gradient is 0 and the
terms are all there is.

A whole model is compared by norms, tensor for tensor: `assert_model_close`. Its oracle is the model in float64, with
eager attention; some models take the softmax in float32 even then, which is within ROUNDINGS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = {"out": 2.0, "lse": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0, "dbias": 3.0, "dsinks": 3.0}
ROUNDINGS = 4.0


@dataclass(frozen=True)
class Condition:
    """Largest values of one problem that rounding grows with."""

    scores: float
    terms: dict[str, float]  # of dq, dk, dbias


def assert_close_to_oracle(name: str, actual: Tensor, oracle: Tensor, eager: Tensor, condition: Condition) -> None:
    """The rule above for one tensor; shapes and dtypes equal eager's, infinities are where the oracle has them."""
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == eager.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(eager.shape)}"
    exact, approximate, plain = oracle.double(), actual.double(), eager.double()
    assert not approximate.isnan().any(), f"{name}: {int(approximate.isnan().sum())} NaN"
    infinite = exact.isinf()
    assert torch.equal(approximate[infinite], exact[infinite]), f"{name}: infinities differ"
    exact, approximate, plain = (x.masked_fill(infinite, 0.0) for x in (exact, approximate, plain))
    if exact.numel() == 0:
        return
    eps, largest = torch.finfo(actual.dtype).eps, exact.abs().max()
    error, eager_error = (approximate - exact).abs().max(), (plain - exact).abs().max()
    rounding_of_scores = torch.finfo(torch.float32).eps * condition.scores
    allowed = FACTOR[name] * eager_error + ROUNDINGS * eps * largest
    if name == "lse":
        allowed += rounding_of_scores
    else:
        allowed += rounding_of_scores * largest * (1 if name == "out" else 2)
        allowed += eps * condition.terms.get(name, 0.0)
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (eager's own is {eager_error:.3e})"


def assert_model_close(actual: dict[str, Tensor], oracle: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """The rule for outputs and gradients of a model: |actual - oracle| <= 3 |eager - oracle| + ROUNDINGS eps |oracle|.

    Norms are Euclidean, eps is that of the dtype the models are in. Where a sum cancels, rounding is that of its terms.
    So it is in the gradient of a key's bias, which is 0: with delta from out, dS sums up to the rounding of what was
    summed. Such a tensor counts with the norm of its layer's weight, whose gradient has the same terms.
    """
    assert actual.keys() == oracle.keys() == eager.keys()
    norms = {name: x.double().norm().item() for name, x in oracle.items()}
    cancelled = max(norms.values()) * torch.finfo(torch.float32).eps ** 0.5
    for name, exact in oracle.items():
        assert actual[name].dtype == eager[name].dtype
        eps = torch.finfo(eager[name].dtype).eps
        of_weight = norms.get(name.removesuffix("bias") + "weight", 0.0) if norms[name] < cancelled else 0.0
        error, eager_error = ((x[name].double() - exact.double()).norm().item() for x in (actual, eager))
        allowed = FACTOR["dq"] * eager_error + ROUNDINGS * eps * max(norms[name], cancelled, of_weight)
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (eager's own is {eager_error:.3e})"
