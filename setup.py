"""Adds the native part to the installation; everything static is in pyproject.toml."""

import importlib
import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
build_native = importlib.import_module("build_native")


class BuildNative(Command):
    """A step of "build", after that of the Python files."""

    description = "build the CUDA kernels with their launcher, and the CPU kernels"
    user_options = []
    editable_mode = False  # set by setuptools

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        build_native.build(build_native.TREE if self.editable_mode else Path(self.build_lib).absolute() / "fastattn")

    def get_source_files(self):
        return []  # MANIFEST.in has them

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class BuildWithNative(build):
    """The usual steps and that one."""

    sub_commands = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    """Is for one platform and Python if anything is built: the CPU kernels, and the CUDA kernels only beside them."""

    def has_ext_modules(self):
        return build_native.why_no_cpu(build_native.Settings.read(os.environ)) is None


setup(distclass=NativeDistribution, cmdclass={"build": BuildWithNative, "build_native": BuildNative})
