"""The data types of PTX in Python: bits to values and back, exact rounding, and operands to try."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np

ROWS = 128  # operands of each instruction
INTS = {16: "s16 u16 b16", 32: "s32 u32 b32", 64: "s64 u64 b64"}
WIDTH = {name: bits for bits, names in INTS.items() for name in names.split()}
WIDTH |= {"pred": 1, "count": 32, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "tf32": 32}
FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022)}  # precision, lowest exponent


def rounded(exact: Fraction, type_: str, mode: str = "rn") -> float:
    """The number of that format nearest to `exact`, ties to even, or next in a direction; of 0, +0."""
    precision, lowest = FORMATS[type_]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()  # or one more than it should be
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    steps = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](exact / unit)
    result, largest = steps * unit, (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** (1 - lowest)
    if abs(result) <= largest:
        return float(result) if result else math.copysign(0.0, 1 if exact > 0 else -1)
    stays = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
    return math.copysign(float(largest) if stays else math.inf, 1 if exact > 0 else -1)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def decode(bits: int, type_: str):
    if type_.endswith("x2"):
        return decode(bits & 0xFFFF, type_[:-2]), decode(bits >> 16, type_[:-2])
    if type_ in ("f16", "f32", "f64"):
        integer = {"f16": np.uint16, "f32": np.uint32, "f64": np.uint64}[type_]
        return float(np.array(bits, integer).view(f"float{WIDTH[type_]}"))
    if type_ == "bf16":
        return decode(bits << 16, "f32")
    if type_ == "pred":
        return bool(bits)
    width = WIDTH[type_]
    return bits - (1 << width) if type_[0] == "s" and bits >> (width - 1) else bits


def encode(value, type_: str) -> int:
    if type_.endswith("x2"):
        return encode(value[0], type_[:-2]) | encode(value[1], type_[:-2]) << 16
    if type_ == "bf16":
        return encode(value, "f32") >> 16
    if type_ in ("f16", "f32", "f64"):
        width = WIDTH[type_]
        with np.errstate(over="ignore"):
            return int(np.array(value, f"float{width}").view(f"uint{width}"))
    return int(value) & ((1 << WIDTH[type_]) - 1)


def pool(type_: str, position: int) -> list[int]:
    """The bits of one operand in all rows: special values and random ones, in another order for each position."""
    generator = random.Random(f"{type_} {position}")
    width = WIDTH[type_]
    if type_ == "count":
        values = [*range(34), 63, 64, 65, 255, 256, 1 << 31]
    elif type_ in FORMATS:
        values = [encode(x, type_) for x in (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -3.5, math.inf, -math.inf, math.nan)]
        values += [1, 1 << (width - 1) | 1, encode(65504.0, type_)]  # the smallest subnormals
        values += [encode(generator.gauss(0, 1) * 2.0 ** generator.randint(-12, 12), type_) for _ in range(ROWS // 2)]
    else:
        values = [0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, 7]
    values = [value & ((1 << width) - 1) for value in values]
    values += [generator.getrandbits(width) >> generator.randrange(width) for _ in range(ROWS - len(values))]
    generator.shuffle(values)
    return values
