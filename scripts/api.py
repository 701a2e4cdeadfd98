"""Brings the signatures and docstrings in docs/api.md up to date; what stands between them is written by hand.

    python scripts/api.py            says which are not those of the package, and exits 1 if there are any
    python scripts/api.py --write    replaces them

In the page a name of the package stands between <!-- fastattn.name --> and <!-- / -->.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PLACE = re.compile(r"<!-- (fastattn[\w.]*) -->\n(.*?)<!-- / -->", re.DOTALL)
WIDTH = 100


def resolved(name: str) -> Any:
    """The object of a dotted name, whose first parts are modules and the last, perhaps two, attributes."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def signature(name: str, found: Any) -> str:
    """The name and its arguments, on one line or on one for each."""
    short = name.removeprefix("fastattn.") if name.count(".") > 1 else name
    try:
        signed = inspect.signature(found)
    except ValueError:  # a class whose constructor is not Python's
        return short
    arguments = [argument(x) for x in signed.parameters.values() if x.name != "self"]
    kinds = [x.kind for x in signed.parameters.values() if x.name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        arguments.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    has_result = not inspect.isclass(found) and signed.return_annotation is not signed.empty
    arrow = f" -> {signed.return_annotation}" if has_result else ""
    line = f"{short}({', '.join(arguments)}){arrow}"
    return line if len(line) <= WIDTH else f"{short}(\n    " + ",\n    ".join(arguments) + f",\n){arrow}"


def argument(x: inspect.Parameter) -> str:
    """An argument as its function's source has it; the package's annotations are strings."""
    stars = {x.VAR_POSITIONAL: "*", x.VAR_KEYWORD: "**"}.get(x.kind, "")
    text = f"{stars}{x.name}" if x.annotation is x.empty else f"{stars}{x.name}: {x.annotation}"
    if x.default is x.empty:
        return text
    return f"{text} = {x.default.__name__ if inspect.isclass(x.default) else repr(x.default)}"


def entry(name: str) -> str:
    """The signature and the docstring of a public name, as `help` would show them."""
    found = resolved(name)
    text = inspect.getdoc(found)
    if not text:
        raise ValueError(f"{name} has no docstring")
    return f"```text\n{signature(name, found)}\n\n{text.rstrip()}\n```\n"


def names(page: str) -> list[str]:
    """The public names in the order of the page."""
    return [name for name, _ in PLACE.findall(page)]


def renewed(page: str) -> str:
    """The page with every entry as the package has it."""
    return PLACE.sub(lambda place: f"<!-- {place[1]} -->\n{entry(place[1])}<!-- / -->", page)


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = renewed(page)
    stale = [
        name for (name, old), (_, text) in zip(PLACE.findall(page), PLACE.findall(new), strict=True) if old != text
    ]
    if "--write" in arguments:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    print("\n".join(f"docs/api.md: {name} is not the package's" for name in stale) or "docs/api.md is up to date")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
