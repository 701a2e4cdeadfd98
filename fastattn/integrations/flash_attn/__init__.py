"""flash-attn's interface on fastattn: the same names, arguments and layouts, on every device.

`install_as_flash_attn` makes it what code finds that imports flash_attn by that name.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import bert_padding
from .bert_padding import pad_input, unpad_input
from .interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
    "pad_input",
    "unpad_input",
]

# The version of flash-attn whose interface this is, marked as a local one.
VERSION = "2.8.4+fastattn"
_FUNCTIONS = {name: globals()[name] for name in __all__ if name.startswith("flash_attn_")}
_PADDING = {name: getattr(bert_padding, name) for name in ("index_first_axis", "pad_input", "unpad_input")}


def install_as_flash_attn() -> None:
    """Let `import flash_attn` find fastattn's functions, for code that imports it by name.

    Call it before that code is imported. There are then flash_attn, flash_attn.flash_attn_interface and
    flash_attn.bert_padding, also where flash-attn itself is installed; its layers, losses and private functions are not
    there. Code that asks for the installed distribution flash_attn, as transformers does, sees none. Twice is once.

    Raises:
        RuntimeError: another flash_attn has been imported in this process.
    """
    installed = sys.modules.get("flash_attn")
    if installed is not None:
        if getattr(installed, "__version__", None) == VERSION:
            return
        where = getattr(installed, "__file__", None)
        rule = "must not be imported before install_as_flash_attn is called"
        raise RuntimeError(f"flash_attn: {rule}, has been from {where}")
    package = _module("flash_attn", _FUNCTIONS | {"__version__": VERSION})
    package.__path__ = []
    for name, contents in (("flash_attn_interface", _FUNCTIONS), ("bert_padding", _PADDING)):
        submodule = _module(f"flash_attn.{name}", contents)
        setattr(package, name, submodule)
        sys.modules[submodule.__name__] = submodule
    sys.modules["flash_attn"] = package


def _module(name: str, contents: dict[str, object]) -> ModuleType:
    module = ModuleType(name, f"{name} of fastattn, put there by {__name__}.install_as_flash_attn.")
    module.__spec__ = ModuleSpec(name, None, origin="fastattn", is_package="." not in name)
    vars(module).update(contents)
    return module
