"""The image of the kernels that a GPU gets: from an installation described by files, or compiled at run time."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.images import Installation
from fastattn.cuda_kernels.sources import DEFAULT_ARCHS, ELEMENTS, Arch, KernelSources, choose, image_name, options

KERNEL = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
extern "C" __global__ void f(float* x) { *x = sizeof(FASTATTN_ELEMENT); }
"""
SOURCES = KernelSources({"attention.cu": KERNEL})


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """An environment without variables of the user's, and a cache of the test's own."""
    for name in ("FASTATTN_CUDA_IMAGE", "FASTATTN_NVRTC_LIB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def install(tmp_path) -> Callable[..., Installation]:
    """A function that describes an installation: its architectures, or the reason for none. Images hold their names."""
    kernels = tmp_path / "_kernels"

    def describe(*archs: str, reason: str | None = None, compiler: nvrtc.Nvrtc | None = None) -> Installation:
        (kernels / "src").mkdir(parents=True)
        for name, text in SOURCES.files.items():
            (kernels / "src" / name).write_text(text)
        for arch in map(Arch.parse, archs):
            for element in ELEMENTS:
                (kernels / image_name(element, arch)).write_text(image_name(element, arch))
        manifest = {"architectures": archs, "nvrtc": "12.9", "sources": SOURCES.digest, "commit": None}
        (kernels / "build.json").write_text(json.dumps({"reason": reason} if reason else manifest))
        here = Installation(kernels, csrc=tmp_path / "none")
        return here if compiler is None else replace(here, find=only(compiler))

    return describe


class Recorder(nvrtc.Nvrtc):
    """A compiler that notes what it compiles, in order: element type and architecture."""

    def __init__(self, library: Path, include: Path):
        super().__init__(library, include)
        self.compiled: list[tuple[str, str]] = []

    def compile(self, source: str, arch: str, **how) -> nvrtc.Compiled:
        self.compiled.append((how["defines"]["FASTATTN_ELEMENT"], arch))
        return super().compile(source, arch, **how)


def only(compiler: nvrtc.Nvrtc) -> Callable[[int | None], nvrtc.Nvrtc]:
    """The search for a compiler on a machine that has this one alone."""

    def find(capability: int | None) -> nvrtc.Nvrtc:
        if capability is None or capability in compiler.architectures:
            return compiler
        raise nvrtc.NotFound(f"{compiler.library} does not compile for {capability}")

    return find


@pytest.fixture
def compiler() -> Recorder:
    try:
        found = nvrtc.find(60)
    except nvrtc.NotFound as error:
        pytest.skip(str(error))
    return Recorder(found.library, found.include)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path) -> None:
    """A machine without a compiler: the file that is named as one is none."""
    (tmp_path / "libnvrtc.so").write_text("not a library")
    monkeypatch.setenv("FASTATTN_NVRTC_LIB", str(tmp_path / "libnvrtc.so"))


def architecture(image: bytes) -> int:
    """The compute capability that machine code is compiled for."""
    assert image.startswith(b"\x7fELF")
    return int.from_bytes(image[48:52], "little") & 0xFF


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
    assert str(choose(DEFAULT_ARCHS, capability)) == expected
    assert str(choose(reversed(DEFAULT_ARCHS), capability)) == expected


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


# ---- compiled at run time ----


def test_compiled_for_the_gpu_itself_and_kept(install, compiler, tmp_path):
    here = install("sm_80", compiler=compiler)
    first = here.image("float16", (6, 1))
    assert architecture(first) == 61 and compiler.compiled == [("__half", "sm_61")]
    assert here.image("float16", (6, 1)) == first
    assert len(compiler.compiled) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.endswith(".attention_float16.sm_61.cubin")
    assert here.image("float32", (6, 1)) != first  # another element type is another image
    assert len(compiler.compiled) == 2


