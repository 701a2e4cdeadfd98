"""The scripts behind the Makefile, on machines described by stand-ins for commands such as nvidia-smi and python3."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import clock

ROOT = Path(__file__).parents[2]
CU126 = "--index-url https://download.pytorch.org/whl/cu126"


class Machine:
    """A folder of commands in front of PATH, or alone on it."""

    def __init__(self, folder: Path):
        self.commands = folder / "commands"
        self.commands.mkdir()

    def command(self, name: str, script: str) -> None:
        file = self.commands / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def link(self, *names: str) -> None:
        for name in names:
            (self.commands / name).symlink_to(shutil.which(name))

    def run(self, *command: object, alone: bool = False, **environment: str) -> subprocess.CompletedProcess:
        given = ("TORCH", "PYTHON", "MAKEFLAGS")  # of the run of these tests itself, as are FASTATTN_VENV and others
        inherited = {k: v for k, v in os.environ.items() if k not in given and not k.startswith("FASTATTN_")}
        path = str(self.commands) if alone else f"{self.commands}:{os.environ['PATH']}"
        environment = inherited | {"PATH": path} | environment
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# ---- which torch ----


@pytest.mark.parametrize(
    ("nvidia_smi", "expected"),
    [
        pytest.param("echo 6.0, 535.104.05", "torch==2.7.1", id="P100"),
        pytest.param("echo 7.0, 580.65.06", "torch==2.7.1", id="V100"),
        pytest.param("echo 7.5, 580.65.06", "torch==2.13.0", id="T4"),
        pytest.param("echo 7.5, 550.54.15", f"torch==2.13.0 {CU126}", id="T4-old-driver"),
        pytest.param("echo 9.0, 580.65.06", "torch==2.13.0", id="H100"),
        pytest.param("echo 10.0, 580.65.06", "torch==2.13.0", id="B200"),
        pytest.param("echo 9.0, 580.65.06; echo 6.1, 580.65.06", "torch==2.7.1", id="H100-and-GTX1080"),
        pytest.param("echo 10.0, 580.65.06; echo 9.0, 580.65.06", "torch==2.13.0", id="B200-and-H100"),
        pytest.param("echo '[N/A], 450.51'", "torch==2.13.0", id="no-compute-capability"),
        pytest.param("echo NVIDIA-SMI has failed; exit 9", "torch==2.13.0", id="no-driver"),
        pytest.param("echo No devices were found; exit 6", "torch==2.13.0", id="no-gpu"),
    ],
)
def test_torch_fits_the_oldest_gpu_and_the_driver(machine, nvidia_smi, expected):
    machine.command("nvidia-smi", nvidia_smi)
    machine.command("python3", "exit 0")  # not newer than Python 3.13
    result = machine.run(ROOT / "scripts/choose_torch.sh")
    arguments, _, reason = result.stdout.strip().partition("  # ")
    assert (result.returncode, arguments) == (0, expected)
    assert reason


@pytest.mark.parametrize(
    "nvidia_smi",
    [
        pytest.param("echo 12.0, 570.124.06", id="Blackwell"),
        pytest.param("echo 9.0, 570.124.06; echo 10.0, 570.124.06", id="H100-and-B200"),
        pytest.param('[[ "$1" == --list-gpus ]]', id="nvidia-smi-without-compute-capability"),
    ],
)
def test_no_torch_for_a_driver_that_is_too_old(machine, nvidia_smi):
    machine.command("nvidia-smi", nvidia_smi)
    machine.command("python3", "exit 0")
    result = machine.run(ROOT / "scripts/choose_torch.sh")
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.startswith("driver too old: ")
    assert machine.run(ROOT / "scripts/choose_torch.sh", TORCH="torch==2.10.0").returncode == 0


def test_torch_without_nvidia_smi(machine):
    machine.link("bash", "sort")
    result = machine.run(ROOT / "scripts/choose_torch.sh", alone=True)
    assert result.stdout == "torch==2.13.0  # no NVIDIA GPU found\n"


def test_torch_for_an_old_gpu_under_a_new_python(machine):
    machine.command("nvidia-smi", "echo 6.0, 580.65.06")
    machine.command("python3", "exit 1")  # newer than Python 3.13
    result = machine.run(ROOT / "scripts/choose_torch.sh")
    assert result.stdout.startswith(f"torch>=2.9,<2.15 {CU126}  # ")


def test_torch_by_the_user(machine):
    machine.command("nvidia-smi", "echo 6.0, 535.104.05")
    result = machine.run(ROOT / "scripts/choose_torch.sh", TORCH="torch==2.10.0 --index-url file:///wheels")
    assert result.stdout == "torch==2.10.0 --index-url file:///wheels  # TORCH is set\n"


# ---- what the system lacks ----


def python_that_fails(words: str) -> str:
    """A python3 in which any program with these words in it fails."""
    return f'[[ "$2" == *{words}* ]] && exit 1\nexec {sys.executable} "$@"'


@pytest.mark.parametrize(
    ("lacks", "packages"),
    [
        ({"python3"}, "python3 python3-venv python3-dev"),
        ({"ensurepip"}, "python3-venv"),
        ({"Python.h"}, "python3-dev"),
        ({"g++"}, "g++"),
        ({"make"}, "make"),
        ({"ensurepip", "g++", "make"}, "python3-venv g++ make"),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else "",
)
def test_missing_packages_are_one_apt_line(machine, lacks, packages):
    machine.link("bash", *({"g++", "make"} - lacks))
    if "python3" not in lacks:
        machine.command("python3", python_that_fails(" ".join(lacks & {"ensurepip", "Python.h"}) or "nothing"))
    result = machine.run(ROOT / "scripts/prerequisites.sh", alone=True)
    apt_lines = [line.strip() for line in result.stderr.splitlines() if "apt" in line]
    assert (result.returncode, result.stdout) == (1, "")
    assert apt_lines == [f"sudo apt-get install -y {packages}"]


def test_nothing_missing_says_nothing(machine):
    result = machine.run(ROOT / "scripts/prerequisites.sh", PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_old_python_is_named(machine):
    machine.command("python3", python_that_fails("version_info"))
    result = machine.run(ROOT / "scripts/prerequisites.sh")
    assert result.returncode == 1
    assert "needs Python >= 3.10, but python3 is Python 3." in result.stderr
    assert "apt-get" not in result.stderr


# ---- the set-up ----

# Acts as the system's python3 and, copied there, as the one in .venv: notes what pip is asked for, as far as it gets.
STAND_IN = """
case "$*" in
*realpath*) echo "$0" ;;
--version) echo Python 3.11.0 ;;
*"version_info[:2]"*) echo 3.10 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
-c*) ;;
*" list "*) cat packages ;;
"scripts/build_native.py") [[ "$1" != "$(cat stop_at)" ]] || exit 1; echo "$1" >>pip.log ;;
"-m pip "*) [[ "$*" != *"$(cat stop_at)"* ]] || exit 1; echo "${*:4}" >>pip.log ;;
esac
"""
TORCH, TRITON = "install --quiet torch==2.13.0", "install --quiet triton==3.7.1"
TOOLS, KERNELS, EDITABLE = (
    "install --quiet -r requirements-dev.txt",
    "scripts/build_native.py",
    "install --quiet --no-deps --no-build-isolation --editable .",
)


class Repository:
    """A copy of the files that the set-up reads, with stand-ins for Python and the GPU."""

    def __init__(self, machine: Machine, folder: Path):
        self.machine, self.folder = machine, folder
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        modules = ("cuda_kernels/gpus", "cuda_kernels/nvrtc", "cuda_kernels/sources", "cpu_kernels/sources")
        compilation = (f"fastattn/{name}.py" for name in modules)
        for name in ("requirements-dev.txt", "pyproject.toml", "setup.py", *compilation):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "stop_at").write_text("nothing like this")
        (folder / "packages").write_text("torch==2.13.0+cpu\n")
        machine.command("python3", STAND_IN)
        machine.command("nvidia-smi", "exit 9")

    def setup(self, **environment: str) -> list[str]:
        """Runs the set-up; returns the calls of pip and of the kernels' build, and "failed" at the end if it did."""
        (self.folder / "pip.log").write_text("")
        command = ("bash", "-c", f"cd {self.folder} && scripts/setup.sh")
        result = self.machine.run(*command, **environment)
        return [*(self.folder / "pip.log").read_text().splitlines(), *(["failed"] if result.returncode else [])]


