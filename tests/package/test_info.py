"""`python -m fastattn.info` on described machines, and once on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastattn import backends, info
from fastattn.cuda_kernels import images
from fastattn.cuda_kernels.sources import ALL_ARCHS, Arch
from tests.support.stand_in import installed, stand_in

CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
P100 = info.VisibleGpu("Tesla P100-SXM2-16GB", (6, 0))
T4 = info.VisibleGpu("Tesla T4", (7, 5))
H100 = info.VisibleGpu("NVIDIA H100 80GB HBM3", (9, 0))
B200 = info.VisibleGpu("NVIDIA B200", (10, 0))
BUILT = images.Installed(ALL_ARCHS, nvrtc="12.9", sources="0123456789abcdef", commit="c0ffee" * 6, reason=None)
BUILT_FOR_80 = images.Installed((Arch("sm", 80),), nvrtc="12.9", sources="0123", commit=None, reason=None)
CPU_KERNELS = info.CpuKernels(("avx512", "avx2", "baseline"), "avx512", "OpenMP", None)
NO_CPU_KERNELS = info.CpuKernels((), None, None, "no package pybind11")
MISLED = info.CpuKernels(("avx2", "baseline"), None, None, "FASTATTN_CPU_ISA: must be one of ..., got 'avx1'")
NOT_BUILT = images.Installed((), nvrtc=None, sources=None, commit=None, reason="no C++ compiler (c++)")
FROM_CU126 = 'pip install --force-reinstall "torch>=2.7.1,<2.15" --index-url https://download.pytorch.org/whl/cu126'


def machine(*gpus: info.VisibleGpu, **changes) -> info.System:
    """A machine with the default torch of today and nothing wrong, but for the changes."""
    system = {
        "versions": {
            "python": "3.12.1",
            "fastattn": "0.1.0",
            "torch": "2.13.0+cu130",
            "triton": "3.7.1",
            "numpy": "2.4.6",
        },
        "platform": "Linux-6.1-x86_64",
        "compiler": "g++ 12.2.0",
        "driver": "580.65.06" if gpus else None,
        "driver_cuda": (13, 0) if gpus else None,
        "torch_cuda": "13.0",
        "torch_archs": CUDA_13,
        "gpus": gpus,
        "torch_sees_gpus": bool(gpus),
        "kernels": BUILT,
        "kernels_problem": None,
        "launcher_problem": None,
        "nvrtc": "12.9 (/libnvrtc.so.12)",
        "nvrtc_problem": None,
        "cache_dir": "/home/someone/.cache/fastattn",
        "cpu_kernels": CPU_KERNELS,
        "is_a_copy": False,
        "hidden": None,
    }
    return info.System(**system | changes)


@pytest.fixture
def fused():
    """The fused backends of GPUs count as installed, whatever this machine has."""
    with installed("triton", "cuda"):
        yield


@pytest.fixture
def no_fused():
    """No fused backend is installed."""
    with installed():
        yield


def chosen(device: dict) -> set[str]:
    return {choice["backend"] for choice in device["backends"].values()}


# ---- devices ----


@pytest.mark.parametrize("names", [(), ("cpu",)], ids=["torch", "cpu"])
def test_cpu_works_with_its_kernels_or_torch(names):
    with installed(*names):
        report = info.gather(machine())
    (cpu,) = report["devices"]
    assert report["ok"] and report["problems"] == []
    assert (cpu["name"], cpu["capability"], cpu["works"]) == ("CPU", None, True)
    assert chosen(cpu) == ({*names} or {"torch"})
    assert set(cpu["backends"]) == {"float32", "float16", "bfloat16"}
    assert cpu["backends"]["float32"]["why_not"]["cuda"] == ["needs a CUDA device, got cpu"]


@pytest.mark.parametrize(
    ("gpu", "archs", "backend"),
    [(P100, CUDA_12, "cuda"), (T4, CUDA_13, "cuda"), (H100, CUDA_13, "triton"), (B200, CUDA_13, "triton")],
    ids=lambda value: value.name if isinstance(value, info.VisibleGpu) else "",
)
def test_gpu_gets_its_fused_backend(fused, gpu, archs, backend):
    report = info.gather(machine(gpu, torch_archs=archs))
    (device,) = report["devices"]
    assert chosen(device) == {backend}
    assert report["ok"] and device["works"] and report["problems"] == []
    assert ("triton" in device["backends"]["float16"]["why_not"]) == (backend == "cuda")


def test_text_says_which_calls_are_left_to_torch(fused):
    lines = info.render(info.gather(machine(T4))).splitlines()
    assert "  float16   cuda; torch, which is faster, for more than 96 tokens with a gradient, or 128 without" in lines
    assert "  float32   cuda" in lines and "  bfloat16  cuda" in lines
    assert "which is faster" not in info.render(info.gather(machine(P100, H100)))


def test_gpu_with_only_torch_is_a_problem(no_fused):
    report = info.gather(machine(H100))
    (device,) = report["devices"]
    assert chosen(device) == {"torch"}
    assert not report["ok"] and not device["works"]
    (problem,) = report["problems"]
    assert problem["problem"].startswith(f"no fused backend for {H100.name}, only torch: triton is not part of")


def test_one_gpu_without_a_backend_is_enough_for_a_problem(fused):
    report = info.gather(machine(H100, P100))
    assert [device["works"] for device in report["devices"]] == [True, False]
    assert not report["ok"] and len(report["problems"]) == 1


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (CUDA_12, (6, 0), True),
        (CUDA_12, (6, 1), True),  # code for 6.0 runs on 6.1
        (CUDA_13, (6, 0), False),
        (CUDA_13, (7, 0), False),  # code for 7.5 does not run on 7.0
        (CUDA_12, (8, 9), True),
        (CUDA_12, (10, 0), False),  # code for 9.0 does not run on 10.0 ...
        ((*CUDA_12, "compute_90"), (10, 0), True),  # ... PTX for it does
        (("sm_90a",), (9, 0), True),
        ((), (8, 0), False),
    ],
)
def test_which_kernels_run_where(archs, capability, expected):
    assert info._has_kernels(archs, capability) is expected


# ---- problems and fixes ----


@pytest.mark.parametrize(
    ("system", "problem", "fixes"),
    [
        pytest.param(
            machine(P100),
            "torch 2.13.0+cu130 has no kernels for Tesla P100-SXM2-16GB (sm_60): it has sm_75, sm_80",
            [FROM_CU126, "pip install --force-reinstall torch==2.7.1"],
            id="P100-default-torch",
        ),
        pytest.param(
            machine(P100, versions={"python": "3.14.0", "torch": "2.13.0"}),
            "torch 2.13.0 has no kernels for",
            [FROM_CU126],
            id="P100-python-without-torch-2.7",
        ),
        pytest.param(
            machine(T4, driver="550.54.15", driver_cuda=(12, 4), torch_sees_gpus=False, torch_archs=()),
            "the driver 550.54.15 runs CUDA up to 12.4, but torch 2.13.0+cu130 is built with CUDA 13.0",
            [FROM_CU126],
            id="T4-old-driver",
        ),
        pytest.param(
            machine(H100, versions={"python": "3.12.1", "torch": "2.13.0+cpu"}, torch_cuda=None, torch_sees_gpus=False),
            f"torch 2.13.0+cpu is built without CUDA, so it cannot use {H100.name}",
            ["pip install --force-reinstall torch"],
            id="H100-cpu-torch",
        ),
        pytest.param(
            machine(B200, torch_archs=CUDA_12),
            "torch 2.13.0+cu130 has no kernels for NVIDIA B200 (sm_100)",
            ["pip install --force-reinstall torch"],
            id="B200-old-torch",
        ),
        pytest.param(
            machine(B200, driver="570.1", driver_cuda=(12, 8), torch_sees_gpus=False),
            "the driver 570.1 runs CUDA up to 12.8",
            ["update the NVIDIA driver to 580 or newer"],
            id="B200-old-driver",
        ),
        pytest.param(
            machine(H100, torch_sees_gpus=False),
            "torch.cuda.is_available() is False, although nvidia-smi lists",
            ['python -c "import torch; torch.cuda.init()"  # says why'],
            id="H100-unseen",
        ),
        pytest.param(
            machine(compiler=None),
            "no C++ compiler",
            ["sudo apt-get install -y g++"],
            id="no-compiler",
        ),
        pytest.param(
            machine(cpu_kernels=NO_CPU_KERNELS),
            "fastattn is installed without CPU kernels: no package pybind11",
            ["once that is mended, install fastattn again"],
            id="no-cpu-kernels",
        ),
        pytest.param(
            machine(compiler=None, cpu_kernels=NO_CPU_KERNELS),
            "no C++ compiler",
            ["sudo apt-get install -y g++"],
            id="no-compiler-for-cpu-kernels",
        ),
        pytest.param(
            machine(H100, cpu_kernels=MISLED),
            "no attention on the CPU: FASTATTN_CPU_ISA: must be one of ..., got 'avx1'",
            ["unset FASTATTN_CPU_ISA"],
            id="no-such-instruction-set",
        ),
        pytest.param(
            machine(kernels_problem="csrc has changed since"),
            "csrc has changed since",
            ["python scripts/build_native.py"],
            id="changed-kernels",
        ),
    ],
)
def test_problem_and_fix(fused, system, problem, fixes):
    report = info.gather(system)
    (found,) = report["problems"]
    assert found["problem"].startswith(problem)
    assert found["fixes"] == fixes
    assert report["ok"] is (not system.gpus or system.cpu_kernels is MISLED)
    text = info.render(report)
    assert all(words in text for words in (found["problem"], *fixes))


# ---- the CUDA kernels ----


@pytest.mark.parametrize(
    ("gpu", "changes", "image"),
    [
        (P100, {}, "sm_60"),
        (H100, {}, "sm_90"),
        (B200, {}, "compute_90, which the driver compiles"),
        (P100, {"kernels": BUILT_FOR_80}, "one that NVRTC compiles at the first call"),
        (P100, {"kernels": BUILT_FOR_80, "nvrtc": None, "nvrtc_problem": "no usable NVRTC"}, "none: no usable NVRTC"),
        (info.VisibleGpu("GTX 980", (5, 2)), {}, "none: the CUDA kernels need compute capability >= 6.0, got 5.2"),
    ],
)
def test_image_of_a_gpu(monkeypatch, fused, gpu, changes, image):
    monkeypatch.delenv("FASTATTN_CUDA_IMAGE", raising=False)
    report = info.gather(machine(gpu, torch_archs=(*CUDA_12, "compute_50"), **changes))
    assert report["devices"][0]["image"] == image
    assert f"\n  image     {image}\n" in info.render(report)


def test_an_image_by_the_user_is_shown(monkeypatch, fused):
    monkeypatch.setenv("FASTATTN_CUDA_IMAGE", "compute_60")
    report = info.gather(machine(H100, P100, torch_archs=CUDA_12))
    assert [device["image"] for device in report["devices"]] == ["compute_60, which the driver compiles"] * 2
    monkeypatch.setenv("FASTATTN_CUDA_IMAGE", "sm_61")
    report = info.gather(machine(H100, info.VisibleGpu("GTX 1080", (6, 1)), torch_archs=CUDA_12))
    assert [device["image"] for device in report["devices"]] == [
        "none: FASTATTN_CUDA_IMAGE: sm_61 does not run on compute capability 9.0",
        "sm_61 that NVRTC compiles at the first call",
    ]


def test_text_says_what_was_built():
    text = info.render(info.gather(machine()))
    archs = "sm_60 sm_70 sm_75 sm_80 sm_90 compute_60 compute_90"
    assert f"kernels   {archs}, by NVRTC 12.9 from sources 0123456789abcdef, commit c0ffeec0ff\n" in text
    assert "launcher  ready\nNVRTC     12.9 (/libnvrtc.so.12)\ncache     /home/someone/.cache/fastattn\n" in text
    assert "image" not in text  # of the CPU


def test_a_gpu_without_cuda_kernels_is_a_problem(fused):
    report = info.gather(machine(H100, kernels=NOT_BUILT))
    (problem,) = report["problems"]
    assert problem["problem"] == "fastattn is installed without CUDA kernels: no C++ compiler (c++)"
    assert report["ok"]  # by Triton


def test_text_says_why_nothing_was_built():
    without = machine(kernels=NOT_BUILT, launcher_problem="No module named 'x'", nvrtc=None, nvrtc_problem="no NVRTC")
    report = info.gather(without)
    text = info.render(report)
    assert (
        "kernels   none: no C++ compiler (c++)\nlauncher  none: No module named 'x'\nNVRTC     none: no NVRTC\n" in text
    )
    assert report["ok"] and report["problems"] == []  # nothing that a CPU needs
    assert report["kernels"]["architectures"] == [] and report["kernels"]["reason"] == "no C++ compiler (c++)"


# ---- the CPU kernels ----


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        (CPU_KERNELS, "avx512 of avx512 avx2 baseline, threads of OpenMP"),
        (info.CpuKernels(("baseline",), "baseline", "pool", None), "baseline of baseline, threads of a pool"),
        (NO_CPU_KERNELS, "none: no package pybind11"),
        (MISLED, f"none: {MISLED.reason}"),
    ],
    ids=["OpenMP", "pool", "not built", "misled"],
)
def test_text_says_which_cpu_kernels_run(kernels, words):
    report = info.gather(machine(cpu_kernels=kernels))
    assert f"\ncpu       {words}\n" in info.render(report)
    assert json.loads(json.dumps(report["cpu_kernels"])) == {
        "isas": list(kernels.isas),
        "isa": kernels.isa,
        "threads": kernels.threads,
        "reason": kernels.reason,
    }
    assert report["ok"] is (kernels is not MISLED)


def test_other_systems_have_no_cpu_kernels_to_miss():
    assert info.gather(machine(cpu_kernels=NO_CPU_KERNELS, platform="macOS-14-arm64"))["problems"] == []


@pytest.mark.long
def test_a_wrong_instruction_set_is_said_in_words():
    pytest.importorskip("fastattn._cpu", reason="fastattn._cpu is not built: building it takes a C++ compiler")
    environment = os.environ | {"FASTATTN_CPU_ISA": "avx1"}
    command = [sys.executable, "-m", "fastattn.info"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "not cpu: it cannot start: FASTATTN_CPU_ISA: must be one of those that this CPU has, " in result.stdout
    assert "no attention on the CPU: FASTATTN_CPU_ISA: " in result.stdout
    assert (result.returncode, result.stderr) == (1 if not torch.cuda.is_available() else 0, "")


# ---- words and exit status ----


def test_text_names_versions_devices_and_refusals(fused):
    text = info.render(info.gather(machine(P100, H100, torch_archs=CUDA_12)))
    assert "torch     2.13.0+cu130" in text
    assert f"{P100.name}, compute capability 6.0\n  float32   cuda\n" in text
    assert "  not triton: it needs compute capability >= 8.0, got 6.0\n" in text
    assert f"{H100.name}, compute capability 9.0\n  float32   triton\n" in text
    assert text.endswith("Problems / fix\n  none")


@pytest.mark.parametrize("working", [True, False])
def test_exit_status(capsys, fused, working):
    described = machine(P100, torch_archs=CUDA_12 if working else CUDA_13)
    assert info.main(["--json"], described) == (0 if working else 1)
    assert json.loads(capsys.readouterr().out)["ok"] is working


def test_a_refusal_of_some_dtypes_names_them(fused):
    with stand_in("cuda", dtypes=(torch.float16,)):
        text = info.render(info.gather(machine(T4)))
    assert "  float16   cuda" in text
    assert "  not cuda: it takes float16, got float32 (float32)" in text


def test_support_table(capsys):
    assert info.main(["--support"]) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == 5
    assert [row.split("`")[1] for row in rows] == [backend.name for backend in backends.BACKENDS]
    assert "| CUDA, compute capability >= 8.0 | float32, float16, bfloat16 | 1 ... 256 |" in rows[0]
    assert rows[2] == "| `cpu` | CPU | float32, float16, bfloat16 | 1 ... 256 |"
    assert rows[-1] == "| `reference` (on request) | any | float32, float16, bfloat16, float64 | any |"


@pytest.mark.long
def test_command_line():
    command = [sys.executable, "-m", "fastattn.info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    assert len(report["devices"]) == max(1, torch.cuda.device_count())
    assert result.stderr == ""


# ---- copies of the sources ----


def test_a_copy_without_kernels_is_a_problem_with_a_way_out():
    report = info.gather(machine(is_a_copy=True, cpu_kernels=NO_CPU_KERNELS))
    assert not report["ok"]
    assert report["problems"][0]["problem"].startswith("this fastattn is a copy of the sources")
    assert report["problems"][0]["fixes"] == ["pip install ."]


def test_a_copy_that_hides_an_installation_names_it():
    report = info.gather(machine(is_a_copy=True, hidden="/somewhere/site-packages/fastattn"))
    text = report["problems"][0]["problem"]
    assert text.endswith("it hides the one installed in /somewhere/site-packages/fastattn") and not report["ok"]
    assert "start Python in another folder" in report["problems"][0]["fixes"]


def test_an_installation_that_another_one_is_not_in_front_of_is_no_problem():
    assert info.gather(machine(hidden="/somewhere/site-packages/fastattn"))["ok"]


def test_text_says_which_gpus_are_served_and_by_what():
    def served(**changes):
        lines = info.render(info.gather(machine(**changes))).splitlines()
        return next(line.removeprefix("serves").strip() for line in lines if line.startswith("serves"))

    only_60 = images.Installed((Arch("sm", 60),), nvrtc="12.9", sources="0123", commit=None, reason=None)
    assert served(kernels=only_60) == (
        "GPUs of compute capability 6.x from 6.0 on by machine code; any other from 6.0 on by NVRTC at the first call"
    )
    assert served(kernels=only_60, nvrtc=None).endswith("6.x from 6.0 on by machine code")
    assert "from 6.0 on by PTX, which the driver compiles" in served(kernels=BUILT)
    assert served(kernels=NOT_BUILT, nvrtc=None).startswith("no GPU")
