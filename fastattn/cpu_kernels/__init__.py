"""Fused attention in C++, for every CPU."""
