"""The stream of instructions of one warp of a forward kernel, found along its loops instead of by execution.

Two matrix products belong to each tile of keys. The first innermost loop that multiplies is that of the scores, the
others share the product with the values; they are turned as often as these need their multiply-adds. The smallest loop
around them is that of the tiles; every other loop is turned once. A branch forward is taken

- where it avoids what only partial tiles need: selects, and nothing that multiplies, waits or exponentiates;
- where the other way multiplies and this one does not;
- where the other way loads less, at every visit but the first, which loads the queries, too.

Whether all this was right is seen from the multiply-adds of the stream: they have to be those of the products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.p100.machine.sass import Instruction, Program

from . import chips

MASKING_SELECTS = 8  # a block with so many of them handles a partial tile
TOLERANCE = 0.1  # of the multiply-adds; those of the softmax come on top where FFMA multiplies
LONGEST = 2_000_000


class Tile(NamedTuple):
    """The tile of a forward kernel: what a block multiplies at a time."""

    block_m: int
    block_n: int
    head_dim: int
    warps: int

    @property
    def product(self) -> float:
        """Multiply-adds of a warp for one of the two products."""
        return self.block_m * self.block_n * self.head_dim / self.warps


def multiply_adds(instructions: Iterable[Instruction], op: str) -> int:
    """The multiply-adds of a warp that executes them, by HMMA or by FFMA."""
    return sum(_of_one(instruction) for instruction in instructions if instruction.op == op)


def _of_one(instruction: Instruction) -> int:
    if instruction.op == "FFMA":
        return chips.FFMA_MULTIPLY_ADDS
    return next(count for shape, count in chips.MULTIPLY_ADDS.items() if shape in instruction.modifiers)


def turns(program: Program, tile: Tile, tiles: int, op: str) -> dict[int, int]:
    """How often each loop is turned, by the position of its branch.

    Args:
        program: the kernel.
        tile: its tile.
        tiles: of keys that a block multiplies.
        op: what multiplies, "HMMA" or "FFMA".

    Raises:
        ValueError: no loop has both products, and there are several tiles.
    """
    code = program.instructions
    found = [(i.target, n) for n, i in enumerate(code) if i.op == "BRA" and i.target is not None and i.target <= n]
    counts = {(begin, end): multiply_adds(code[begin : end + 1], op) for begin, end in found}
    multiplying = [loop for loop in found if counts[loop] >= tile.product / 64]
    inner = [
        loop
        for loop in multiplying
        if counts[loop] <= 1.5 * tile.product and not any(_contains(loop, other) for other in multiplying)
    ]
    # The scores' product has the first loop, the values' the others, which share it.
    parts = [1, *(len(inner) - 1,) * (len(inner) - 1)]
    of_products = {
        loop: round(tile.product / part / counts[loop]) for loop, part in zip(inner, parts[: len(inner)], strict=True)
    }
    outer = [
        loop
        for loop in multiplying
        if sum(_contains(loop, product) for product in of_products) >= 2
        or (loop not in of_products and counts[loop] > 1.5 * tile.product)
    ]
    if not outer and tiles > 1:
        raise ValueError(f"{program.name}: no loop over tiles of {tile} is found")
    of_tiles = {end: tiles for _, end in sorted(outer, key=lambda loop: loop[1] - loop[0])[:1]}
    return {end: 1 for _, end in found} | {end: n for (_, end), n in of_products.items()} | of_tiles


def _contains(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]


def stream(program: Program, tile: Tile, tiles: int) -> list[int]:
    """The positions of the instructions that a warp executes, in order.

    Raises:
        ValueError: its multiply-adds are not those of the tiles.
    """
    op = "HMMA" if any(instruction.op == "HMMA" for instruction in program.instructions) else "FFMA"
    return _checked(program, tile, tiles, _walk(program.instructions, turns(program, tile, tiles, op), op), op)


def _checked(program: Program, tile: Tile, tiles: int, positions: list[int], op: str) -> list[int]:
    got = multiply_adds((program.instructions[n] for n in positions), op)
    wanted = 2 * tiles * tile.product
    if abs(got / wanted - 1) > TOLERANCE:
        raise ValueError(f"{program.name}: {got} multiply-adds of {op} on the way, {wanted:.0f} in {tiles} tiles")
    return positions


def _walk(code: Sequence[Instruction], often: dict[int, int], op: str) -> list[int]:
    positions: list[int] = []
    left: dict[int, int] = {}
    visited: set[int] = set()
    here = 0
    while here < len(code) and len(positions) < LONGEST:
        instruction = code[here]
        positions.append(here)
        to, following = instruction.target, here + 1
        if (instruction.op == "EXIT" and instruction.guard is None) or to == here:
            break  # a branch to itself is what the compiler puts behind a kernel
        if instruction.op == "BRA" and to is not None:
            if to <= here:
                left[here] = left.get(here, often[here]) - 1
                if left[here]:
                    following = to
                else:
                    del left[here]
            elif _is_taken(code, here, to, op, is_first=here not in visited):
                following = to
            visited.add(here)
        here = following
    return positions


def _is_taken(code: Sequence[Instruction], here: int, to: int, op: str, is_first: bool) -> bool:
    """Whether the branch at `here` forward to `to` is taken; `is_first` is true at the first visit."""
    branch, skipped = code[here], code[here + 1 : to]
    if branch.guard is None and not branch.operands and "DIV" not in branch.modifiers:
        return True
    ops = [instruction.op for instruction in skipped]
    last = skipped[-1] if skipped else branch
    if last.op == "BRA" and last.guard is None and last.target is not None and last.target > to and op not in ops:
        others = [instruction.op for instruction in code[to : last.target]]
        loads = others.count("LDG")
        return op in others or (not is_first and 0 < loads < ops.count("LDG"))
    return ops.count("FSEL") >= MASKING_SELECTS and not {op, "BAR", "MUFU"} & {*ops}
