"""Fused attention in Triton, for compute capability 8.0 and newer."""
