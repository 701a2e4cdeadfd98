"""make gpu, on a machine whose GPU, Python and tools are stand-ins: no failing part stops the others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ["tune", "attention", "transformer_step", "multi_head_attention", "layers", "decode", "overhead"]
BENCHMARKS += ["launch_latency"]
PYTHON = 'echo "${FASTATTN_CUDA_IMAGE-} $*" >>$LOG\nif [[ "$*" == *${FAILS:-nothing}* ]]; then exit 7; fi'
SANITIZER = '[[ "$*" == *"${SANITIZER_FAILS:-nothing}"* ]] && exit 1\nshift 4\nexec "$@"'


class Machine:
    """A copy of the script beside stand-ins that write down how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        for name in ("scripts", "benchmarks", "commands"):
            (folder / name).mkdir()
        shutil.copy(ROOT / "scripts/gpu.sh", folder / "scripts/gpu.sh")
        shutil.copy(ROOT / "scripts/env.sh", folder / "scripts/env.sh")
        self.write("scripts/setup.sh", "exit 0")
        self.write("commands/nvidia-smi", "echo GPU 0: a GPU")
        self.write("commands/python3", PYTHON)

    def write(self, name: str, script: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        path = f"{self.folder / 'commands'}:/usr/bin:/bin"
        environment = {**os.environ, "PATH": path, "LOG": str(self.log), **environment}
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


@pytest.mark.parametrize("prebuilt", [False, True], ids=["set-up", "prebuilt"])
def test_everything_runs_in_the_quick_form(machine, prebuilt):
    result = machine.run(**({"FASTATTN_PREBUILT_KERNELS": "images"} if prebuilt else {}))
    assert result.returncode == 0, result.stderr
    calls = machine.calls()
    assert ("scripts/build_native.py" in calls) == prebuilt
    assert "-m fastattn.info" in calls and "-m pytest -m gpu --numprocesses 4" in calls
    assert "compute_60 -m pytest -m gpu --numprocesses 4 tests/cuda/test_gpu.py" in calls
    assert [call for call in calls if "benchmarks." in call] == [
        *(f"-m benchmarks.{name} --quick" for name in BENCHMARKS),
        "-m benchmarks.plot",
        "-m benchmarks.summary",
    ]
    parts = table(result)
    assert set(BENCHMARKS) | {"gpu tests", "plot", "summary"} <= set(parts)
    assert parts.pop("compute-sanitizer") == "left out: not installed" and set(parts.values()) == {"ok"}


def test_every_benchmark_named_is_there():
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in [*BENCHMARKS, "plot", "summary"])


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
    machine.write("scripts/gpu.sh", script.replace("benchmark layers 30", "benchmark layers 1"))
    machine.write("commands/python3", f'{PYTHON}\nif [[ "$*" == *layers* ]]; then sleep 30; fi')
    result = machine.run()
    assert result.returncode == 1 and table(result)["layers"] == "failed: stopped after 1 s"
    assert "-m benchmarks.overhead --quick" in machine.calls()


def test_when_the_time_is_up_only_the_pictures_and_the_summary_follow(machine):
    script = (machine.folder / "scripts/gpu.sh").read_text()
    machine.write("scripts/gpu.sh", script.replace("SECONDS + 500", "SECONDS + 0"))
    result = machine.run()
    assert result.returncode == 1 and machine.calls() == ["-m benchmarks.plot", "-m benchmarks.summary"]
    assert table(result)["attention"] == "failed: no time left"


def test_the_limits_are_nine_minutes(machine):
    script = (ROOT / "scripts/gpu.sh").read_text()
    limits = [int(line.split("SECONDS + ")[1].split(")")[0]) for line in script.splitlines() if "SECONDS + " in line]
    assert sum(limits) <= 9 * 60


def test_the_full_form_has_every_case_and_no_limit(machine):
    result = machine.run("--full")
    assert result.returncode == 0 and "-m benchmarks.attention" in machine.calls()
    assert not any("--quick" in call for call in machine.calls())


@pytest.mark.parametrize("works", [True, False])
def test_sanitizer_runs_where_it_works(machine, works):
    machine.write("commands/compute-sanitizer", f'[[ "$*" == *import* ]] && exit {0 if works else 1}\n{SANITIZER}')
    result = machine.run()
    assert result.returncode == 0
    parts, subset = table(result), "-m pytest -q -m gpu tests/cuda/test_gpu.py -k test_long_rows or test_threads"
    assert machine.calls().count(subset) == (2 if works else 0)
    assert parts.get("racecheck") == ("ok" if works else None)
    assert parts.get("compute-sanitizer") == (None if works else "left out: it fails here")
    if works:
        result = machine.run(SANITIZER_FAILS="--tool racecheck")
        assert result.returncode == 1 and table(result)["racecheck"] == "failed: exit status 1"


def test_without_a_gpu_nothing_is_done(machine):
    machine.write("commands/nvidia-smi", "exit 9")
    result = machine.run()
    assert result.returncode == 1 and "nothing was done" in result.stderr and not machine.calls()


def test_another_argument_is_an_error(machine):
    result = machine.run("--fast")
    assert result.returncode == 2 and "--fast" in result.stderr and not machine.calls()
