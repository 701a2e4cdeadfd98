"""The native build: what it makes, what a change makes it do again, and what it leaves when it fails."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.native_build import (
    CPU,
    CPU_EDGES,
    EXTENSIONS,
    IMAGES,
    ISAS,
    ROOT,
    Settings,
    build_native,
    edges,
    needs_tools,
)

# ---- the result ----


@needs_tools
def test_everything_is_built(finished):
    assert edges(finished.said) == {"6 NVRTC", "1 C++", CPU_EDGES}
    assert finished.built == IMAGES | EXTENSIONS | {"build.json"}
    kernels = finished.package / "_kernels"
    assert all((kernels / name).read_bytes().startswith(b"\x7fELF") for name in IMAGES if name.endswith("cubin"))
    assert all(b".target sm_80" in (kernels / name).read_bytes() for name in IMAGES if name.endswith("ptx"))
    assert len({(kernels / name).read_bytes() for name in IMAGES}) == 6  # the element types differ


@needs_tools
def test_build_json_describes_it(finished):
    manifest = finished.manifest
    assert (manifest["architectures"], manifest["cpu"]) == (["sm_60", "compute_80"], CPU)
    assert manifest["nvrtc"] == build_native.nvrtc.find().version
    options = {"sm_60": "--std=c++17 -default-device --ptxas-options=-v", "compute_80": "--std=c++17 -default-device"}
    assert manifest["options"] == options
    assert manifest["commit"] is None  # the tree is no repository
    sources = build_native.kernel_sources.KernelSources.read(finished.folder / "csrc")
    assert (set(sources.files), manifest["sources"]) == ({"attention.cu", "table.h"}, sources.digest)
    assert set(manifest["images"]) == IMAGES
    machine_code = manifest["images"]["attention_float32.sm_60.cubin"]["kernels"]
    assert set(machine_code) == {"first", "second"}
    assert machine_code["first"]["registers"] > 0 and machine_code["first"]["spill_bytes"] == 0
    assert manifest["images"]["attention_float32.compute_80.ptx"]["kernels"] == {"first": None, "second": None}


@needs_tools
def test_the_output_counts_the_kernels(finished):
    assert re.search(
        r"^  sm_60 +2 \+ 2 \+ 2 = 6 kernels, .* at most \d+ registers, 0 kernels spill$", finished.said, re.M
    )
    assert re.search(r"^  compute_80 +2 \+ 2 \+ 2 = 6 kernels, [\d.]+ MB$", finished.said, re.M)
    assert re.search(r"^fastattn: installed with 12 CUDA kernels in 6 images, .* NVRTC \d+\.\d+$", finished.said, re.M)
    assert f"\nfastattn: installed with CPU kernels for {', '.join(ISAS)}\n" in finished.said


# ---- what is done again ----


@needs_tools
def test_nothing_changed_means_no_work(tree):
    before = {name: (tree.package / "_kernels" / name).stat() for name in IMAGES}
    assert edges(tree.build()) == set()
    assert {name: (tree.package / "_kernels" / name).stat().st_mtime_ns for name in IMAGES} == {
        name: stat.st_mtime_ns for name, stat in before.items()
    }


@needs_tools
@pytest.mark.parametrize(
    ("touched", "expected"),
    [
        ("csrc/attention.cu", {"6 NVRTC"}),
        ("csrc/table.h", {"6 NVRTC"}),
        ("fastattn/cuda_kernels/nvrtc.py", {"6 NVRTC"}),
        ("fastattn/cuda_kernels/sources.py", {"6 NVRTC"}),
        ("csrc/launcher.cpp", {"1 C++"}),
        ("csrc/driver.h", {"1 C++"}),
        ("csrc/cpu/vectors.h", {f"{len(ISAS) + 1} CPU"}),
        ("fastattn/__init__.py", set()),
    ],
)
def test_a_change_rebuilds_what_depends_on_it(tree, touched, expected):
    (tree.folder / touched).touch()
    assert edges(tree.build()) == expected
    assert edges(tree.build()) == set()


@needs_tools
def test_another_compiler_compiles_everything_in_cpp(tree, tmp_path):
    compiler = tmp_path / "another c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert edges(tree.build(CXX=f"'{compiler}'")) == {"1 C++", CPU_EDGES}


def test_the_graph_names_no_place():
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    sources = build_native.kernel_sources.KernelSources({"attention.cu": "", "mask.cuh": ""})
    settings = Settings.read({"FASTATTN_CUDA_ARCHS": "all"})
    text = build_native.graph(settings, settings.archs, sources, "12.9") + build_native.cpu_graph(settings)
    assert "../../csrc/mask.cuh" in text
    # Isolated builds have their tools in another folder each time, and have to find their work done all the same.
    assert not [place for place in (str(ROOT), sys.prefix, "site-packages", " /") if place in text]
    assert text.count("build attention_") == 21 and text.count("build _launcher") == 1


@needs_tools
def test_other_architectures_replace_the_images(tree):
    assert edges(tree.build(FASTATTN_CUDA_ARCHS="75")) == {"3 NVRTC"}
    assert tree.manifest["architectures"] == ["sm_75"]
    images = {f"attention_{element}.sm_75.cubin" for element in ("float32", "float16", "bfloat16")}
    assert tree.built == images | EXTENSIONS | {"build.json"}
    assert edges(tree.build()) == set()  # the others are still in build/
    assert tree.built == IMAGES | EXTENSIONS | {"build.json"}


# ---- failure ----


@needs_tools
@pytest.mark.parametrize(
    ("file", "message"),
    [("csrc/table.h", r"table\.h\(\d+\): error"), ("csrc/driver.h", r"driver\.h:\d+:\d+: error")],
)
def test_what_does_not_compile_fails_and_leaves_the_package(tree, file, message):
    before = tree.built, tree.manifest
    with (tree.folder / file).open("a") as target:
        target.write("\nthis is no declaration\n")
    said = tree.failure()
    assert re.search(message, said) and "FASTATTN_BUILD_CUDA=0 does without them" in said
    assert (tree.built, tree.manifest) == before
