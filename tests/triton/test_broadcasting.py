"""Query, key and value that broadcast: strides of 0, and gradients in the shapes of what broadcast."""

from __future__ import annotations

import pytest
import torch

from tests.support.broadcast_calls import CALLS, Call, actual, expected
from tests.support.tolerance import Condition, assert_close_to_oracle
from tests.support.triton_attention import DEVICE, on_triton

SCORES = 10.0  # no |score| of these calls is larger


@pytest.mark.parametrize("call", [call for call in CALLS if sum(call.q) < 8][::4], ids=str)
def test_broadcasting(call: Call) -> None:
    oracle, eager = (expected(call, dtype, True, DEVICE) for dtype in (torch.float64, torch.float32))
    with on_triton():
        found = actual(call, torch.float32, True, DEVICE)
    assert found.keys() == oracle.keys()
    for name, x in found.items():
        assert_close_to_oracle(name, x.detach(), oracle[name].detach(), eager[name].detach(), Condition(SCORES, {}))
