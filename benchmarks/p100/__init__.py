"""Predictions for the P100 without one: its machine code is executed on the CPU and replayed through a cycle model."""
