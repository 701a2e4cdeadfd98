"""docs/api.md: its entries are the package's, it leaves out no public name, and its examples run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

import fastattn
from fastattn.integrations import flash_attn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
_spec = importlib.util.spec_from_file_location("api", ROOT / "scripts" / "api.py")
assert _spec is not None and _spec.loader is not None
api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(api)


def shown(name: str) -> str:
    """A public name as its heading has it."""
    return name.removeprefix("fastattn.") if name.count(".") > 1 else name


def examples() -> dict[str, str]:
    """The example below each heading."""
    entries = re.findall(r"^### (.*?)\n(.*?)(?=^## |^### |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    python = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return {name: "".join(python.findall(text)) for name, text in entries}


def test_entries_are_the_package_s() -> None:
    assert api.renewed(PAGE) == PAGE, "python scripts/api.py --write"


def test_a_stale_entry_is_seen() -> None:
    with mock.patch.object(fastattn.explain, "__doc__", "Something else."):
        assert api.renewed(PAGE) != PAGE


def test_no_public_name_is_left_out() -> None:
    public = {f"fastattn.{name}" for name in fastattn.__all__}
    public |= {f"fastattn.integrations.flash_attn.{name}" for name in flash_attn.__all__}
    assert public - {*api.names(PAGE)} == set()


def test_every_name_has_an_example() -> None:
    assert len(examples()) > 30
    assert {*examples()} <= {shown(name) for name in api.names(PAGE)}
    for heading, code in examples().items():
        assert heading.rpartition(".")[2] in code, heading


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", examples())
def test_example_runs(name: str) -> None:
    if ".safetensors." in name or "marian." in name:
        pytest.importorskip("safetensors")
    if ".transformers." in name:
        pytest.importorskip("transformers")
    before = {module for module in sys.modules if module.partition(".")[0] == "flash_attn"}
    try:
        exec(compile(examples()[name], f"docs/api.md, {name}", "exec"), {"__name__": "example"})
    finally:
        for module in {module for module in sys.modules if module.partition(".")[0] == "flash_attn"} - before:
            del sys.modules[module]
