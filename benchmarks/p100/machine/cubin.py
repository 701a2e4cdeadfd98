"""Registers and static shared memory of the kernels of a cubin, read from the ELF file itself."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, alignment, entry size


class KernelResources(NamedTuple):
    """Registers and shared memory of one kernel."""

    registers: int  # per thread
    static_smem: int  # bytes per block, beside the dynamic shared memory of the launch


def kernels(cubin: Path) -> dict[str, KernelResources]:
    """The kernels of a cubin by name.

    Raises:
        ValueError: the file is no cubin.
    """
    content = cubin.read_bytes()
    if content[:5] != b"\x7fELF\x02":
        raise ValueError(f"cubin: must be a 64-bit ELF file, got {cubin}")
    (table,) = struct.unpack_from("<Q", content, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", content, 0x3A)
    sections = [_SECTION.unpack_from(content, table + entry_size * i) for i in range(count)]
    names_begin = sections[names_index][4]
    registers: dict[str, int] = {}
    smem: dict[str, int] = {}
    for name_offset, _, _, _, _, size, _, info, _, _ in sections:
        begin = names_begin + name_offset
        name = content[begin : content.index(b"\0", begin)].decode()
        if name.startswith(".text."):  # the upper byte of info is the number of registers
            registers[name.removeprefix(".text.")] = info >> 24
        elif name.startswith(".nv.shared."):
            smem[name.removeprefix(".nv.shared.")] = size
    return {name: KernelResources(count, smem.get(name, 0)) for name, count in registers.items()}
