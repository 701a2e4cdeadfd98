"""The CPU executor of CUDA kernels: right numbers, silence about correct kernels, a report for every kind of defect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simt import build as build_module
from tests.simt import selftest
from tests.simt.build import BuildError, build
from tests.simt.executor import SCHEDULES, SimtError, load
from tests.simt.selftest import DEFECTS, KERNELS

BUILDS = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
STRUCTURAL = {"exited-thread", "divergent-barrier", "missing-lane", "deadlock"}


# ---- correct kernels


@BUILDS
@pytest.mark.parametrize("run", selftest.CORRECT)
def test_correct_kernel_in_every_schedule(run, checked):
    selftest.check_correct(load(KERNELS / "correct.cu", checked=checked), run, (*SCHEDULES, 2))


def test_shuffles_votes_and_bits():
    selftest.check_lanes(load(KERNELS / "builtins.cu", checked=True))


def test_float_functions():
    selftest.check_float_functions(load(KERNELS / "builtins.cu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types_round_like_torch(dtype):
    selftest.check_rounding(load(KERNELS / "builtins.cu"), dtype)


# ---- broken kernels


def broken(defect: str, checked: bool):
    return load(KERNELS / "broken.cu", checked=checked, defines=(f"DEFECT={defect}",))


@BUILDS
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_kernel_without_defect(checked, schedule):
    selftest.check_without_defect(broken("none", checked), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_reported(defect, schedule):
    with pytest.raises(SimtError) as caught:
        selftest.run_broken(broken(defect, checked=True), schedule)
    selftest.check_reports(caught.value, defect)


@pytest.mark.parametrize("defect", [name for name, (kind, *_) in DEFECTS.items() if kind in STRUCTURAL])
def test_fast_build_reports_threads_that_cannot_meet(defect):
    with pytest.raises(SimtError) as caught:
        selftest.run_broken(broken(defect, checked=False), "in-order")
    assert caught.value.kinds == {DEFECTS[defect][0]}


def test_fast_build_poisons_shared_memory():
    y, _ = selftest.run_broken(broken("uninitialised_shared", checked=False), "in-order")
    assert y.isnan().sum() == 8 - 4  # thread 7's number goes into four sums of each block; 28 of block 1 are not stored


def test_launch_after_a_defect_is_clean():
    with pytest.raises(SimtError):
        selftest.run_broken(broken("lane_elsewhere", checked=True), "in-order")
    selftest.check_without_defect(broken("none", checked=True), "in-order")


# ---- building and launching


def test_build_is_kept_until_a_header_changes(tmp_path):
    def made() -> set[tuple[str, int]]:
        files = (file for file in cache.iterdir() if file.suffix in (".o", ".so"))
        return {(file.name, file.stat().st_mtime_ns) for file in files}

    cache = tmp_path / "cache"
    header, source = tmp_path / "size.h", tmp_path / "kernel.cu"
    header.write_text("constexpr int kSize = 1;\n")
    source.write_text('#include "platform.h"\n#include "size.h"\nint size() { return kSize; }\n')
    first = build(source, cache=cache)
    before = made()
    assert len(before) == 6 and build(source, cache=cache) == first and made() == before
    header.write_text("constexpr int kSize = 2;\n")
    assert build(source, cache=cache) != first and len(made() - before) == 2 and made() > before
    assert build(source, defines=("OTHER",), cache=cache) not in (first, build(source, cache=cache))


def test_builds_at_the_same_time_give_one_library(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text('#include "platform.h"\nint unused_size() { return 1; }\n')
    program = f"from tests.simt.build import build; print(build({str(source)!r}))"
    command = [sys.executable, "-c", program]
    running = [
        subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {process.communicate(timeout=100)[0].strip() for process in running}
    assert len(paths) == 1 and Path(paths.pop()).exists()


def test_build_errors_say_what_is_wrong(tmp_path, monkeypatch):
    source = tmp_path / "kernel.cu"
    source.write_text('#include "platform.h"\n__global__ void kernel() { undeclared(); }\n')
    with pytest.raises(BuildError, match=r"kernel\.cu:2:\d+: error: .undeclared. was not declared"):
        build(source)
    monkeypatch.setenv("CXX", "no-such-compiler")
    build_module.compiler.cache_clear()
    with pytest.raises(BuildError, match="no-such-compiler: not found"):
        build(source)
    build_module.compiler.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "nothing"}, "kernel: .* exports no kernel 'nothing'"),
        ({"params": b"1234"}, "params: lanes takes a struct of 8 bytes, got 4"),
        ({"block": (2048,)}, "block: 1 to 1024 threads"),
        ({"grid": (1, 65536)}, "grid: 1 to 65535 blocks"),
        ({"dynamic_smem": 232449}, "dynamic_smem: 0 to 232448 bytes, got 232449"),
        ({"schedule": "sideways"}, "schedule: .*'sideways'"),
    ],
)
def test_bad_launch(change, message):
    arguments = {"kernel": "lanes", "grid": (1,), "block": (32,), "params": bytes(8)} | change
    with pytest.raises(ValueError, match=message):
        load(KERNELS / "builtins.cu").launch(**arguments)
