"""A ComfyUI node that computes a model's attention with fastattn: copy this file into ComfyUI/custom_nodes.

fastattn has to be installed where ComfyUI runs. The node "fastattn attention" stands between the model loader and the
sampler; it needs a ComfyUI that asks transformer_options for "optimized_attention_override".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastattn

OVERRIDE = "optimized_attention_override"
# What else ComfyUI passes says nothing of the result: how exact it must be at least, and to its own wrapper.
IGNORED = {"attn_precision", "low_precision_attention", "transformer_options", "_inside_attn_wrapper"}


class FastattnAttention:
    """The node: a model in, the same model with fastattn out."""

    CATEGORY = "model_patches/attention"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "enabled": ("BOOLEAN", {"default": True})}}

    def patch(self, model: Any, enabled: bool) -> tuple[Any]:
        """A copy of the model, or the model itself if not enabled.

        Raises:
            ValueError: another node has replaced the attention already.
        """
        if not enabled:
            return (model,)
        model = model.clone()
        options = dict(model.model_options.get("transformer_options", {}))
        if options.get(OVERRIDE) not in (None, attention):
            raise ValueError(f"model: its attention must be ComfyUI's own, got {options[OVERRIDE]!r}; bypass that node")
        model.model_options["transformer_options"] = options | {OVERRIDE: attention}
        return (model,)


def attention(
    original: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    *args: Any,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Tensor:
    """One attention as ComfyUI asks for it; what this does not know goes to ComfyUI's own function.

    Args:
        original: that function.
        q, k, v: (batch, length, heads * head_dim), or (batch, heads, length, head_dim) with skip_reshape.
        heads: of q.
        mask: bool (True may attend) or added to the scores, with or without dimensions for batch and heads.
    """
    if args or kwargs.keys() - IGNORED:
        known: dict[str, Any] = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        known |= {"scale": scale} if scale is not None else {}
        known |= {"enable_gqa": True} if enable_gqa else {}
        return original(q, k, v, heads, mask, *args, **known, **kwargs)
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        kv_heads = k.shape[-1] // head_dim
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 3 else mask
    out = fastattn.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    assert isinstance(out, Tensor)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


NODE_CLASS_MAPPINGS = {"FastattnAttention": FastattnAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"FastattnAttention": "fastattn attention"}