@pytest.fixture
def repository(machine, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    return Repository(machine, folder)


def test_setup_installs_everything_once(repository):
    assert repository.setup() == [TORCH, TRITON, TOOLS, KERNELS, EDITABLE]
    assert repository.setup() == []


@pytest.mark.parametrize(
    "file",
    [
        "csrc/attention.cu",
        "csrc/cpu/softmax.h",
        "fastattn/cuda_kernels/nvrtc.py",
        "fastattn/cuda_kernels/sources.py",
        "fastattn/cpu_kernels/sources.py",
        "scripts/build_native.py",
        "scripts/build_settings.py",
    ],
)
def test_setup_after_a_change_of_the_kernels_compiles_only(repository, file):
    repository.setup()
    with (repository.folder / file).open("a") as target:
        target.write("\n")
    (repository.folder / "stop_at").write_text(KERNELS)
    assert repository.setup() == ["failed"]
    (repository.folder / "stop_at").write_text("nothing like this")
    assert repository.setup() == [KERNELS]
    assert repository.setup() == []


def test_setup_for_other_architectures_compiles_only(repository):
    repository.setup()
    assert repository.setup(FASTATTN_CUDA_ARCHS="60") == [KERNELS]
    assert repository.setup(FASTATTN_CUDA_ARCHS="60") == []
    assert repository.setup() == [KERNELS]


def test_setup_keeps_all_architectures_once_they_are_there(repository):
    repository.setup()
    assert repository.setup(FASTATTN_CUDA_ARCHS="all") == [KERNELS]
    assert repository.setup() == repository.setup(FASTATTN_CUDA_ARCHS="all") == []
    assert repository.setup(FASTATTN_CUDA_ARCHS="60") == [KERNELS]
    assert repository.setup(FASTATTN_CUDA_ARCHS="60") == []


def test_setup_after_a_change_of_the_tools_keeps_torch(repository):
    repository.setup()
    with (repository.folder / "requirements-dev.txt").open("a") as file:
        file.write("# changed\n")
    assert repository.setup() == [TOOLS, KERNELS, EDITABLE]
    assert repository.setup() == []


def test_setup_for_another_torch_starts_over(repository):
    repository.setup()
    (repository.folder / ".venv" / "leftover").touch()
    (repository.folder / "packages").write_text("torch==2.7.1\ntriton==3.3.1\n")
    assert repository.setup(TORCH="torch==2.7.1") == ["install --quiet torch==2.7.1", TOOLS, KERNELS, EDITABLE]
    assert not (repository.folder / ".venv" / "leftover").exists()


@pytest.mark.parametrize("step", [TORCH, TRITON, TOOLS, KERNELS, EDITABLE])
def test_setup_that_was_stopped_starts_over(repository, step):
    everything = [TORCH, TRITON, TOOLS, KERNELS, EDITABLE]
    (repository.folder / "stop_at").write_text(step)
    assert repository.setup() == [*everything[: everything.index(step)], "failed"]
    (repository.folder / "stop_at").write_text("nothing like this")
    assert repository.setup() == everything
    assert repository.setup() == []


def test_update_of_the_tools_that_was_stopped_starts_over(repository):
    repository.setup()
    with (repository.folder / "requirements-dev.txt").open("a") as file:
        file.write("# changed\n")
    (repository.folder / "stop_at").write_text(EDITABLE)
    assert repository.setup() == [TOOLS, KERNELS, "failed"]
    (repository.folder / "stop_at").write_text("nothing like this")
    assert repository.setup() == [TORCH, TRITON, TOOLS, KERNELS, EDITABLE]


@pytest.mark.parametrize("packages", ["torch==2.13.0\ntriton==3.7.1\n", "torch==2.14.1+cpu\n"])
def test_triton_is_added_only_to_the_torch_it_fits(repository, packages):
    (repository.folder / "packages").write_text(packages)
    assert repository.setup() == [TORCH, TOOLS, KERNELS, EDITABLE]


@pytest.mark.parametrize("name", ["/", "..", ".venv/..", ".venv/floor", "venv"])
def test_setup_makes_no_other_folder_anew(repository, name):
    assert repository.setup(FASTATTN_VENV=name) == ["failed"]
    assert (repository.folder / "scripts").exists()


def test_setup_notes_what_it_took(repository):
    def steps() -> dict[str, float]:
        return clock.read_steps((repository.folder / ".venv" / "seconds").read_text().splitlines())

    repository.setup()
    first = steps()
    assert set(first) == {"kernels", "set-up"} and all(0 <= seconds < 60 for seconds in first.values())
    note = repository.folder / "scripts" / "note_seconds.sh"
    for seconds in (1234, 1235):
        assert repository.machine.run(note, "set-up", seconds).returncode == 0
    assert repository.setup(FASTATTN_CUDA_ARCHS="60") == [KERNELS]
    assert steps() == first | {"kernels": steps()["kernels"], "set-up": 1235}


# ---- the floor ----


def floor(repository: Repository, **environment: str) -> tuple[list[str], subprocess.CompletedProcess]:
    """What pip, the kernels' build and pytest were asked for, and the script's run."""
    (repository.folder / "pip.log").write_text("")
    script = repository.folder / "scripts/test_floor.sh"
    result = repository.machine.run("bash", "-c", f'cd {repository.folder} && "$0" tests/nmt', script, **environment)
    return (repository.folder / "pip.log").read_text().splitlines(), result


def test_floor_has_an_environment_of_its_own(repository):
    repository.setup()
    before = {file: file.stat().st_mtime_ns for file in (repository.folder / ".venv").rglob("*")}
    (repository.folder / "packages").write_text("torch==2.7.1+cpu\n")
    repository.machine.command("python3.10", STAND_IN)
    repository.machine.command("pytest", 'echo "pytest $*" >>pip.log; echo "$PATH" >path')
    torch = "install --quiet torch==2.7.1 --index-url https://download.pytorch.org/whl/cpu"
    log, result = floor(repository)
    assert result.returncode == 0, result.stderr
    assert log[:-1] == [torch, TOOLS, KERNELS, EDITABLE]
    assert re.fullmatch(r"pytest --numprocesses \d+ --clock=\.venv-floor/seconds tests/nmt", log[-1])
    path = (repository.folder / "path").read_text()
    assert path.startswith(f"{repository.folder}/.venv-floor/bin:")
    assert {file: file.stat().st_mtime_ns for file in (repository.folder / ".venv").rglob("*")} == before
    assert floor(repository)[0] == log[-1:]
    assert repository.setup() == []


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 127", "needs Python 3.10, and python3.10 is not here or does not start. Name one, for example:"),
        ("echo 3.12", "needs Python 3.10, the oldest that fastattn takes, but python3.10 is Python 3.12"),
    ],
    ids=["missing", "another"],
)
def test_floor_says_which_python_it_looks_for(repository, python, message):
    repository.machine.command("python3.10", python)
    log, result = floor(repository)
    assert (log, result.returncode) == ([], 1)
    assert message in result.stderr
    assert not (repository.folder / ".venv-floor").exists()
    log, result = floor(repository, PYTHON="no-such-python")
    assert (log, result.returncode) == ([], 1) and "no-such-python is not here" in result.stderr


