"""A kernel launch with the parameters of one small problem, for the tests of the launcher."""

from __future__ import annotations

import torch

from fastattn.params import UNBOUNDED, AttentionParams
from tests.support.attention_struct import Struct, as_dict

KERNEL = "attention_fwd_d64_64x64"


def image(element: str, capability: tuple[int, int]) -> bytes:
    return f"image of {element} for {capability}".encode()


def problem(scale: float = 0.25) -> AttentionParams:
    q, k, v = torch.randn(3, 2, 4, 5, 64).unbind()
    return AttentionParams(q, k, v, None, None, None, None, None, None, 5, 5, scale, 0.0, 0.0, UNBOUNDED, 0, False)


P = problem()
BUFFERS = (torch.empty(2, 4, 5, 64), torch.empty(2, 4, 5), *[None] * 9)


def launch(launcher, kernel=KERNEL, element="float32", device=0, stream=0, grid=(3, 1, 1), p=P):
    launcher.launch(kernel, element, device, stream, grid, p, BUFFERS)


def fields(params: bytes) -> str:
    """The bytes without the padding, whose value means nothing."""
    return str(as_dict(Struct.from_buffer_copy(params)))
