"""Imports go one way: from the files themselves, not from what happens to be loaded."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INIT = Path("fastattn", "__init__.py")

# A module of fastattn imports only from rows above its own. A new one has to be placed here; a folder's name is its
# __init__.py.
LAYERS = (
    ("cpu_kernels", "cuda_kernels", "triton_kernels", "nmt", "integrations"),
    ("cpu_kernels.sources", "cuda_kernels.nvrtc", "cuda_kernels.gpus"),
    ("cuda_kernels.sources",),
    ("params", "philox", "peaks", "compat", "masks", "seam", "_launcher", "_cpu"),
    ("cuda_kernels.images", "triton_kernels.scores", "triton_kernels.tiles", "shapes", "values"),
    ("tensors",),
    ("overrides",),
    ("nmt.config", "nmt.losses", "nmt.schedule", "nmt.batches"),
    ("blocks", "arguments", "machine", "triton_kernels.kernels", "triton_kernels.bias_gradient"),
    ("reference", "triton_kernels.arguments", "triton_kernels.launches"),
    (
        "contests",
        "merging",
        "torch_sdpa",
        "cpu_kernels.attention",
        "cuda_kernels.attention",
        "triton_kernels.attention",
    ),
    ("backends",),
    ("operators", "info"),
    ("autograd", "flops"),
    ("functional",),
    ("modules", "integrations.sdpa", "integrations.flash_attn.alibi", "integrations.flash_attn.bert_padding"),
    ("nmt.layout", "integrations.torch", "integrations.transformers", "integrations.flash_attn.arguments"),
    ("nmt.transformer", "nmt.data", "integrations.flash_attn.interface", "integrations.flash_attn.kvcache"),
    ("nmt.cache", "nmt.averaging", "integrations.safetensors", "integrations.flash_attn"),
    ("nmt.generation", "integrations.marian"),
    ("__init__",),
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

# The installation loads them where there is no torch.
STANDARD_LIBRARY_ONLY = {
    *("cpu_kernels", "cpu_kernels.sources"),
    *("cuda_kernels", "cuda_kernels.gpus", "cuda_kernels.nvrtc", "cuda_kernels.sources", "cuda_kernels.images"),
}

# What the others may import besides the standard library, torch and fastattn, by module or by folder.
EXTERNAL = {
    "triton_kernels": {"triton"},
    "integrations": {"flash_attn", "transformers", "safetensors", "sentencepiece"},
    "nmt.batches": {"numpy"},
    "nmt.data": {"numpy"},
}


def sources(folder: str) -> dict[Path, str]:
    """The Python files of a folder of the house and their texts, by their paths from its root."""
    return {file.relative_to(ROOT): file.read_text() for file in sorted((ROOT / folder).rglob("*.py"))}


@functools.cache
def imports_of(where: Path, text: str) -> set[str]:
    """Absolute dotted names of all modules that a file imports, wherever in the file."""
    package, names = where.parent.parts, set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            folder = ROOT.joinpath(*source.split("."))
            for alias in node.names:
                is_module = any((folder / f"{alias.name}{end}").exists() for end in ("", ".py", ".pyi"))
                names.add(f"{source}.{alias.name}" if is_module else source)
    return names


# ---- inside fastattn ----


def unit(dotted: str) -> str:
    """A module of fastattn as the tables above name it."""
    return dotted.removesuffix(".__init__").removeprefix("fastattn.") if dotted != "fastattn" else "__init__"


def external(module: str) -> set[str]:
    """The packages that a module may import besides fastattn and the standard library."""
    if module in STANDARD_LIBRARY_ONLY:
        return set()
    return {"torch"}.union(*(EXTERNAL.get(name, ()) for name in (module, module.partition(".")[0])))


def violations(files: dict[Path, str]) -> list[str]:
    """The violations of the rules above in these files of fastattn."""
    found = []
    for where, text in files.items():
        importer = "__init__" if where == INIT else unit(".".join(where.with_suffix("").parts))
        if importer not in LAYER_OF:
            found.append(f"{where}: {importer} has no layer")
            continue
        for name in imports_of(where, text):
            top = name.split(".")[0]
            if top == "fastattn":
                if LAYER_OF.get(unit(name), len(LAYERS)) >= LAYER_OF[importer]:
                    found.append(f"{where}: imports {name}, which is not below {importer}")
            elif top not in sys.stdlib_module_names and top not in external(importer):
                found.append(f"{where}: imports {name}")
    return found


def test_fastattn_imports_downwards():
    files = sources("fastattn")
    assert INIT in files
    assert violations(files) == []
    rows = [unit(".".join(where.with_suffix("").parts)) for where in files.keys() - {INIT}]
    assert LAYER_OF.keys() - {*rows} == {"__init__", "_launcher", "_cpu"}, "a row names what is not there"


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("reference.py", "from . import functional", "imports fastattn.functional, which is not below reference"),
        ("modules.py", "from .nmt.layout import pack", "imports fastattn.nmt.layout, which is not below modules"),
        ("autograd.py", "import fastattn", "imports fastattn, which is not below autograd"),
        ("integrations/torch.py", "from ..nmt.cache import DecoderCache", "imports fastattn.nmt.cache, which is not"),
        ("integrations/safetensors.py", "from .marian import save", "imports fastattn.integrations.marian, which is"),
        (
            "integrations/flash_attn/alibi.py",
            "from . import interface",
            "imports fastattn.integrations.flash_attn.interf",
        ),
        (
            "triton_kernels/tiles.py",
            "from . import scores",
            "imports fastattn.triton_kernels.scores, which is",
        ),
        ("nmt/config.py", "from . import losses", "imports fastattn.nmt.losses, which is not below nmt.config"),
        ("nmt/__init__.py", "from . import config", "imports fastattn.nmt.config, which is not below nmt"),
        ("functional.py", "def late():\n    import triton", "imports triton"),
        ("functional.py", "import benchmarks", "imports benchmarks"),
        ("nmt/config.py", "import numpy", "imports numpy"),
        ("cuda_kernels/nvrtc.py", "import torch", "imports torch"),
        ("cuda_kernels/__init__.py", "import torch", "imports torch"),
        ("cpu_kernels/sources.py", "import torch", "imports torch"),
        (
            "cpu_kernels/sources.py",
            "from . import attention",
            "imports fastattn.cpu_kernels.attention, which is not below",
        ),
        ("cuda_kernels/nvrtc.py", "from . import sources", "imports fastattn.cuda_kernels.sources, which is not below"),
        ("helpers.py", "import math", "helpers has no layer"),
        ("nmt/helpers.py", "import math", "nmt.helpers has no layer"),
    ],
)
def test_every_rule_bites(file, line, complaint):
    where = Path("fastattn", file)
    files = sources("fastattn")
    found = violations(files | {where: f"{files.get(where, '')}\n{line}\n"})
    assert len(found) == 1 and complaint in found[0], found


# ---- between the folders ----

# What else of the house a folder or a module imports, the most special row alone; tests import anything.
USES = {
    "fastattn": set(),
    "examples": {"fastattn"},
    "benchmarks": {"fastattn"},
    "benchmarks.p100": {"fastattn", "examples.wmt14.configs", "examples.wmt14.estimate"},  # a step of the example's
    "benchmarks.p100.machine": {"fastattn.cuda_kernels.images"},
}


def strangers(where: Path, text: str) -> set[str]:
    """Imports of a file from other folders of the house than its row of USES names."""
    own = ".".join(where.with_suffix("").parts)
    allowed = USES[max((row for row in USES if is_inside(own, row)), key=len)]
    others = {"fastattn", "benchmarks", "examples", "tests"} - {where.parts[0]}
    from_house = {name for name in imports_of(where, text) if name.split(".")[0] in others}
    return {name for name in from_house if not any(is_inside(name, other) for other in allowed)}


def is_inside(name: str, folder: str) -> bool:
    return f"{name}.".startswith(f"{folder}.")


@pytest.mark.parametrize("folder", ["fastattn", "examples", "benchmarks"])
def test_a_folder_imports_what_its_row_names(folder):
    files = sources(folder)
    found = {where: names for where, text in files.items() if (names := strangers(where, text))}
    assert files and found == {}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("examples/wmt14/train.py", "import benchmarks.timing"),
        ("benchmarks/timing.py", "from examples.wmt14 import configs"),
        ("benchmarks/p100/kernel_report.py", "from examples.wmt14 import train"),
        ("benchmarks/p100/machine/sass.py", "from fastattn import reference"),
        ("benchmarks/p100/machine/instructions/bits.py", "import fastattn"),
        ("benchmarks/tune.py", "from tests.support import cases"),
    ],
)
def test_every_row_bites(file, line):
    assert len(strangers(Path(file), line)) == 1


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no circle."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done or module not in imports:
            return []
        for other in sorted(imports[module]):
            if found := visit(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in imports if (found := visit(module, []))), [])


def test_no_modules_import_each_other_in_a_circle():
    files = {**sources("fastattn"), **sources("examples"), **sources("benchmarks"), **sources("tests")}
    imports = {".".join(where.with_suffix("").parts): imports_of(where, text) for where, text in files.items()}
    assert circle(imports) == []
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]


# ---- C++ ----

TORCH_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)/', re.MULTILINE)


def test_kernel_headers_do_not_include_torch():
    assert TORCH_INCLUDE.search("#include <cstdint>\n  # include <ATen/ATen.h>")
    assert not TORCH_INCLUDE.search('#include "attention.h"  // not <torch/extension.h>')
    headers = [file for kind in ("*.cuh", "*.h") for file in (ROOT / "csrc").rglob(kind)]
    assert [str(file) for file in headers if TORCH_INCLUDE.search(file.read_text())] == []
