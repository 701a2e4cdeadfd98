"""The image of the kernels that a GPU gets from an installation described by files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.images import Installation
from fastattn.cuda_kernels.sources import ALL_ARCHS, ELEMENTS, Arch, KernelSources, choose
from tests.support.installation import SOURCES

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path) -> None:
    """A machine without a compiler: the file that is named as one is none."""
    (tmp_path / "libnvrtc.so").write_text("not a library")
    monkeypatch.setenv("FASTATTN_NVRTC_LIB", str(tmp_path / "libnvrtc.so"))


# ---- the choice ----


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (60, "sm_60"),
        (61, "sm_60"),
        (62, "sm_60"),
        (70, "sm_70"),
        (72, "sm_70"),
        (75, "sm_75"),
        (80, "sm_80"),
        (86, "sm_80"),
        (87, "sm_80"),
        (89, "sm_80"),
        (90, "sm_90"),
        (100, "compute_90"),
        (120, "compute_90"),
    ],
)
def test_choice_from_everything(capability, expected):
    assert str(choose(ALL_ARCHS, capability)) == expected
    assert str(choose(reversed(ALL_ARCHS), capability)) == expected


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("sm_70 compute_60", 75, "sm_70"),  # machine code of a lower minor version before PTX
        ("sm_60 compute_60", 75, "compute_60"),  # machine code of another major version never runs
        ("sm_86 compute_60", 80, "compute_60"),  # nor that of a higher minor one
        ("compute_60 compute_75 compute_90", 80, "compute_75"),
        ("sm_90 compute_90", 80, None),
        ("sm_80", 100, None),
        ("", 80, None),
    ],
)
def test_choice_from_a_part(archs, capability, expected):
    assert choose(map(Arch.parse, archs.split()), capability) == (expected and Arch.parse(expected))


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_installed_image_is_returned(install, element):
    here = install("sm_60", "sm_80", "compute_60")
    assert here.image(element, (8, 6)) == f"attention_{element}.sm_80.cubin".encode()
    assert here.image(element, (7, 5)) == f"attention_{element}.compute_60.ptx".encode()


@pytest.mark.parametrize("capability", [(5, 2), (3, 7)])
def test_old_gpus_are_refused(install, capability):
    here = install("sm_60", "compute_60")
    with pytest.raises(images.ImageError, match=r"need compute capability >= 6.0, got {}\.{}$".format(*capability)):
        here.image("float32", capability)


def test_wrong_element(install):
    here = install("sm_60")
    with pytest.raises(ValueError, match="^element: must be one of float32, float16, bfloat16, got 'float64'$"):
        here.image("float64", (6, 0))


# ---- by the user ----


def test_the_variable_selects_the_image(install, monkeypatch):
    here = install("sm_60", "sm_90", "compute_60")
    monkeypatch.setenv("FASTATTN_CUDA_IMAGE", "compute_60")
    assert here.image("float32", (9, 0)) == b"attention_float32.compute_60.ptx"
    monkeypatch.setenv("FASTATTN_CUDA_IMAGE", "")
    assert here.image("float32", (9, 0)) == b"attention_float32.sm_90.cubin"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sm_60", "sm_60 does not run on compute capability 9.0"),
        ("compute_100", "compute_100 does not run on compute capability 9.0"),
        ("newest", "must be like 60, sm_60 or compute_60, and at least 60, got 'newest'"),
    ],
)
def test_the_variable_is_checked(install, monkeypatch, value, message):
    here = install("sm_60", "sm_90")
    monkeypatch.setenv("FASTATTN_CUDA_IMAGE", value)
    with pytest.raises(ValueError, match=f"^FASTATTN_CUDA_IMAGE: {message}$"):
        here.image("float32", (9, 0))


def test_an_image_that_is_named_but_not_installed_is_compiled(install, monkeypatch, compiler):
    here = install("sm_90", compiler=compiler)
    monkeypatch.setenv("FASTATTN_CUDA_IMAGE", "compute_75")
    assert b".target sm_75" in here.image("float32", (9, 0))
    assert compiler.compiled == [("float", "compute_75")]


# ---- installations ----


def test_changed_sources_are_an_error(install):
    here = install("sm_60")
    (here.kernels / "src" / "attention.cu").write_text("// changed")
    with pytest.raises(images.ImageError, match="csrc has changed since .*python scripts/build_native.py"):
        here.image("float32", (6, 0))


def test_sources_are_those_installed_or_those_of_the_tree(install, tmp_path):
    assert install("sm_60").sources() == SOURCES
    tree = replace(images.HERE, kernels=tmp_path / "none")
    assert tree.sources() == KernelSources.read(Path(__file__).parents[2] / "csrc")
    with pytest.raises(FileNotFoundError, match="no attention.cu in"):
        replace(tree, csrc=tmp_path / "none").sources()


def test_sources_are_what_the_kernels_include(tmp_path):
    files = {
        "attention.cu": '#include "mask.cuh"\n',
        "mask.cuh": '  # include "platform.h"  // why\n#include "mask.cuh"\n',
        "platform.h": '#include <cuda_fp16.h>\n// #include "driver.h"\n#else\n#include "simt.h"\n',
        "driver.h": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    sources = KernelSources.read(tmp_path)
    assert sources.files == {name: files[name] for name in ("attention.cu", "mask.cuh", "platform.h")}
    (tmp_path / "driver.h").write_text("// changed")
    assert KernelSources.read(tmp_path).digest == sources.digest
    (tmp_path / "mask.cuh").write_text("// changed")
    assert KernelSources.read(tmp_path).digest != sources.digest


@pytest.mark.parametrize("reason", ["FASTATTN_BUILD_CUDA=0", None])
def test_an_installation_without_kernels_says_why(install, tmp_path, reason):
    here = install(reason=reason) if reason else Installation(tmp_path / "none", tmp_path / "none")
    have = here.installed()
    assert (have.archs, have.nvrtc, have.sources) == ((), None, None)
    assert have.reason == (reason or "fastattn is not installed: this is a copy of its files")


def test_what_lacks_and_what_to_do(install, no_compiler):
    here = install("sm_80", "compute_80")
    with pytest.raises(images.ImageError) as raised:
        here.image("float32", (6, 1))
    message = str(raised.value)
    assert message.startswith(
        "no compiled CUDA kernels for compute capability 6.1: there are sm_80, compute_80; no usable"
    )
    assert nvrtc.INSTALL in message and message.endswith("or install fastattn again with FASTATTN_CUDA_ARCHS=61")


def test_what_lacks_in_an_installation_without_kernels(install, no_compiler):
    here = install(reason="no C++ compiler")
    with pytest.raises(images.ImageError, match=r"there are none \(no C\+\+ compiler\); no usable NVRTC"):
        here.image("float32", (6, 1))
