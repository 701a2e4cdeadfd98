"""Predicts, without the card, what the sm_60 kernels do on a P100.

    python -m benchmarks.p100.kernel_report                            writes docs/p100_report.md and .csv
    python -m benchmarks.p100.kernel_report --quick fwd:8192x82x64     one problem, in seconds: 8192 heads, 82 tokens
    python -m benchmarks.p100.kernel_report --quick bwd:1024x8x128x64 --dtype float16 --feature "full mask" --cubin FILE

Nothing is measured: the machine code of the cubins is executed on the CPU for its exact course, and that is replayed
through a model of the chip (benchmarks/p100). It needs nvdisasm of CUDA 12.8, which is fetched once.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from benchmarks.p100 import chip, mix
from benchmarks.p100.pipeline import SENSITIVITIES
from benchmarks.p100.prediction import Model, Prediction
from benchmarks.p100.problems import FEATURES, Problem
from benchmarks.p100.report import Report
from benchmarks.p100.tracing import Kernels
from fastattn.cuda_kernels import images

ROOT = Path(__file__).parents[2]
FOLDER = Path(images.__file__).parent / "_kernels"
LONGEST_WAITS = 8  # that are shown
_CASE = re.compile(r"(?P<pass>fwd|bwd):(?P<sizes>\d+(?:x\d+){2,3})")


def problem(text: str) -> Problem:
    """The problem that "fwd:8192x82x64" (heads, tokens, head dimension) or "bwd:1024x8x82x64" names."""
    match = _CASE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like fwd:8192x82x64 or bwd:1024x8x82x64, got {text!r}")
    sizes = [int(size) for size in match["sizes"].split("x")]
    batch, nheads, seqlen, head_dim = sizes if len(sizes) == 4 else (sizes[0], 1, *sizes[1:])
    return Problem({"fwd": "forward", "bwd": "backward"}[match["pass"]], batch, nheads, seqlen, head_dim)


def describe(prediction: Prediction, model: Model) -> str:
    """What the quick form prints."""
    allowed = ", ".join(f"{name} {rate:.2f}" for name, rate in prediction.bound_tflops().items())
    lines = [
        f"{prediction.problem} on {model.card.name}: predicted {prediction.microseconds:.0f} us, "
        f"{prediction.tflops:.2f} TFLOP/s",
        f"TFLOP/s that each unit allows: {allowed}",
    ]
    for name, assumptions in SENSITIVITIES.items():
        changed = model.predict(prediction.problem, assumptions)
        lines.append(f"{name}: {changed.microseconds:.0f} us, {changed.tflops:.2f} TFLOP/s")
    for launch in model.launches(prediction.problem):
        used = f"{launch.taken.registers} registers, {launch.taken.smem} bytes of shared memory"
        lines += ["", f"{launch.kernel} ({launch.element}): {used}, {launch.taken.resident} blocks on a multiprocessor"]
        block = launch.kinds[0].block
        rows = [(where, turn) for where, turn in mix.main_loops(launch.program).items()]
        rows.append((f"first block ({len(block.warps)} warps)", mix.mix(launch.program, block.times(launch.program))))
        lines += aligned([mix.HEADER, *(mix.row(*named) for named in rows)])
        idle = model.idle(launch)
        lines.append(
            f"schedulers have nothing to issue for {100 * sum(idle.values()):.0f} % of the time, most of it until"
        )
        for index, share in sorted(idle.items(), key=lambda item: -item[1])[:LONGEST_WAITS]:
            lines.append(f"{100 * share:6.1f} %  {launch.program.instructions[index]}")
    return "\n".join(lines)


def aligned(table: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table, column below column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.p100.kernel_report", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel-dir", type=Path, default=FOLDER, help="cubins (default: the installed ones)")
    parser.add_argument("--cubin", type=Path, help="one cubin in their place, for the dtype that is asked for")
    parser.add_argument("--card", choices=chip.CARDS, default="sxm2")
    parser.add_argument("--quick", type=problem, metavar="CASE", help="predict only this, such as fwd:8192x82x64")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--feature", default="plain", choices=FEATURES)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "p100_report.md", help="the report to write")
    options = parser.parse_args(arguments)
    if options.cubin is not None and options.quick is None:
        parser.error("--cubin needs --quick, because the report is about all element types")
    kernels = Kernels(options.kernel_dir, options.cubin)
    if options.quick is not None:
        asked = options.quick._replace(dtype=getattr(torch, options.dtype), feature=options.feature)
        model = Model(kernels, chip.CARDS[options.card])
        print(describe(model.predict(asked), model))
        return 0
    report = Report(kernels)
    table = options.out.with_suffix(".csv")
    options.out.write_text(report.text(table.name))
    table.write_text(report.csv())
    print(f"wrote {options.out} and {table.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
