"""make gpu, on a machine whose GPU, Python and tools are stand-ins: no failing part stops the others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ["attention", "transformer_step", "overhead", "decode", "layers", "multi_head_attention", "launch_latency"]
NEW, OLD = ["warm_up", *BENCHMARKS, "tune"], [*BENCHMARKS[:2], "products", *BENCHMARKS[2:]]  # from 8.0 on, and below
GPUS = {"P100": "6.0", "V100": "7.0", "T4": "7.5", "A100": "8.0", "H200": "9.0", "B200": "10.0"}
SMI = """case "$1" in
*compute_cap*) echo ${CAPABILITY:-9.0} ;;
*compute_mode*) echo ${MODE:-Default} ;;
*) echo GPU 0: a GPU ;;
esac"""
PYTHON = """if [[ "$*" == *folder_name* ]]; then echo $RESULTS; exit; fi
echo "${FASTATTN_CUDA_IMAGE-} $*" >>$LOG
if [[ "$*" == *${FAILS:-nothing}* ]]; then exit 7; fi"""
SANITIZER = """[[ "$*" == *"${SANITIZER_FAILS:-nothing}"* ]] && exit 1
while [[ $1 != python3 ]]; do shift; done
exec "$@\""""


class Machine:
    """A copy of the script beside stand-ins that write down how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        for name in ("scripts", "benchmarks", "commands"):
            (folder / name).mkdir()
        shutil.copy(ROOT / "scripts/gpu.sh", folder / "scripts/gpu.sh")
        shutil.copy(ROOT / "scripts/env.sh", folder / "scripts/env.sh")
        self.write("scripts/setup.sh", "exit 0")
        self.write("commands/nvidia-smi", SMI)
        self.write("commands/nproc", "echo 4")
        self.write("commands/python3", PYTHON)

    def write(self, name: str, script: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        path = f"{self.folder / 'commands'}:/usr/bin:/bin"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")},
            "PATH": path,
            "LOG": str(self.log),
            "RESULTS": str(self.folder / "results"),
            **environment,
        }
        command = [str(self.folder / "scripts/gpu.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        return [line.strip() for line in self.log.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def table(result: subprocess.CompletedProcess) -> dict[str, str]:
    """The parts at the end and how they went."""
    lines = result.stdout.rstrip().split("\n\n")[-1].splitlines()
    return {line[:24].strip(): line[25:51].strip() for line in lines}


def modules(calls: list[str]) -> list[str]:
    """The benchmarks among them, in order."""
    return [call.removeprefix("-m benchmarks.").removesuffix(" --quick") for call in calls if "-m benchmarks." in call]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("prebuilt", [False, True], ids=["set-up", "prebuilt"])
def test_every_gpu_gets_its_parts_in_order_and_ends_well(machine, prebuilt, gpu):
    result = machine.run(CAPABILITY=GPUS[gpu], **({"FASTATTN_PREBUILT_KERNELS": "images"} if prebuilt else {}))
    assert result.returncode == 0, result.stderr
    calls = machine.calls()
    assert ("scripts/build_native.py" in calls) == prebuilt and "-m fastattn.info" in calls
    expected = NEW if float(GPUS[gpu]) >= 8 else OLD
    assert modules(calls) == [*expected, "plot", "summary"]
    xml = f"-m pytest -m gpu --must-run --numprocesses 4 --durations 10 --junitxml {machine.folder}/results/gpu_tests"
    assert calls.index(f"{xml}.xml") < calls.index("-m benchmarks.attention --quick")
    assert f"compute_60 {xml}__compute_60.xml tests/cuda/test_gpu.py" in calls
    parts = table(result)
    assert {*expected, "gpu tests", "gpu tests, compute_60", "plot", "summary"} <= set(parts)
    assert parts.pop("compute-sanitizer") == "left out: not installed" and set(parts.values()) == {"ok"}


def test_a_gpu_for_one_process_has_no_workers(machine):
    machine.run(MODE="Exclusive_Process")
    tests = [call for call in machine.calls() if "pytest" in call]
    assert len(tests) == 2 and all("--numprocesses 0" in call for call in tests)


def test_many_cores_have_twelve_workers(machine):
    machine.write("commands/nproc", "echo 192")
    machine.run()
    assert all("--numprocesses 12 " in call for call in machine.calls() if "pytest" in call)


def test_every_benchmark_named_is_there():
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in {*NEW, *OLD, "plot", "summary"})


@pytest.mark.parametrize("fails", ["fastattn.info", "pytest", "benchmarks.attention", "benchmarks.plot"])
@pytest.mark.parametrize("prebuilt", [False, True], ids=["set-up", "prebuilt"])
def test_a_failing_part_does_not_stop_the_others(machine, prebuilt, fails):
    environment = {"FASTATTN_PREBUILT_KERNELS": "images"} if prebuilt else {}
    machine.run(**environment)
    expected = machine.calls()
    result = machine.run(FAILS=fails, **environment)
    assert result.returncode == 1 and machine.calls() == expected
    failed = {name for name, verdict in table(result).items() if verdict == "failed: exit status 7"}
    names = {"fastattn.info": {"environment"}, "pytest": {"gpu tests", "gpu tests, compute_60"}}
    assert failed == names.get(fails, {fails.removeprefix("benchmarks.")})


def test_a_part_that_takes_too_long_is_stopped(machine):
    script = (machine.folder / "scripts/gpu.sh").read_text()
    machine.write("scripts/gpu.sh", script.replace("benchmark layers 20", "benchmark layers 1"))
    machine.write("commands/python3", f'{PYTHON}\nif [[ "$*" == *layers* ]]; then sleep 30; fi')
    result = machine.run()
    assert result.returncode == 1 and table(result)["layers"] == "failed: stopped after 1 s"
    assert "-m benchmarks.multi_head_attention --quick" in machine.calls()


@pytest.mark.parametrize("is_old", [False, True])
def test_the_limits_add_up_to_nine_minutes(is_old):
    """Of all parts that a machine can have, with both of the sanitizer's tools."""
    limits = {}
    for line in (ROOT / "scripts/gpu.sh").read_text().splitlines():
        if match := re.search(r'(?:benchmark|tests|part) ("[^"]+"|[a-z_]+) (\d+)|timeout (\d+) ', line):
            limits[match[1] or "first call"] = int(match[2] or match[3])
    left_out = {"warm_up", "tune"} if is_old else {"products"}
    assert {*NEW, *OLD, '"gpu tests"', '"$tool"', "first call"} <= limits.keys()
    assert sum(seconds for name, seconds in limits.items() if name not in left_out) + limits['"$tool"'] <= 9 * 60


