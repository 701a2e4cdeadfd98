"""Fused attention in CUDA C++, for compute capability 6.0 and newer."""
