"""Runs PTX, as NVRTC emits it, on the CPU executor."""

from tests.simt.ptx.library import PtxLibrary, load_ptx, load_ptx_text
from tests.simt.ptx.parser import PtxError

__all__ = ["PtxError", "PtxLibrary", "load_ptx", "load_ptx_text"]