def test_the_full_form_has_every_case_and_no_limit(machine):
    result = machine.run("--full")
    assert result.returncode == 0 and "-m benchmarks.attention" in machine.calls()
    assert not any("--quick" in call for call in machine.calls())


@pytest.mark.parametrize("works", [True, False])
def test_sanitizer_runs_where_it_works(machine, works):
    machine.write("commands/compute-sanitizer", f'[[ "$*" == *import* ]] && exit {0 if works else 1}\n{SANITIZER}')
    result = machine.run()
    assert result.returncode == 0
    parts, made, run = table(result), "-m tests.support.sanitized_calls make", "-m tests.support.sanitized_calls run"
    calls = [call for call in machine.calls() if "sanitized_calls" in call]
    assert [call.rpartition(" ")[0] for call in calls] == ([made, run, run] if works else [])
    assert parts.get("racecheck") == ("ok" if works else None)
    assert parts.get("compute-sanitizer") == (None if works else "left out: it fails here")
    if works:
        result = machine.run(SANITIZER_FAILS="--tool racecheck")
        assert result.returncode == 1 and table(result)["racecheck"] == "failed: exit status 1"


def test_the_sanitizer_sees_each_tensor_and_our_kernels_alone(machine):
    """Within an allocation of torch's cache, whatever overruns a tensor would be right."""
    machine.write("commands/compute-sanitizer", f'echo "${{PYTORCH_NO_CUDA_MEMORY_CACHING-}} $*" >>$LOG\n{SANITIZER}')
    machine.run()
    calls = [call for call in machine.calls() if "--tool" in call]
    assert len(calls) == 2
    assert all(call.startswith("1 ") and "--kernel-name kernel_substring=attention_" in call for call in calls)


def test_without_a_gpu_nothing_is_done(machine):
    machine.write("commands/nvidia-smi", "exit 9")
    result = machine.run()
    assert result.returncode == 1 and "nothing was done" in result.stderr and not machine.calls()


def test_another_argument_is_an_error(machine):
    result = machine.run("--fast")
    assert result.returncode == 2 and "--fast" in result.stderr and not machine.calls()
