"""The native build inside an installation: through setuptools, and with images that were built elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.native_build import (
    CPU,
    CPU_EDGES,
    EXTENSIONS,
    IMAGES,
    MODULES,
    TABLE,
    Tree,
    edges,
    needs_tools,
)

# ---- images from elsewhere ----


@pytest.fixture
def prebuilt(tree, tmp_path) -> Path:
    """The images of a tree that no longer has them."""
    (tree.package / "_kernels").rename(tmp_path / "prebuilt")
    shutil.rmtree(tree.folder / "build")
    return tmp_path / "prebuilt"


@needs_tools
def test_prebuilt_images_are_taken(tree, prebuilt):
    said = tree.build(FASTATTN_PREBUILT_KERNELS=str(prebuilt), FASTATTN_NVRTC_LIB="/nonexistent")
    assert edges(said) == {"1 C++", CPU_EDGES}
    assert tree.built == IMAGES | EXTENSIONS | {"build.json"}
    assert tree.manifest == json.loads((prebuilt / "build.json").read_text())


@needs_tools
def test_the_cpu_kernels_are_described_as_they_are_built_here(tree, prebuilt):
    manifest = json.loads((prebuilt / "build.json").read_text())
    (prebuilt / "build.json").write_text(json.dumps(manifest | {"cpu": {"reason": "no C++ compiler there"}}))
    tree.build(FASTATTN_PREBUILT_KERNELS=str(prebuilt))
    assert tree.manifest["cpu"] == CPU


@needs_tools
def test_a_part_of_the_prebuilt_images(tree, prebuilt):
    tree.build(FASTATTN_PREBUILT_KERNELS=str(prebuilt), FASTATTN_CUDA_ARCHS="60")
    assert tree.manifest["architectures"] == ["sm_60"]
    assert {name for name in tree.built if name.startswith("attention")} == {i for i in IMAGES if "sm_60" in i}
    assert set(tree.manifest["images"]) == {i for i in IMAGES if "sm_60" in i}


@needs_tools
def test_lacking_prebuilt_images_are_named(tree, prebuilt):
    (prebuilt / "attention_float16.sm_60.cubin").unlink()
    said = tree.failure(FASTATTN_PREBUILT_KERNELS=str(prebuilt))
    assert f"FASTATTN_PREBUILT_KERNELS: {prebuilt} lacks attention_float16.sm_60.cubin\n" in said
    said = tree.failure(FASTATTN_PREBUILT_KERNELS="/nonexistent", FASTATTN_CUDA_ARCHS="60")
    assert "/nonexistent lacks build.json, attention_float32.sm_60.cubin, attention_float16.sm_60.cubin" in said


@needs_tools
def test_prebuilt_images_of_other_sources_are_refused(tree, prebuilt):
    with (tree.folder / "csrc/table.h").open("a") as file:
        file.write("// changed\n")
    assert "is built from other sources than csrc" in tree.failure(FASTATTN_PREBUILT_KERNELS=str(prebuilt))


# ---- through setuptools ----


def through_setuptools(tree: Tree, hook: str, **environment: str) -> subprocess.CompletedProcess:
    return tree.run("-c", f"from setuptools import build_meta; build_meta.{hook}('dist')", **environment)


@needs_tools
def test_images_of_every_target_are_kept_whoever_builds(tree):
    assert edges(tree.build(FASTATTN_CUDA_ARCHS="60;75")) == {"3 NVRTC"}
    for hook in ("build_editable", "build_wheel"):
        result = through_setuptools(tree, hook, FASTATTN_CUDA_ARCHS="75;compute_80")
        assert result.returncode == 0, result.stderr
        assert edges(result.stdout) == set()
    tree.write("csrc/table.h", TABLE.replace("3.0f", "4.0f"))
    assert edges(tree.build(FASTATTN_CUDA_ARCHS="75")) == {"3 NVRTC"}
    assert edges(tree.build()) == {"6 NVRTC"}  # those kept are of the sources before
    assert edges(tree.build(FASTATTN_CUDA_ARCHS="60;75;compute_80")) == set()


@needs_tools
def test_an_editable_installation_builds_in_the_tree(tree):
    shutil.rmtree(tree.package / "_kernels")
    result = through_setuptools(tree, "build_editable")
    assert result.returncode == 0, result.stderr
    assert edges(result.stdout) == set()  # the tree's script did it before
    assert tree.built == IMAGES | EXTENSIONS | {"build.json"}


@needs_tools
@pytest.mark.parametrize("hook", ["build_editable", "build_wheel"])
def test_an_installation_fails_if_the_kernels_do_not_compile(tree, hook):
    tree.write("csrc/table.h", "no declaration")
    result = through_setuptools(tree, hook)
    assert result.returncode != 0
    assert "table.h(1): error" in result.stdout and "do not compile" in result.stderr


@needs_tools
def test_a_wheel_has_images_extensions_and_cuda_sources(tree):
    shutil.rmtree(tree.package / "_kernels")
    assert through_setuptools(tree, "build_wheel").returncode == 0
    (wheel,) = (tree.folder / "dist").glob("*.whl")
    names = {name.removeprefix("fastattn/") for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    sources = {"src/attention.cu", "src/table.h"}
    in_kernels = {f"_kernels/{name}" for name in IMAGES | sources | {"build.json"}}
    assert names == in_kernels | EXTENSIONS | {"__init__.py", *(f"{name}.py" for name in MODULES)}
    assert "-none-any" not in wheel.name


def test_a_wheel_without_kernels_is_for_every_machine(tmp_path):
    tree = Tree(tmp_path / "tree")
    result = through_setuptools(tree, "build_wheel", FASTATTN_BUILD_CUDA="0", CXX="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree.folder / "dist").glob("*-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    manifest = {"reason": "FASTATTN_BUILD_CUDA=0", "cpu": {"reason": "no C++ compiler (none)"}}
    assert json.loads(archive.read("fastattn/_kernels/build.json")) == manifest
    assert not [name for name in archive.namelist() if name.endswith(".so")]


# ---- the tree itself, which Python imports when it is started there ----

HOOK = "from setuptools import build_meta; build_meta.build_wheel"


@needs_tools
def test_an_installation_leaves_its_kernels_in_the_tree(tree, tmp_path):
    shutil.rmtree(tree.package / "_kernels")
    for name in EXTENSIONS:
        (tree.package / name).unlink()
    tree.run("-c", f"{HOOK}({str(tmp_path)!r})", FASTATTN_CUDA_ARCHS="60")
    assert tree.manifest["architectures"] == ["sm_60"]
    assert tree.built == {name for name in IMAGES if "sm_60" in name} | EXTENSIONS | {"build.json"}


@needs_tools
def test_an_installation_leaves_a_tree_with_more_architectures_as_it_is(tree, tmp_path):
    before = tree.built
    tree.run("-c", f"{HOOK}({str(tmp_path)!r})", FASTATTN_CUDA_ARCHS="60")
    assert (tree.built, set(tree.manifest["architectures"])) == (before, {"sm_60", "compute_80"})
    tree.run("-c", f"{HOOK}({str(tmp_path)!r})", FASTATTN_BUILD_CUDA="0")
    assert (tree.built, set(tree.manifest["architectures"])) == (before, {"sm_60", "compute_80"})
    with (tree.folder / "csrc/table.h").open("a") as table:
        table.write("// changed\n")
    tree.run("-c", f"{HOOK}({str(tmp_path)!r})", FASTATTN_CUDA_ARCHS="60")
    assert tree.manifest["architectures"] == ["sm_60"]
