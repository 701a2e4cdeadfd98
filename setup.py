"""The place of the native build; everything static is in pyproject.toml.

fastattn is pure Python today. The step that compiles the CUDA kernels belongs here, because only code can choose
architectures and carry on without a compiler.
"""

from setuptools import setup

setup()
