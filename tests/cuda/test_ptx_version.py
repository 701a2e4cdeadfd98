"""PTX says the oldest version of its language that its text needs, so that older drivers take it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastattn.cuda_kernels import images, nvrtc
from fastattn.cuda_kernels.sources import ELEMENTS, Arch, KernelSources, image_name, with_oldest_version

PTX = b"//\n// Generated\n//\n\n.version 8.8\n.target sm_60\n.address_size 64\n"


@pytest.mark.parametrize(
    ("arch", "version"),
    [
        *(("compute_60", b"7.0"), ("compute_75", b"7.0"), ("compute_80", b"7.0"), ("compute_86", b"7.1")),
        *(("compute_90", b"7.8"), ("compute_120", b"8.8")),
    ],
)
def test_version_by_target(arch: str, version: bytes) -> None:
    assert with_oldest_version(PTX, Arch.parse(arch)) == PTX.replace(b".version 8.8", b".version " + version)


def test_ptx_without_a_version_is_refused() -> None:
    with pytest.raises(ValueError, match="compute_60"):
        with_oldest_version(b".target sm_60", Arch("compute", 60))


def test_compiled_ptx_has_it() -> None:
    try:
        compiler = nvrtc.find()
    except nvrtc.NotFound as error:
        pytest.skip(str(error))
    sources = KernelSources({"attention.cu": 'extern "C" __global__ void kernel(FASTATTN_ELEMENT* x) { *x = 1; }'})
    assert b"\n.version 7.0\n" in sources.compile(compiler, "float32", Arch("compute", 60)).image
    assert sources.compile(compiler, "float32", Arch("sm", 60)).image.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    "element", [pytest.param(e, marks=[] if e == "float16" else pytest.mark.slow) for e in ELEMENTS]
)
@pytest.mark.parametrize("arch", ["compute_60", "compute_90"])
def test_the_kernels_need_no_newer_one(element: str, arch: str, tmp_path: Path) -> None:
    """An assembler refuses whatever is newer than the version that the text says, as drivers do."""
    triton = pytest.importorskip("triton", reason="Triton brings the assembler")
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    image = images.HERE.kernels / image_name(element, Arch.parse(arch))
    if not image.is_file():
        pytest.skip(f"{image.name} is not built")
    text = tmp_path / "kernels.ptx"
    text.write_bytes(with_oldest_version(image.read_bytes(), Arch.parse(arch)))
    target = arch.replace("compute", "sm") if arch != "compute_60" else "sm_75"  # CUDA 13's knows no older one
    command = [assembler, "-O0", f"-arch={target}", text, "-o", tmp_path / "kernels.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:2000]
