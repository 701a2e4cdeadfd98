"""Reads PTX text: declarations of a module, and the statements of its functions, each with its place in the source."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {
    **{kind + str(bits): bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "pred": 1},
}


class PtxError(ValueError):
    """PTX that the translator does not know; names the line and the text."""


@dataclass(frozen=True)
class Place:
    """The place of a statement: its line of the PTX, and the source line it was compiled from, if the PTX says so."""

    ptx_line: int
    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Variable:
    """Memory with a name: a parameter, or an array in one of the state spaces."""

    name: str
    space: str  # param, shared, local, global or const
    bytes: int  # 0 for dynamic shared memory
    alignment: int
    element: str = "b8"
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Registers:
    type: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class BranchTargets:
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Brace:
    text: str  # { or }


@dataclass(frozen=True)
class Pragma:
    text: str


@dataclass(frozen=True)
class Instruction:
    guard: str  # the register of "@%p1" or "@!%p1", else ""
    negated: bool
    opcode: str  # with all its modifiers
    operands: tuple[str, ...]


Statement = Variable | Registers | Label | BranchTargets | Brace | Pragma | Instruction


@dataclass(frozen=True)
class Function:
    """A kernel (.entry) or a device function; `span` is its body in the module's text, braces included."""

    name: str
    is_entry: bool
    results: tuple[Variable, ...]
    params: tuple[Variable, ...]
    span: tuple[int, int]


@dataclass
class Module:
    name: str  # of its file
    text: str  # without comments
    files: dict[int, str]
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._newlines = [match.start() for match in re.finditer("\n", self.text)]

    def line_of(self, position: int) -> int:
        return bisect.bisect_left(self._newlines, position) + 1

    def error(self, line: int, why: object) -> PtxError:
        return PtxError(f"{self.name} line {line}: {why}: {self.text.splitlines()[line - 1].strip()}")

    def statements(self, function: Function) -> Iterator[tuple[Statement, Place]]:
        """The body's statements in order, its outer braces left out."""
        position, end = function.span[0] + 1, function.span[1] - 1
        file, line = "", 0
        while match := STATEMENT.match(self.text, position, end):
            position = match.end()
            text, start = match["text"], match.start("text")
            if location := LOCATION.match(text):
                if int(location["line"]) > 0:  # line 0: no place of its own
                    file, line = self.files[int(location["file"])], int(location["line"])
            elif not text.startswith((".maxntid", ".reqntid", ".minnctapersm", ".maxnreg")):
                try:
                    statement = parse_statement(text)
                except ValueError as error:
                    raise self.error(self.line_of(start), error) from None
                yield statement, Place(self.line_of(start), file, line)
        if rest := self.text[position:end].lstrip():
            raise self.error(self.line_of(end - len(rest)), "not a statement")


COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
SECTION = re.compile(r"\.section\b[^{]*\{[^}]*\}")
IGNORED_LINE = re.compile(r"[ \t]*\.(version|target|address_size|file|alias)\b[^\n]*")
HEADER = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(?P<kind>entry|func)\b\s*(?:\((?P<results>[^)]*)\)\s*)?"
    r"(?P<name>[\w$%]+)\s*(?:\((?P<params>[^)]*)\))?[^{;]*(?P<end>[{;])"
)
LOCATION = re.compile(r"\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)")
STATEMENT = re.compile(
    r"""\s*(?P<text> \.loc\b[^\n]* | \.(?:maxntid|reqntid|minnctapersm|maxnreg)\b[^\n]*
        | [$%\w]+\s*:\s*(?:\.branchtargets\b[^;]*;)?
        | [{}]
        | (?:[^;{}"]|"[^"]*"|\{[^{}]*\})*;)""",
    re.VERBOSE,
)
LABEL = re.compile(r"([$%\w]+)\s*:\s*(?:\.branchtargets\b([^;]*);)?$")
REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+(.*)$", re.DOTALL)
VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(?P<space>param|shared|local|global|const)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr[^,;]*\s)?(?P<name>[\w$%]+)\s*"
    r"(?P<sizes>(?:\[\s*\d*\s*\])*)\s*(?:=\s*(?P<values>.*))?$",
    re.DOTALL,
)
INSTRUCTION = re.compile(
    r"(?:@(?P<not>!?)(?P<guard>[%\w$]+)\s+)?(?P<opcode>[a-z]\w*(?:\.[\w:]+)*)\s*(?P<operands>.*)$", re.DOTALL
)


