"""One pass, predicted in seconds: the quick form of the kernel report, printed as text."""

from __future__ import annotations

import argparse
import re

from . import mix
from .passes import Pass
from .pipeline import SENSITIVITIES
from .prediction import Prediction, Predictor

LONGEST_WAITS = 8  # the number of instructions shown
_PASS = re.compile(r"(?P<direction>fwd|bwd):(?P<sizes>\d+(?:x\d+){2,3})")


def parse_pass(text: str) -> Pass:
    """The pass that "fwd:8192x82x64" (heads, tokens, head dimension) or "bwd:1024x8x82x64" names."""
    match = _PASS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like fwd:8192x82x64 or bwd:1024x8x82x64, got {text!r}")
    sizes = [int(size) for size in match["sizes"].split("x")]
    batch, nheads, seqlen, head_dim = sizes if len(sizes) == 4 else (sizes[0], 1, *sizes[1:])
    return Pass({"fwd": "forward", "bwd": "backward"}[match["direction"]], batch, nheads, seqlen, head_dim)


def describe(prediction: Prediction, predictor: Predictor) -> str:
    """The text about a prediction: time, bounds, sensitivities; for each kernel its mix and its longest waits."""
    allowed = ", ".join(f"{name} {rate:.2f}" for name, rate in prediction.bound_tflops().items())
    lines = [
        f"{prediction.pass_} on {predictor.card.name}: predicted {prediction.microseconds:.0f} us, "
        f"{prediction.tflops:.2f} TFLOP/s",
        f"TFLOP/s that each unit allows: {allowed}",
    ]
    for name, assumptions in SENSITIVITIES.items():
        changed = predictor.predict(prediction.pass_, assumptions)
        lines.append(f"{name}: {changed.microseconds:.0f} us, {changed.tflops:.2f} TFLOP/s")
    for launch in predictor.launches(prediction.pass_):
        taken = launch.occupancy
        used = f"{taken.registers} registers, {taken.smem} bytes of shared memory"
        lines += ["", f"{launch.kernel} ({launch.element}): {used}, {taken.resident} blocks on a multiprocessor"]
        block = launch.kinds[0].block
        rows = [(where, turn) for where, turn in mix.main_loops(launch.program).items()]
        rows.append((f"first block ({len(block.warps)} warps)", mix.mix(launch.program, block.times(launch.program))))
        lines += aligned([mix.HEADER, *(mix.row(*named) for named in rows)])
        idle = predictor.idle(launch)
        lines.append(
            f"schedulers have nothing to issue for {100 * sum(idle.values()):.0f} % of the time, most of it until"
        )
        for position, share in sorted(idle.items(), key=lambda item: -item[1])[:LONGEST_WAITS]:
            lines.append(f"{100 * share:6.1f} %  {launch.program.instructions[position]}")
    return "\n".join(lines)


def aligned(table: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
