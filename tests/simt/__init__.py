"""Runs CUDA kernels without a GPU: see simt.h for how, executor.py for the launcher."""