def parse_module(text: str, name: str) -> Module:
    """The outline of a PTX module; the bodies of functions are read by Module.statements().

    Args:
        name: what errors and reports call the text.

    Raises:
        PtxError: a declaration that is not understood.
    """
    files = {int(number): name for number, name in FILE.findall(text)}
    text = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    text = SECTION.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    module = Module(name, text, files)
    position = 0
    while rest := re.compile(r"\s*\S").match(text, position):
        position = rest.end() - 1
        try:
            position = _add_declaration(module, position)
        except ValueError as error:
            raise module.error(module.line_of(position), error) from None
    return module


def _add_declaration(module: Module, position: int) -> int:
    """Adds the declaration at a position to the module; returns the position after it."""
    if ignored := IGNORED_LINE.match(module.text, position):
        return ignored.end()
    if header := HEADER.match(module.text, position):
        return _add_function(module, header)
    end = module.text.find(";", position)
    match = VARIABLE.match(module.text[position : max(position, end)].strip())
    if match is None:
        raise ValueError("not a declaration")
    variable = _variable(match)
    module.variables[variable.name] = variable
    return end + 1


def _add_function(module: Module, header: re.Match) -> int:
    """Adds the function to the module if it has a body; returns the position after it."""
    if header["end"] == ";":
        return header.end()
    begin = header.end() - 1
    depth = 0
    for brace in re.compile(r"[{}]").finditer(module.text, begin):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            break
    else:
        raise ValueError("no end of the function")
    results, params = (_parameters(header[group] or "") for group in ("results", "params"))
    function = Function(header["name"], header["kind"] == "entry", results, params, (begin, brace.end()))
    module.functions[function.name] = function
    return brace.end()


def _parameters(text: str) -> tuple[Variable, ...]:
    matches = [VARIABLE.match(part.strip()) for part in text.split(",") if part.strip()]
    if None in matches:
        raise ValueError("not a list of parameters")
    return tuple(_variable(match) for match in matches)


def _variable(match: re.Match) -> Variable:
    element = match["type"]
    if element not in BYTES:
        raise ValueError(f"variables of type {element} are unknown")
    count = 1
    for size in re.findall(r"\[\s*(\d*)\s*\]", match["sizes"]):
        count *= int(size or 0)
    values = tuple(parse_literal(value.strip()) for value in (match["values"] or "").strip(" {}\n").split(",") if value)
    alignment = int(match["align"] or BYTES[element])
    return Variable(match["name"], match["space"], count * BYTES[element], alignment, element, values)


def parse_statement(text: str) -> Statement:
    """One statement, with its semicolon if it has one; ValueError if it is none."""
    if text in "{}":
        return Brace(text)
    if label := LABEL.match(text):
        name, targets = label.groups()
        return Label(name) if targets is None else BranchTargets(name, split_operands(targets))
    text = text.rstrip(";").strip()
    if registers := REGISTERS.match(text):
        return Registers(registers[1], tuple(_register_names(registers[2])))
    if text.startswith(".pragma"):
        return Pragma(text.split('"')[1])
    if variable := VARIABLE.match(text):
        return _variable(variable)
    if match := INSTRUCTION.match(text):
        operands = split_operands(match["operands"])
        return Instruction(match["guard"] or "", match["not"] == "!", match["opcode"], operands)
    raise ValueError("not a statement")


def _register_names(text: str) -> Iterator[str]:
    for name in split_operands(text):
        family = re.match(r"(.*)<(\d+)>$", name)
        yield from (f"{family[1]}{i}" for i in range(int(family[2]))) if family else (name,)


def split_operands(text: str) -> tuple[str, ...]:
    """Splits at the commas outside of braces, brackets and parentheses."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    parts.append(text[begin:].strip())
    return tuple(part for part in parts if part)


def parse_literal(text: str) -> int:
    """An integer, or the bits of a floating-point number, which PTX writes as 0f... or 0d... in hexadecimal."""
    return int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else parse_integer(text)


def parse_integer(text: str) -> int:
    """A PTX integer literal: decimal, 0x..., 0b... or octal 0...; a trailing U is for unsigned."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    digits = digits.rstrip("U")
    is_octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
    return sign * int(digits, 8 if is_octal else 0)
