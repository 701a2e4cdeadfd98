"""The package that a user installs, built from a copy of the sources, away from this tree."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "0.1.0"


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The standard output of a command; the test fails if the command does."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the files under version control, so that a build leaves nothing behind."""
    copy = tmp_path_factory.mktemp("sources") / "fastattn"
    left_behind = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "demo", "*.egg-info", "__pycache__", ".*_cache", "_kernels", "*.so"
    )
    shutil.copytree(ROOT, copy, ignore=left_behind)
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    """A wheel built by pip in isolation, without torch and on a PATH with no compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    commands = tmp_path_factory.mktemp("commands")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sources)
    run(*pip, cwd=folder, PATH=str(commands))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the installed package in it and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(file.relative_to(ROOT)) for kind in ("*.py", "*.pyi") for file in (ROOT / "fastattn").rglob(kind)}
    info = f"fastattn-{VERSION}.dist-info"
    others = {"fastattn/py.typed", "fastattn/triton_kernels/tiles.csv"}
    others |= {"fastattn/_kernels/build.json"}  # which says why there are no kernels
    assert {name for name in names if not name.startswith(info)} == modules | others
    assert f"{info}/licenses/LICENSE" in names


def test_metadata(wheel):
    content = zipfile.ZipFile(wheel).read(f"fastattn-{VERSION}.dist-info/METADATA").decode()
    metadata = email.message_from_string(content)
    assert (metadata["Name"], metadata["License-Expression"]) == ("fastattn", "MIT")
    assert metadata["Requires-Python"] == ">=3.10"
    required = {r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert required == {"torch>=2.7", "numpy"}  # Triton comes with torch where it can be used
    extras = {"all", "bench", "docs", "examples", "jit", "test", "transformers"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_installed_package_works_away_from_the_sources(installed):
    program = """
import torch, fastattn
q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
out = fastattn.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
print(fastattn.__file__, fastattn.__version__)
"""
    file, version = run(sys.executable, "-c", program, cwd=installed, PYTHONPATH=str(installed)).split()
    assert Path(file) == installed / "fastattn" / "__init__.py"
    assert version == VERSION


@pytest.fixture(scope="module")
def archive(sources, tmp_path_factory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("archive")
    run(
        sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=sources
    )
    (built,) = folder.glob("*.tar.gz")
    return built


def test_source_distribution_holds_everything(sources, archive):
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = ("fastattn", "tests", "benchmarks", "examples", "scripts")
    python = {str(file.relative_to(sources)) for folder in folders for file in (sources / folder).rglob("*.py")}
    others = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "setup.py", "requirements-dev.txt"}
    hidden = {
        ".ci/run",
        ".github/workflows/release.yml",
        ".clang-format",
        ".pre-commit-config.yaml",
        "scripts/setup.sh",
        "fastattn/py.typed",
    }
    hidden |= {"fastattn/triton_kernels/tiles.csv"}
    files = {
        str(f.relative_to(sources)) for name in ("csrc", "docs") for f in (sources / name).rglob("*") if f.is_file()
    }
    assert {"csrc/cpu/kernels.cpp", "csrc/cpu/vectors.h"} <= files
    assert python | others | hidden | files <= names
    assert not [name for name in names if "/_kernels/" in name or name.endswith(".so")]


# ---- with the CPU kernels ----


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_wheel_without_cuda_kernels_attends_with_those_of_the_cpu(archive, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheel", archive)
    run(*pip, cwd=tmp_path, FASTATTN_BUILD_CUDA="0")
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert "-none-any" not in wheel.name and wheel.stat().st_size <= 1e6
    installed = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
    program = """
import json, torch, fastattn
from fastattn import info
q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
with fastattn.use_backend("cpu"):
    out = fastattn.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
report = info.gather(info.detect())
print(json.dumps([report["cpu_kernels"], report["kernels"]["reason"]]))
"""
    said = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    cpu, no_cuda = json.loads(said)
    assert (cpu["isa"], cpu["reason"], no_cuda) == (cpu["isas"][0], None, "FASTATTN_BUILD_CUDA=0")
    assert cpu["isas"][-1] == "baseline"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_readmes_lines_work_in_the_root_of_a_clone(sources, tmp_path):
    """What is imported there is the clone's own package, which an installation leaves with the same kernels."""
    clone = tmp_path / "clone"
    shutil.copytree(sources, clone, ignore=shutil.ignore_patterns("_kernels", "*.so", "build"))
    said = subprocess.run([sys.executable, "-m", "fastattn.info"], cwd=clone, capture_output=True, text=True)
    assert said.returncode == 1 and "this fastattn is a copy of the sources" in said.stdout
    installed = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, ".")
    run(*pip, cwd=clone, FASTATTN_BUILD_CUDA="0")
    report = json.loads(run(sys.executable, "-m", "fastattn.info", "--json", cwd=clone))
    assert report["ok"] and report["cpu_kernels"]["reason"] is None and report["problems"] == []


# ---- with the CUDA kernels, too ----


@pytest.fixture(scope="module")
def native_wheel(archive, tmp_path_factory) -> Path:
    """A wheel built by pip in isolation from the source distribution, with every kernel and the launcher."""
    folder = tmp_path_factory.mktemp("native_wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, archive)
    run(*pip, cwd=folder, FASTATTN_BUILD_CUDA="1")
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_wheel_has_every_kernel(native_wheel):
    archive = zipfile.ZipFile(native_wheel)
    manifest = json.loads(archive.read("fastattn/_kernels/build.json"))
    archs = ["sm_60", "sm_70", "sm_75", "sm_80", "sm_90", "compute_60", "compute_90"]
    assert (manifest["architectures"], manifest["nvrtc"]) == (archs, "12.9")
    kernels = {
        arch: [len(i["kernels"]) for name, i in manifest["images"].items() if f".{arch}." in name] for arch in archs
    }
    table = (ROOT / "csrc" / "tiles.cuh").read_text()
    each = len(re.findall(r"^    KERNEL\(", table, re.MULTILINE)) + 1  # and the sum of bias gradients
    assert kernels == dict.fromkeys(archs, [each] * 3)
    assert 3 * each <= 60
    assert native_wheel.stat().st_size <= 20e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_wheel_with_kernels_works_away_from_the_sources(native_wheel, tmp_path):
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, native_wheel, cwd=tmp_path
    )
    program = """
import json
from fastattn import info
from fastattn.cuda_kernels import images
report = info.gather(info.detect())
image = images.image("float16", (8, 6))
assert image[:4] == b"\\x7fELF" and image[48] == 80
print(json.dumps([report["kernels"], report["launcher_problem"], report["cpu_kernels"], images.sources().digest]))
"""
    said = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    kernels, launcher_problem, cpu, sources = json.loads(said)
    assert kernels["reason"] is None and len(kernels["architectures"]) == 7
    assert launcher_problem is None and cpu["reason"] is None
    assert kernels["sources"] == sources
