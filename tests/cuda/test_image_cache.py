"""Images that are compiled at run time, and kept."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace

import pytest

from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.images import Installation
from fastattn.cuda_kernels.sources import Arch, options
from tests.support.installation import KERNEL, SOURCES, Recorder, only

pytestmark = pytest.mark.usefixtures("own_cache")


def architecture(image: bytes) -> int:
    """The compute capability that machine code is compiled for."""
    assert image.startswith(b"\x7fELF")
    return int.from_bytes(image[48:52], "little") & 0xFF


def test_compiled_for_the_gpu_itself_and_kept(install, compiler, tmp_path, capsys):
    here = install("sm_80", compiler=compiler)
    first = here.image("float16", (6, 1))
    assert architecture(first) == 61 and compiler.compiled == [("__half", "sm_61")]
    said = f"compiles the float16 kernels for sm_61, once; they are kept in {tmp_path / 'cache'}"
    assert said in capsys.readouterr().err
    assert here.image("float16", (6, 1)) == first
    assert len(compiler.compiled) == 1 and capsys.readouterr().err == ""
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
