"""Fused scaled-dot-product attention for the GPUs that others left behind, and for the current ones."""

from .backends import FastattnFallbackWarning, use_backend
from .functional import explain, scaled_dot_product_attention, varlen_attention

__all__ = [
    "FastattnFallbackWarning",
    "explain",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attention",
]