def test_ptx_for_a_gpu_that_nvrtc_does_not_know(install, compiler):
    class Known(nvrtc.Nvrtc):
        architectures = tuple(number for number in compiler.architectures if number <= 90)

    class KnownWithout70(nvrtc.Nvrtc):
        architectures = (75, 80, 90)

    here = install("sm_60", compiler=Known(compiler.library, compiler.include))
    assert b".target sm_90" in here.image("float32", (12, 0))
    here = replace(here, find=only(KnownWithout70(compiler.library, compiler.include)))
    with pytest.raises(
        images.ImageError, match=r"no compiled .* capability 7.0: there are sm_60; NVRTC .* nothing that"
    ):
        here.image("float32", (7, 0))


@pytest.mark.parametrize("damage", ["", "shorter", "changed", "something else"])
def test_a_damaged_file_is_replaced(install, compiler, tmp_path, damage):
    here = install("sm_80", compiler=compiler)
    image = here.image("float32", (6, 0))
    (kept,) = (tmp_path / "cache").iterdir()
    stored = kept.read_bytes()
    changed = {"": b"", "shorter": stored[:-1], "changed": stored[:-1] + b"\xff", "something else": b"x" * 100}
    kept.write_bytes(changed[damage])
    assert here.image("float32", (6, 0)) == image and len(compiler.compiled) == 2
    assert kept.read_bytes() == stored
    assert here.image("float32", (6, 0)) == image and len(compiler.compiled) == 2


def test_without_a_writable_cache_it_is_compiled_each_time(install, monkeypatch, compiler, tmp_path):
    here = install("sm_80", compiler=compiler)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert here.image("float32", (6, 0)) == here.image("float32", (6, 0))
    assert len(compiler.compiled) == 2


def test_what_is_kept_belongs_to_sources_and_compiler(install, compiler):
    here = install("sm_80", compiler=compiler)
    here.image("float32", (6, 0))
    (here.kernels / "src" / "attention.cu").write_text("// changed\n")
    here.image("float32", (6, 0))
    assert len(compiler.compiled) == 2
    other = Recorder(compiler.library, compiler.include)
    other.version = "12.99"
    replace(here, find=only(other)).image("float32", (6, 0))
    assert len(other.compiled) == 1
    (here.kernels / "src" / "attention.cu").write_text(KERNEL)
    here.image("float32", (6, 0))
    assert len(compiler.compiled) == 2


def test_the_name_of_what_is_kept(install, compiler, tmp_path):
    arch = Arch("sm", 60)
    all_of_it = (SOURCES.digest, compiler.version, options(arch), "float32", arch)
    install("sm_80", compiler=compiler).image("float32", (6, 0))
    assert list((tmp_path / "cache").iterdir()) == [images.cached_file(*all_of_it)]
    others = ("other", "12.99", ("--std=c++17", "-default-device"), "float16", Arch("sm", 61))
    changed = [(*all_of_it[:i], other, *all_of_it[i + 1 :]) for i, other in enumerate(others)]
    hashes = {images.cached_file(*each).name.partition(".")[0] for each in (all_of_it, *changed)}
    assert len(hashes) == 6


def _image_in_a_process(here: Installation, start) -> bytes:
    start.wait()
    return here.image("float32", (6, 0))


def test_processes_may_compile_the_same_image_at_once(install, compiler, tmp_path):
    here = install("sm_80")
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(4) as pool:
        arguments = [(here, manager.Barrier(4))] * 4
        results = pool.starmap(_image_in_a_process, arguments, chunksize=1)
    assert len(set(results)) == 1 and architecture(results[0]) == 60
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and nothing half written


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"FASTATTN_CACHE_DIR": "/named"}, "/named"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/fastattn"),
        ({}, "/home/someone/.cache/fastattn"),
    ],
)
def test_cache_folder(monkeypatch, environment, folder):
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    for name, value in ({"HOME": "/home/someone"} | environment).items():
        monkeypatch.setenv(name, value)
    assert os.fspath(images.cache_dir()) == folder