# ---- the targets ----

QUICK = '-m "not slow and not long" tests/attention tests/nmt tests/package'


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "scripts/demo.sh --steps 5"),
        ("test", 'scripts/test.sh -m "not slow" --steps 5'),
        ("quick", f"scripts/test.sh {QUICK} --steps 5"),
        ("test-all", "scripts/test.sh --full --steps 5"),
        ("test-floor", f"scripts/test_floor.sh {QUICK} --steps 5"),
        ("check", "scripts/check.sh"),
        ("gpu", "scripts/gpu.sh --steps 5"),
    ],
)
def test_a_target_is_one_line_that_runs_a_script(machine, target, command):
    result = machine.run("make", "--no-print-directory", "-C", ROOT, "--dry-run", target, "ARGS=--steps 5")
    assert result.stdout == f"{command}\n"
    assert os.access(ROOT / command.split()[0], os.X_OK)


def test_contributing_names_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    named = {target for span in code for target in re.findall(r"\bmake ([a-z-]+)", span)}
    assert "test" in named and named <= targets


def test_ci_runs_the_checks_and_the_tests():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert [line for line in commands if line.startswith("make")] == ["make check", "make test"]


def test_a_release_runs_the_floor_the_checks_and_the_build():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert re.search(r"^on:\n  push:\n    tags:", workflow, re.MULTILINE)
    assert re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE) == [
        ".ci/run",
        "make test-floor",
        "python -m pip install build",
        "python -m build",
    ]
    assert "secrets." not in workflow and "needs: [checks, floor]" in workflow


def test_gpu_target_without_a_gpu_stops_before_the_setup(repository):
    result = repository.machine.run(repository.folder / "scripts/gpu.sh")
    assert result.returncode == 1
    assert "nvidia-smi lists no GPU here; nothing was done" in result.stderr
    assert not (repository.folder / ".venv").exists()
