"""The notebook: its cells run one after the other, with a short training and short timings."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "notebooks" / "first_steps.ipynb").read_text("utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the cells display, by kind; IPython's part, which a notebook's machine has, is a stand-in."""
    shown: list[tuple[str, str]] = []
    stand_in: Any = ModuleType("IPython.display")
    stand_in.Image, stand_in.HTML = (lambda text, kind=kind: (kind, text) for kind in ("image", "html"))
    stand_in.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    return shown


@pytest.mark.long
def test_cells_run(shown: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT / "examples" / "notebooks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"first_steps.ipynb, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert {"TRAINING", "SECONDS"} <= names.keys()
            names["TRAINING"] = ["--steps", 3, "--training-pairs", 200, "--test-sentences", 5]
            names["SECONDS"] = 0.01
    printed = capsys.readouterr().out
    for expected in ("fastattn", "cpu: fused kernels", "BLEU", "largest difference"):
        assert expected in printed
    assert [kind for kind, _ in shown] == ["image", "html", "image"]
    for kind, text in shown:
        assert Path(text).read_bytes().startswith(b"\x89PNG") if kind == "image" else "A small translator" in text
    assert all(time > 0 for row in names["times"].values() for time in row)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_another_torch_is_installed_for_a_gpu_that_this_one_has_no_kernels_for(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = next("".join(cell["source"]) for cell in CODE if "get_arch_list" in "".join(cell["source"]))
    commands: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    monkeypatch.chdir(ROOT / "examples")
    for built_for, is_enough in ((["sm_75", "sm_80"], not has_gpu), (["sm_60", "sm_70"], True)):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda built_for=built_for: built_for)
        source = cell.replace("if torch.cuda", "run = lambda *command: commands.append(command)\nif torch.cuda", 1)
        commands.clear()
        if is_enough:
            exec(source, {"commands": commands})
            assert commands == []
        else:
            with pytest.raises(SystemExit, match="restart the kernel"):
                exec(source, {"commands": commands})
            assert "torch>=2.7.1,<2.15" in commands[0]


def test_it_is_committed_without_outputs_and_says_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    monkeypatch.chdir(tmp_path)
    cell = next("".join(cell["source"]) for cell in CODE if "get_arch_list" in "".join(cell["source"]))
    with pytest.raises(FileNotFoundError, match="inside a clone of fastattn"):
        exec(cell, {})
