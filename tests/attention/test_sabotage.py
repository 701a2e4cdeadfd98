"""The contract's check must turn red for every one of these broken kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends import Route
from fastattn.params import UNBOUNDED, AttentionParams, Backward, Forward
from tests.support.cases import Case, pairwise
from tests.support.contract import check
from tests.support.stand_in import stand_in

Change = Callable[[AttentionParams], AttentionParams]


def kernels(forward: Change | None = None, backward: Change | None = None) -> SimpleNamespace:
    """The reference's passes on changed parameters."""

    def attention_fwd(buffers: Forward, p: AttentionParams) -> None:
        reference.attention_fwd(buffers, forward(p) if forward else p)

    def attention_bwd(buffers: Backward, p: AttentionParams) -> None:
        reference.attention_bwd(buffers, backward(p) if backward else p)

    return SimpleNamespace(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


def after(
    forward: Callable[[Tensor, Tensor, AttentionParams], object] | None = None,
    backward: Callable[[Backward], object] | None = None,
) -> SimpleNamespace:
    """The reference's passes, followed by a change of their results."""

    def attention_fwd(buffers: Forward, p: AttentionParams) -> None:
        reference.attention_fwd(buffers, p)
        if forward:
            forward(*buffers, p)

    def attention_bwd(buffers: Backward, p: AttentionParams) -> None:
        reference.attention_bwd(buffers, p)
        if backward:
            backward(buffers)

    return SimpleNamespace(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


def neighbour(p: AttentionParams) -> AttentionParams:
    """Parameters by which every sequence's keys begin one token late."""
    if p.cu_seqlens_k is None:
        return p
    return p.replace(cu_seqlens_k=(p.cu_seqlens_k + 1).clamp(max=p.k.size(0)).to(torch.int32))


def without_dlse(buffers: Backward, p: AttentionParams) -> None:
    reference.attention_bwd(buffers._replace(dlse=None), p)


def transposed_dv(buffers: Backward) -> None:
    buffers.dv.copy_(buffers.dv.flip(-1))


def doubled_dbias(buffers: Backward) -> None:
    if buffers.dbias is not None:
        buffers.dbias.mul_(2)


NOISE = torch.Generator().manual_seed(0)


def noise(out: Tensor, lse: Tensor, p: AttentionParams) -> None:
    out.add_(torch.finfo(out.dtype).eps * torch.rand(out.shape, generator=NOISE))


SABOTAGE = {
    "mask ignored": kernels(*[lambda p: p.replace(mask=None)] * 2),
    "mask ignored in the backward": kernels(None, lambda p: p.replace(mask=None)),
    "mask of the first head for all": kernels(
        *[lambda p: p.replace(mask=p.mask if p.mask is None else p.mask[:, :1])] * 2
    ),
    "bias ignored": kernels(*[lambda p: p.replace(bias=None)] * 2),
    "bias ignored in the backward": kernels(None, lambda p: p.replace(bias=None)),
    "scale ignored": kernels(*[lambda p: p.replace(scale=1.0)] * 2),
    "scale ignored in the backward": kernels(None, lambda p: p.replace(scale=1.0)),
    "always causal in the backward": kernels(None, lambda p: p.replace(right=0)),
    "causal off by one": kernels(*[lambda p: p.replace(right=min(p.right + 1, UNBOUNDED))] * 2),
    "window off by one": kernels(*[lambda p: p.replace(left=min(p.left + 1, UNBOUNDED))] * 2),
    "bottom-right ignored": kernels(*[lambda p: p.replace(bottom_right=False)] * 2),
    "bottom-right ignored in the backward": kernels(None, lambda p: p.replace(bottom_right=False)),
    "dropout ignored": kernels(*[lambda p: p.replace(seed=None)] * 2),
    "dropout ignored in the backward": kernels(None, lambda p: p.replace(seed=None)),
    "other dropout bits in the backward": kernels(
        None, lambda p: p.replace(seed=None if p.seed is None else p.seed + 1)
    ),
    "dropout not rescaled": after(lambda out, lse, p: out.mul_(1 - p.dropout_p)),
    "a neighbour's key": kernels(*[neighbour] * 2),
    "a neighbour's key in the backward": kernels(None, neighbour),
    "lse in base 2": after(lambda out, lse, p: lse.mul_(1.4427)),
    "lse of an empty row +inf": after(lambda out, lse, p: lse.abs_()),
    "dlse ignored": SimpleNamespace(attention_fwd=reference.attention_fwd, attention_bwd=without_dlse),
    "dv in the wrong order": after(None, transposed_dv),
    "dbias doubled": after(None, doubled_dbias),
    "out wrong by a thousandth": after(lambda out, lse, p: out.mul_(1.001)),
    "the last row not written": after(lambda out, lse, p: out[..., -1:, :].fill_(torch.nan)),
    "an input overwritten": after(lambda out, lse, p: p.q.data.zero_()),
    "not deterministic": after(noise),
}
CASES = [c for c in pairwise() if c.return_lse and c.mask != "all-false"] + [
    Case(band="window", seqlens=(9, 9)),
    Case(band="causal"),
    Case(mask="random", packed=True, seqlens=(9, 9)),
]


@pytest.mark.long
@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_broken_kernels_are_caught(sabotage: str) -> None:
    caught = 0
    with stand_in("torch", route=Route.OPERATOR, passes=SABOTAGE[sabotage]), fastattn.use_backend("torch"):
        for case in CASES:
            try:
                check(case)
            except AssertionError:
                caught += 1
                break
    assert caught, "no case of the table turns red"


def test_the_same_cases_pass_unbroken() -> None:
    with fastattn.use_backend("torch"):
        for case in CASES:
            check(case)
    assert len(CASES) > 10
