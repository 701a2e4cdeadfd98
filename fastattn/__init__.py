"""Fused scaled-dot-product attention, forward and backward, for GPUs that others left behind and for current ones."""

from . import flops as flops  # whose formulas are registered by the import
from .backends import FastattnFallbackWarning, use_backend
from .functional import attention_weights, explain, scaled_dot_product_attention, varlen_attention
from .integrations.sdpa import patch_sdpa, unpatch_sdpa, use_for_sdpa
from .integrations.torch import replace_attention
from .merging import merge_attention
from .modules import MultiHeadAttention
from .nmt.config import TransformerConfig
from .nmt.transformer import Transformer

__all__ = [
    "FastattnFallbackWarning",
    "MultiHeadAttention",
    "Transformer",
    "TransformerConfig",
    "attention_weights",
    "explain",
    "merge_attention",
    "patch_sdpa",
    "replace_attention",
    "scaled_dot_product_attention",
    "unpatch_sdpa",
    "use_backend",
    "use_for_sdpa",
    "varlen_attention",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastattn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
