"""The ComfyUI node, with a model as ComfyUI hands it on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import comfyui_fastattn as node


class Model:
    """A stub of ComfyUI's ModelPatcher."""

    def __init__(self, **options: Any) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": options}

    def clone(self) -> Model:
        return copy.deepcopy(self)


def patched(model: Model, enabled: bool = True) -> Model:
    name = node.FastattnAttention.FUNCTION
    (result,) = getattr(node.NODE_CLASS_MAPPINGS["FastattnAttention"](), name)(model, enabled)
    return result


def never(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("ComfyUI's own function is called")


def test_the_model_goes_on_with_fastattn_and_the_one_before_as_it_was() -> None:
    model = Model(patches={})
    after = patched(patched(model)).model_options["transformer_options"]
    assert after == {"patches": {}, node.OVERRIDE: node.attention}
    assert model.model_options == {"transformer_options": {"patches": {}}}
    assert patched(model, enabled=False) is model
    with pytest.raises(ValueError, match=r"^model: its attention must be ComfyUI's own, got .*never"):
        patched(Model(**{node.OVERRIDE: never}))


@pytest.mark.parametrize("mask_dims", [None, 2, 3, 4])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("stays_split", [False, True])
def test_calls_are_torchs(mask_dims: int | None, is_split: bool, stays_split: bool) -> None:
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((4, 5), (2, 7), (2, 7)))
    mask = None if mask_dims is None else torch.randn(2, 1, 5, 7)
    if mask is not None:
        mask = {2: mask[0, 0], 3: mask[:, 0], 4: mask}[mask_dims or 0]
    wide = None if mask is None else mask[:, None] if mask.ndim == 3 else mask
    expected = F.scaled_dot_product_attention(q, k, v, wide, scale=0.3, enable_gqa=True)
    if not stays_split:
        expected = expected.transpose(1, 2).flatten(2)
    if not is_split:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    options = {"skip_reshape": is_split, "skip_output_reshape": stays_split, "attn_precision": torch.float32}
    out = node.attention(never, q, k, v, 4, mask=mask, scale=0.3, enable_gqa=True, **options)
    torch.testing.assert_close(out, expected)


def test_what_is_unknown_goes_to_comfyui_with_all_it_came_with() -> None:
    seen: dict[str, Any] = {}

    def original(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **kwargs: Any) -> Tensor:
        seen.update(kwargs, heads=heads, mask=mask)
        return q

    x = torch.randn(1, 3, 8)
    assert node.attention(original, x, x, x, 2, None, is_new=1, scale=0.5, attn_precision=None) is x
    assert seen == {
        **{"is_new": 1, "scale": 0.5, "attn_precision": None, "heads": 2, "mask": None},
        **{"skip_reshape": False, "skip_output_reshape": False},
    }
