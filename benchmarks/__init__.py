"""Timings of attention: run as modules from the repository's root, results committed in benchmarks/results/<gpu>/."""
