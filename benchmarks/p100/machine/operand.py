"""The text of a source operand, taken apart."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

ZERO_REGISTER = 255
TRUE_PREDICATE = 7

_OPERAND = re.compile(
    r"(?P<sign>[-~]?)(?P<bar>\|?)"
    r"(?:(?P<register>R\d+|RZ)|c\[(?P<bank>0x[0-9a-f]+)\]\[(?P<offset>0x[0-9a-f]+)\]|(?P<value>\+?[\w.]+(?:[-+]\d+)?))"
    r"(?:\.(?P<half>H\d(?:_H\d)?))?\|?(?:\.reuse)?"
)


@dataclass(frozen=True)
class Operand:
    """A register, an entry of a constant bank or an immediate, and what is done to it when it is read."""

    kind: str  # "register", "constant", "immediate"
    number: int = 0  # register or constant bank
    offset: int = 0  # bytes, in the constant bank
    value: str = ""  # the immediate as printed
    half: str = ""  # "H1", "H0_H0", "H1_H1"
    negative: bool = False
    absolute: bool = False
    inverted: bool = False

    @staticmethod
    @functools.cache
    def parse(text: str) -> Operand:
        """The operand of this text.

        Raises:
            ValueError: it is none.
        """
        match = _OPERAND.fullmatch(text)
        if match is None:
            raise ValueError(f"operand: not understood: {text!r}")
        if match["register"]:
            what = Operand("register", register_number(match["register"]))
        elif match["bank"]:
            what = Operand("constant", int(match["bank"], 16), int(match["offset"], 16))
        else:
            what = Operand("immediate", value=match["value"])
        sign, bar = match["sign"], bool(match["bar"])
        return replace(what, half=match["half"] or "", negative=sign == "-", absolute=bar, inverted=sign == "~")

    def without_signs(self) -> Operand:
        """The same, read as it is; a half remains one."""
        return replace(self, negative=False, absolute=False, inverted=False)

    def as_integer(self, constants: Mapping[int, bytes]) -> int:
        """The value of a constant or an immediate, before its signs."""
        if self.kind == "immediate":
            return int(self.value, 0)
        bank = constants.get(self.number, b"")
        if self.offset + 4 > len(bank):
            raise ValueError(f"operand: c[{self.number:#x}][{self.offset:#x}] is not in the bank of {len(bank)} bytes")
        return int(struct.unpack_from("<i", bank, self.offset)[0])

    def as_float(self) -> np.float32:
        """The value of a float instruction's immediate, before its signs."""
        text = self.value.lstrip("+")
        if text.startswith("0x"):
            return np.uint32(int(text, 16)).view(np.float32)
        return np.float32("nan" if text in ("QNAN", "SNAN") else text)


def register_number(text: str) -> int:
    """The number 5 for "R5", "R5.reuse" or "R5.CC", and 255 for "RZ"."""
    name = text.split(".")[0]
    return ZERO_REGISTER if name == "RZ" else int(name[1:])


def predicate_number(text: str) -> int:
    """The number 3 for "P3", and 7 for "PT", which is always true."""
    return TRUE_PREDICATE if text == "PT" else int(text[1:])
