"""Operands of PTX instructions as expressions of the emitted C++."""

from __future__ import annotations

import re
from collections import ChainMap
from dataclasses import dataclass, field

from tests.simt.ptx.parser import BYTES, Variable, parse_integer, split_operands

SPECIAL_REGISTERS = {
    **{f"%tid.{axis}": f"simt::self->index.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"simt::block.size.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"simt::block.index.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"simt::block.grid.{axis}" for axis in "xyz"},
    "%laneid": "simt::self->lane",
    "%lanemask_eq": "(1u << simt::self->lane)",
    "%lanemask_lt": "((1u << simt::self->lane) - 1)",
    "%lanemask_le": "((2u << simt::self->lane) - 1)",
    "%lanemask_gt": "~((2u << simt::self->lane) - 1)",
    "%lanemask_ge": "~((1u << simt::self->lane) - 1)",
    "WARP_SZ": "simt::kWarpSize",
}
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")
INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")


@dataclass
class Scope:
    """The names that a function's statements can see."""

    variables: dict[str, Variable]
    param_offsets: dict[str, int] | None  # of a kernel's parameters in its one block; None in a device function
    params_bytes: int = 0
    registers: ChainMap[str, str] = field(default_factory=ChainMap)  # name: type, one map for each open brace
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    functions: frozenset[str] = frozenset()
    used_bytes_mask: int = 0  # of the next load; 0 stands for all
    depot: str = "no_depot"  # the function's local memory
    called: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)  # variables of the module

    # ---- registers and values

    def value(self, text: str, type_: str) -> str:
        """A C++ expression of that type, without effects: a register, a special register or a literal."""
        if text.startswith("!") and type_ == "pred":
            return f"!{self.value(text[1:], type_)}"
        if text in self.registers:
            own = self.registers[text]
            if BYTES[type_] > BYTES[own] or (type_ == "pred") != (own == "pred"):
                raise ValueError(f"{text}, a register of type {own}, holds no {type_}")
            return converted(register(text), own, type_)
        if text in SPECIAL_REGISTERS:
            return converted(f"u32({SPECIAL_REGISTERS[text]})", "u32", type_)
        if literal := FLOAT.fullmatch(text):
            digits = literal[1] or literal[2]
            if 2 * BYTES[type_] != len(digits):
                raise ValueError(f"{text} is no {type_}")
            return f"as<{type_}>({'u32' if literal[1] else 'u64'}(0x{digits}ull))"
        if INTEGER.fullmatch(text):
            return self.integer(text, type_)
        raise ValueError(f"{text} is no {type_} that can be read here")

    def integer(self, text: str, type_: str) -> str:
        number = parse_integer(text)
        if type_ == "pred":
            return "true" if number else "false"
        if type_[0] not in "bus":
            raise ValueError(f"the integer {text} is no {type_}")
        bits = 8 * BYTES[type_]
        if not -(1 << (bits - 1)) <= number < 1 << bits:
            raise ValueError(f"{text} does not fit into {type_}")
        pattern = number & ((1 << bits) - 1)
        return f"{type_}({pattern})" if pattern < 1 << 31 else f"{type_}({pattern:#x}ull)"

    def assign(self, text: str, type_: str, expression: str) -> str:
        """A C++ statement that puts an expression of that type into a register."""
        if text == "_":
            return f"(void)({expression});"
        if text not in self.registers:
            raise ValueError(f"{text} is no register")
        own = self.registers[text]
        if BYTES[type_] > BYTES[own] or (type_ == "pred") != (own == "pred"):
            raise ValueError(f"{text}, a register of type {own}, takes no {type_}")
        if own == type_ or (is_integer(own) and is_integer(type_)):
            return f"{register(text)} = {expression};"
        return f"set({register(text)}, {expression});"

    def elements(self, text: str) -> tuple[str, ...]:
        """The parts of a vector {...}, or the operand itself."""
        return split_operands(text[1:-1]) if text.startswith("{") else (text,)

    # ---- addresses

    def variable(self, name: str) -> Variable:
        variable = self.variables.get(name)
        if variable is None:
            raise ValueError(f"{name} is neither a register nor a variable")
        self.used.add(name)
        return variable

    def address(self, text: str, space: str) -> str:
        """A C++ pointer for [register + offset] or [variable + offset], where registers point into that space."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"{text} is no address")
        base, offset = match[1], parse_integer(match[2] or "0")
        if base in self.registers:
            if space == "shared":
                return f"shared({self.value(base, 'u32')}, {offset})"
            return f"memory({self.value(base, 'u64')}, {offset})"
        if self.variable(base).space != (space or self.variable(base).space):
            raise ValueError(f"{base} does not lie in {space} memory")
        return f"({self.pointer(base)} + {offset})"

    def pointer(self, name: str) -> str:
        """A C++ pointer to the first byte of a variable."""
        variable = self.variable(name)
        if variable.space == "shared":
            return "::smem" if variable.bytes == 0 else memory_name(name)
        if variable.space == "param" and self.param_offsets is not None and name in self.param_offsets:
            return f"(params + {self.param_offsets[name]})"
        return memory_name(name)

    def param(self, text: str, num_bytes: int) -> str:
        """address() of a parameter, whose bounds are known."""
        match = ADDRESS.fullmatch(text)
        if match and match[1] not in self.registers:
            size, offset = self.variable(match[1]).bytes, parse_integer(match[2] or "0")
            if not 0 <= offset <= size - num_bytes:
                raise ValueError(f"{text} is not within the {size} bytes of the parameter")
        return self.address(text, "param")


def is_integer(type_: str) -> bool:
    return type_[0] in "bus" and type_[1:].isdigit()


def converted(expression: str, own: str, type_: str) -> str:
    """The expression's low bits as a value of another type; `b` types and `u` types are the same in C++."""
    if own.replace("b", "u", 1) == type_.replace("b", "u", 1):
        return expression
    return f"{type_}({expression})" if is_integer(own) and is_integer(type_) else f"as<{type_}>({expression})"


def block(*statements: str) -> str:
    return f"{{ {' '.join(statements)} }}"


def register(name: str) -> str:
    return "v_" + name.lstrip("%")


def memory_name(name: str) -> str:
    return "m_" + name.replace("%", "_")


def label(name: str) -> str:
    return "L_" + name.lstrip("$%")
