"""Predicts, without the card, what the sm_60 kernels do on a P100.

    python -m benchmarks.p100.kernel_report                            writes docs/p100_report.md and .csv
    python -m benchmarks.p100.kernel_report --quick fwd:8192x82x64     one pass, in seconds: 8192 heads, 82 tokens
    python -m benchmarks.p100.kernel_report --quick bwd:1024x8x128x64 --dtype float16 --feature "full mask" --cubin FILE

Nothing is measured: the machine code of the cubins is executed on the CPU for its exact instruction streams, and these
are replayed through a cycle model of the chip. It needs nvdisasm of CUDA 12.8, which is fetched once.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
import tempfile
from pathlib import Path

import torch

from fastattn.cuda_kernels.sources import ELEMENTS

from . import chip, mix, sgemm, static_analysis, targets
from .calibration import expected
from .page import DOCS, Band, banded_verdict, digest, markdown_table
from .passes import FEATURES, Pass
from .pipeline import SENSITIVITIES, USUAL
from .prediction import WITHOUT_PAIRS, Prediction, Predictor, lengths_replayed
from .quick import describe, parse_pass
from .tracing import INSTALLED, Cubins, TracedLaunch

TEMPLATE = Path(__file__).with_name("kernel_report.md")
SGEMM = (4096, 4096, 1024)  # m, n, k


class KernelReport:
    """The page and its CSV; predictions are made as the page is written.

    Args:
        cubins: the kernels.
    """

    def __init__(self, cubins: Cubins) -> None:
        self.cubins = cubins
        self.predictors = {card.name: Predictor(cubins, card) for card in (chip.SXM2, chip.QUADRO)}
        self.rows: list[dict[str, object]] = []
        # By kernel and element type, the launch with the longest sequences and their length.
        self._launches: dict[tuple[str, str], tuple[int, TracedLaunch]] = {}

    def predict(self, pass_: Pass, card: chip.Card, with_sensitivities: bool = True) -> list[Prediction]:
        """The prediction and, if wanted, one with each of the assumptions changed; noted for the CSV."""
        predictor = self.predictors[card.name]
        wanted = SENSITIVITIES.values() if with_sensitivities else ()
        base, *others = [predictor.predict(pass_), *(predictor.predict(pass_, changed) for changed in wanted)]
        shape = {name: getattr(pass_, name) for name in ("batch", "nheads", "seqlen", "head_dim")}
        row: dict[str, object] = {"card": card.name, "pass": pass_.direction, **shape}
        row |= {"dtype": str(pass_.dtype).removeprefix("torch."), "feature": pass_.feature}
        row |= {"kernels": " + ".join(base.kernels)}
        row |= {"us": f"{base.microseconds:.1f}", "tflops": f"{base.tflops:.2f}"}
        row |= {f"bound: {name}": f"{rate:.2f}" for name, rate in base.bound_tflops().items()}
        row |= {name: f"{other.tflops:.2f}" for name, other in zip(SENSITIVITIES, others, strict=False)}
        if row not in self.rows:
            self.rows.append(row)
        print(f"{card.name}: {pass_}: {base.tflops:.2f} TFLOP/s", file=sys.stderr)
        for launch in predictor.launches(pass_):
            known = self._launches.get((launch.kernel, launch.element), (0, launch))
            length = lengths_replayed(pass_)[0]
            self._launches[launch.kernel, launch.element] = max(known, (length, launch), key=lambda entry: entry[0])
        return [base, *others]

    def csv(self) -> str:
        """The table of all predictions that were made."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def text(self, csv_name: str) -> str:
        """The page, which names the file of its CSV."""
        no_pairs, no_conflicts, half_dram, in_step = SENSITIVITIES
        bands = {way: expected(way, chip.SXM2).shown() for way in targets.TARGET_TFLOPS}
        return TEMPLATE.read_text().format(
            expected_forward=bands["forward"],
            expected_backward=bands["backward"],
            csv=f"`{csv_name}`",
            cubins=self._cubins(),
            **{"no_pairs": no_pairs, "no_conflicts": no_conflicts, "half_dram": half_dram, "in_step": in_step},
            targets=self._targets(),
            published=self._published(),
            both_passes=self._both_passes(),
            feature_shape=f"{targets.FEATURE_BATCH} x {targets.FEATURE_HEADS}",
            feature_loss=f"{100 * targets.FEATURE_LOSS:.0f} %",
            features=self._features(),
            kernels=self._kernels(),
            loops=self._loops(),
            sgemm_shape=" x ".join(map(str, SGEMM)),
            sgemm=self._sgemm(),
            cublas=", ".join(f"{rate:.2f} ({size})" for size, rate in sgemm.CUBLAS.items()),
            assumptions=markdown_table(("what", "from where"), chip.SOURCES),
        )

    # ---- the tables

    def _cubins(self) -> str:
        files = [self.cubins.file(element) for element in ELEMENTS]
        return markdown_table(("file", "sha256"), [(f"`{file.name}`", f"`{digest(file)}`") for file in files])

    def _targets(self) -> str:
        header = ("pass", "heads x tokens", "target", "predicted", "expected", "verdict", *SENSITIVITIES, "us")
        lines = []
        for p, wanted in targets.targets(chip.SXM2):
            base, *others = self.predict(p, chip.SXM2)
            rates = (f"{prediction.tflops:.2f}" for prediction in others)
            rate = expected(p.direction, chip.SXM2).times(base.tflops)
            got = (f"{base.tflops:.2f}", rate.shown(), banded_verdict(rate, wanted))
            target = "" if wanted is None else f"{wanted:.2f}"
            line = (p.direction, f"{p.batch} x {p.seqlen}", target, *got, *rates)
            lines.append((*line, f"{base.microseconds:.0f}", binding(base)))
        return markdown_table((*header, "binds most"), lines)

    def _published(self) -> str:
        header = ("pass", "dtype", "heads x tokens x dim", "fused, us", "vanilla, us", "predicted, us", "expected, us")
        lines = []
        for p, times in targets.published_passes():
            base = self.predict(p, chip.QUADRO)[0]
            ours = expected(p.direction, chip.QUADRO).under(base.microseconds)
            shape = f"{p.batch * p.nheads} x {p.seqlen} x {p.head_dim}"
            line = [p.direction, str(p.dtype).removeprefix("torch."), shape, *(f"{1e3 * ms:.0f}" for ms in times)]
            line += [f"{base.microseconds:.0f}", ours.shown(0)]
            line += [ours.under(1e3 * ms).shown() for ms in times]
            lines.append([*line, _doubt(p, ours)])
        return markdown_table((*header, "fused / ours", "vanilla / ours", "doubt about vanilla"), lines)

    def _both_passes(self) -> str:
        lines = []
        for step in targets.both_passes():
            forward, backward = (
                expected(p.direction, chip.QUADRO).under(self.predict(p, chip.QUADRO)[0].microseconds)
                for p in (step.forward, step.backward)
            )
            ours = forward.plus(backward)
            shape = f"{step.backward.batch * step.backward.nheads} x {step.backward.seqlen}"
            for vanilla_us, reading in ((step.vanilla_us, "as published"), (step.card_us, "the card's time")):
                if vanilla_us is not None:
                    ratio = ours.under(vanilla_us)
                    line = (shape, reading, f"{vanilla_us:.0f}", ours.shown(0), f"{step.speedup:.2f}", ratio.shown())
                    needed = vanilla_us / step.speedup - forward.centre
                    share = f"{backward.centre:.0f}", f"{needed:.0f} ({100 * (needed / backward.centre - 1):+.0f} %)"
                    lines.append((*line, banded_verdict(ratio, step.speedup), *share))
        header = ["heads x tokens", "reading", "vanilla, us", "ours, us", "target", "ratio", "verdict"]
        header += ["our backward, us", "needed for the target, us"]
        return markdown_table(header, lines)

    def _features(self) -> str:
        rates = {p: self.predict(p, chip.SXM2, with_sensitivities=False)[0].tflops for p in targets.feature_passes()}
        lines: dict[str, list[str]] = {}
        for p, rate in rates.items():
            loss = 1 - rate / rates[p._replace(feature="plain")]
            shown = f"{rate:.2f}" if p.feature == "plain" else f"{100 * loss:.0f} %"
            lines.setdefault(p.feature, []).append(f"**{shown}**" if loss > targets.FEATURE_LOSS else shown)
        lengths = targets.FEATURE_LENGTHS
        header = ("", *(f"{direction} {seqlen}" for direction in targets.TARGET_TFLOPS for seqlen in lengths))
        return markdown_table(
            header, [(f"{name}, TFLOP/s" if name == "plain" else name, *line) for name, line in lines.items()]
        )

    def _used(self) -> list[tuple[str, int, TracedLaunch]]:
        elements = [*ELEMENTS]
        in_order = sorted(self._launches.items(), key=lambda item: (elements.index(item[0][1]), item[0][0]))
        return [(f"{kernel} ({element})", *entry) for (kernel, element), entry in in_order]

    def _kernels(self) -> str:
        header = ("kernel", "registers", "spills", "threads", "shared memory", "blocks", "warps", "code of a block, KB")
        lines = []
        for name, _, launch in self._used():
            taken = launch.occupancy
            spills = sum(instruction.op in ("LDL", "STL") for instruction in launch.program.instructions)
            warps = taken.resident * taken.threads // 32
            touched = static_analysis.touched_bytes(launch.program, launch.kinds[0].block.times(launch.program))
            numbers = (taken.registers, spills, taken.threads, taken.smem, taken.resident, warps, touched // 1024)
            lines.append((name, *map(str, numbers)))
        return markdown_table(header, lines)

    def _loops(self) -> str:
        lines = []
        for name, length, launch in self._used():
            executed = mix.mix(launch.program, launch.kinds[0].block.times(launch.program))
            for where, turn in {**mix.main_loops(launch.program), f"block, {length} tokens": executed}.items():
                lines.append((name, *mix.row(where, turn)))
        return markdown_table(("kernel", *mix.HEADER), lines)

    def _sgemm(self) -> str:
        lines = []
        with tempfile.TemporaryDirectory() as folder:
            for card in (chip.SXM2, chip.PCIE):
                predictor = Predictor(self.cubins, card)
                launch = sgemm.trace(Path(folder), *SGEMM, card.multiprocessors)
                cycles = [predictor.cycles(launch, assumptions) for assumptions in (USUAL, *SENSITIVITIES.values())]
                rates = [2 * math.prod(SGEMM) * card.clock_hz / n for n in cycles]
                shown = [f"{rate * 1e-12:.2f}" for rate in rates]
                lines.append((card.name, f"**{shown[0]}**", f"{100 * rates[0] / card.peak_flops:.0f} %", *shown[1:]))
        return markdown_table(("card", "predicted, TFLOP/s", "of the peak", *SENSITIVITIES), lines)


def _doubt(p: Pass, ours: Band) -> str:
    """What speaks against the published time of vanilla, with the other reading where there is one."""
    if not p.is_backward:
        return ""
    if (milliseconds := targets.on_the_card_ms(p)) is not None:
        us = 1e3 * milliseconds
        return f"the host's time; by the card's, about {us:.0f} us, {ours.under(us).shown()}"
    single, half = (p._replace(dtype=dtype) for dtype in (torch.float32, torch.float16))
    times = dict(targets.published_passes())
    return f"float16 takes {100 * times[half].vanilla_ms / times[single].vanilla_ms:.0f} % of float32"


def binding(prediction: Prediction) -> str:
    """The unit that allows least, with the rate that it allows."""
    rates = {name: rate for name, rate in prediction.bound_tflops().items() if name != WITHOUT_PAIRS}
    name, rate = min(rates.items(), key=lambda bound: bound[1])
    return f"{name} ({rate:.2f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.p100.kernel_report", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel-dir", type=Path, default=INSTALLED, help="cubins (default: the installed ones)")
    parser.add_argument("--cubin", type=Path, help="one cubin in their place, for the dtype that is asked for")
    parser.add_argument("--card", choices=chip.CARDS, default="sxm2")
    parser.add_argument("--quick", type=parse_pass, metavar="PASS", help="predict only this, such as fwd:8192x82x64")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--feature", default="plain", choices=FEATURES)
    parser.add_argument("--out", type=Path, default=DOCS / "p100_report.md", help="the report to write")
    options = parser.parse_args(arguments)
    if options.cubin is not None and options.quick is None:
        parser.error("--cubin needs --quick, because the report is about all element types")
    cubins = Cubins(options.kernel_dir, options.cubin)
    if options.quick is not None:
        asked = options.quick._replace(dtype=getattr(torch, options.dtype), feature=options.feature)
        predictor = Predictor(cubins, chip.CARDS[options.card])
        print(describe(predictor.predict(asked), predictor))
        return 0
    report = KernelReport(cubins)
    csv_file = options.out.with_suffix(".csv")
    options.out.write_text(report.text(csv_file.name))
    csv_file.write_text(report.csv())
    print(f"wrote {options.out} and {csv_file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
