"""Kernels of PTX by hand: the frame around the instructions of a test."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tests.simt import selftest
from tests.simt.ptx import load_ptx_text

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
# A kernel whose thread %tid has its own int32 at [%in] and [%out].
KERNEL = """
.visible .entry kernel(.param .align 8 .b8 p[16]) {{
.reg .pred %p<8>;
.reg .b32 %r<16>, %tid;
.reg .b64 %rd<8>, %in, %out;
.reg .b16 %rs<8>;
{declarations}
ld.param.u64 %in, [p];
ld.param.u64 %out, [p+8];
mov.u32 %tid, %tid.x;
mul.wide.u32 %rd0, %tid, 4;
add.s64 %in, %in, %rd0;
add.s64 %out, %out, %rd0;
ld.global.u32 %r0, [%in];
{code}
st.global.u32 [%out], %r1;
ret;
}}
"""


def kernel(code: str, declarations: str = "", before: str = "") -> str:
    return HEADER + before + KERNEL.format(code=code, declarations=declarations)


def run(
    text: str,
    values: Iterable[int] = range(32),
    *,
    threads: int = 32,
    schedule: str | int = "in-order",
    dynamic_smem: int = 0,
) -> list[int]:
    """The values that the threads wrote, each given one of the values, in a checked launch of one block."""
    x = torch.tensor([*values], dtype=torch.int32)
    library = load_ptx_text(text, checked=True)
    (out,) = selftest.launch(
        *(library, "kernel", (1,), (threads,), {"x": x}, {"out": torch.zeros(threads, dtype=torch.int32)}),
        **{"schedule": schedule, "dynamic_smem": dynamic_smem},
    )
    return out.tolist()
