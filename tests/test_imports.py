"""Imports go one way: from the files themselves, not from what happens to be loaded."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module or subpackage of fastattn imports only from rows above its own. A new one has to be placed here.
LAYERS = (
    ("nvrtc",),
    ("kernel_sources",),
    ("params", "philox", "config", "losses", "schedule", "images", "batches", "peaks", "_launcher"),
    ("blocks",),
    ("reference", "cuda", "triton_kernels"),
    ("backends", "checks", "machine"),
    ("autograd", "info"),
    ("functional",),
    ("modules",),
    ("layout",),
    ("transformer", "data"),
    ("cache", "averaging", "integrations"),
    ("generation",),
    ("__init__",),
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

# The installation loads them where there is no torch.
STANDARD_LIBRARY_ONLY = {"nvrtc", "kernel_sources", "images"}

# What the others may import besides the standard library, torch and fastattn.
EXTERNAL = {
    "triton_kernels": {"triton"},
    "integrations": {"flash_attn", "transformers", "safetensors", "sentencepiece"},
    "batches": {"numpy"},
    "data": {"numpy"},
}


def imports_of(file: Path, package_root: Path) -> set[str]:
    """Absolute dotted names of all modules that a file imports, wherever in the file."""
    package = file.relative_to(package_root).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            folder = package_root.joinpath(*source.split("."))
            for alias in node.names:
                is_module = any((folder / f"{alias.name}{end}").exists() for end in ("", ".py", ".pyi"))
                names.add(f"{source}.{alias.name}" if is_module else source)
    return names


def unit(dotted: str) -> str:
    """The module or subpackage of fastattn that a dotted name belongs to."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(root: Path) -> list[str]:
    """What in root/fastattn breaks the rules above."""
    found = []
    for file in sorted((root / "fastattn").rglob("*.py")):
        where = file.relative_to(root)
        importer = unit(".".join(where.with_suffix("").parts))
        if importer not in LAYER_OF:
            found.append(f"{where}: {importer} has no layer")
            continue
        allowed = set() if importer in STANDARD_LIBRARY_ONLY else {"torch", *EXTERNAL.get(importer, ())}
        for name in imports_of(file, root):
            top = name.split(".")[0]
            if top == "fastattn":
                imported = unit(name)
                if imported != importer and LAYER_OF.get(imported, len(LAYERS)) >= LAYER_OF[importer]:
                    found.append(f"{where}: imports {name}, which is not below {importer}")
            elif top not in sys.stdlib_module_names and top not in allowed:
                found.append(f"{where}: imports {name}")
    return found


def test_fastattn_imports_downwards():
    assert (ROOT / "fastattn" / "functional.py").exists()
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("reference.py", "from . import functional", "imports fastattn.functional, which is not below reference"),
        ("modules.py", "from .transformer import Transformer", "imports fastattn.transformer, which is not below"),
        ("autograd.py", "import fastattn", "imports fastattn, which is not below autograd"),
        ("integrations/torch.py", "from ..generation import translate", "imports fastattn.generation, which is not"),
        ("functional.py", "def late():\n    import triton", "imports triton"),
        ("functional.py", "import benchmarks", "imports benchmarks"),
        ("nvrtc.py", "import torch", "imports torch"),
        ("nvrtc.py", "from . import kernel_sources", "imports fastattn.kernel_sources, which is not below nvrtc"),
        ("helpers.py", "import math", "helpers has no layer"),
    ],
)
def test_every_rule_bites(tmp_path, file, line, complaint):
    shutil.copytree(ROOT / "fastattn", tmp_path / "fastattn", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "fastattn" / file).open("a") as target:
        target.write(f"\n{line}\n")
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0], found


# What the example's own training step takes of a card, by the example's own arithmetic.
ABOUT_AN_EXAMPLE = {"benchmarks/p100_training.py", "benchmarks/gp100/training.py"}


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_what_uses_fastattn_does_not_use_each_other(folder):
    others = {"examples", "benchmarks", "tests"} - {folder}
    files = sorted({*(ROOT / folder).rglob("*.py")} - {ROOT / file for file in ABOUT_AN_EXAMPLE})
    imported = {file: {name.split(".")[0] for name in imports_of(file, ROOT)} for file in files}
    assert any("fastattn" in names for names in imported.values()), f"{folder} does not use fastattn"
    assert {str(file): names & others for file, names in imported.items() if names & others} == {}


TORCH_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)/', re.MULTILINE)


def test_kernel_headers_do_not_include_torch():
    assert TORCH_INCLUDE.search("#include <cstdint>\n  # include <ATen/ATen.h>")
    assert not TORCH_INCLUDE.search('#include "attention.h"  // not <torch/extension.h>')
    headers = [file for kind in ("*.cuh", "*.h") for file in (ROOT / "csrc").rglob(kind)]
    assert [str(file) for file in headers if TORCH_INCLUDE.search(file.read_text())] == []
