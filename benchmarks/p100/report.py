"""The report: every prediction as CSV, and the text around the most important ones."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fastattn.cuda_kernels.sources import ELEMENTS

from . import chip, goals, mix, sgemm
from .pipeline import SENSITIVITIES, USUAL
from .prediction import WITHOUT_PAIRS, Model, Prediction, lengths_replayed
from .problems import Problem
from .tracing import Kernels, TracedLaunch

TEMPLATE = Path(__file__).with_name("kernel_report.md")
SGEMM = (4096, 4096, 1024)  # rows, columns, terms of a sum


class Report:
    """Predicts as it is written.

    Args:
        kernels: what runs.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.models = {card.name: Model(kernels, card) for card in (chip.SXM2, chip.QUADRO)}
        self.rows: list[dict[str, object]] = []
        self._launches: dict[tuple[str, str], tuple[int, TracedLaunch]] = {}  # the longest, with its length

    def predict(self, problem: Problem, card: chip.Card, with_sensitivities: bool = True) -> list[Prediction]:
        """The prediction and, if wanted, those without each of the assumptions; noted for the CSV."""
        model = self.models[card.name]
        wanted = SENSITIVITIES.values() if with_sensitivities else ()
        base, *others = [model.predict(problem), *(model.predict(problem, assumptions) for assumptions in wanted)]
        row: dict[str, object] = {"card": card.name, **problem._asdict(), "kernels": " + ".join(base.kernels)}
        row |= {"pass_": problem.pass_, "dtype": str(problem.dtype).removeprefix("torch.")}
        row |= {"us": f"{base.microseconds:.1f}", "tflops": f"{base.tflops:.2f}"}
        row |= {f"bound: {name}": f"{rate:.2f}" for name, rate in base.bound_tflops().items()}
        row |= {name: f"{other.tflops:.2f}" for name, other in zip(SENSITIVITIES, others, strict=False)}
        if row not in self.rows:
            self.rows.append(row)
        print(f"{card.name}: {problem}: {base.tflops:.2f} TFLOP/s", file=sys.stderr)
        for launch in model.launches(problem):
            known = self._launches.get((launch.kernel, launch.element), (0, launch))
            length = lengths_replayed(problem)[0]
            self._launches[launch.kernel, launch.element] = max(known, (length, launch), key=lambda entry: entry[0])
        return [base, *others]

    def csv(self) -> str:
        """Every prediction that was made."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue().replace("pass_", "pass", 1)

    def text(self, csv_name: str) -> str:
        """The page, which names the file of the predictions."""
        no_pairs, no_conflicts, half_dram, in_step = SENSITIVITIES
        return TEMPLATE.read_text().format(
            csv=f"`{csv_name}`",
            images=self._images(),
            **{"no_pairs": no_pairs, "no_conflicts": no_conflicts, "half_dram": half_dram, "in_step": in_step},
            targets=self._targets(),
            published=self._published(),
            steps=self._steps(),
            feature_shape=f"{goals.FEATURE_BATCH} x {goals.FEATURE_HEADS}",
            feature_loss=f"{100 * goals.FEATURE_LOSS:.0f} %",
            features=self._features(),
            kernels=self._kernels(),
            loops=self._loops(),
            sgemm_shape=" x ".join(map(str, SGEMM)),
            sgemm=self._sgemm(),
            cublas=", ".join(f"{rate:.2f} ({size})" for size, rate in sgemm.CUBLAS.items()),
            assumptions=table(("what", "from where"), chip.SOURCES),
        )

    # ---- the tables

    def _images(self) -> str:
        files = [self.kernels.file(element) for element in ELEMENTS]
        return table(("file", "sha256"), [(f"`{file.name}`", f"`{digest(file)}`") for file in files])

    def _targets(self) -> str:
        header = ("pass", "heads x tokens", "target", "predicted", "verdict", *SENSITIVITIES, "us", "binds most")
        lines = []
        for goal in goals.goals(chip.SXM2):
            p = goal.problem
            base, *others = self.predict(p, chip.SXM2)
            wanted = "" if goal.tflops is None else f"{goal.tflops:.2f}"
            rates = (f"{prediction.tflops:.2f}" for prediction in others)
            got = (f"**{base.tflops:.2f}**", verdict(base.tflops, goal.tflops))
            line = (p.pass_, f"{p.batch} x {p.seqlen}", wanted, *got, *rates)
            lines.append((*line, f"{base.microseconds:.0f}", binding(base)))
        return table(header, lines)

    def _published(self) -> str:
        header = ("pass", "dtype", "heads x tokens x dim", "fused, us", "vanilla, us", "predicted, us", "TFLOP/s")
        lines = []
        for p, times in goals.published_problems():
            base, *others = self.predict(p, chip.QUADRO)
            fused, vanilla = (1e3 * ms / base.microseconds for ms in times)
            shape = f"{p.batch * p.nheads} x {p.seqlen} x {p.head_dim}"
            line = (p.pass_, str(p.dtype).removeprefix("torch."), shape, *(f"{1e3 * ms:.0f}" for ms in times))
            line = (*line, f"**{base.microseconds:.0f}**", f"{base.tflops:.2f}", f"{fused:.2f}", f"{vanilla:.2f}")
            lines.append((*line, *(f"{1e3 * times.vanilla_ms / other.microseconds:.2f}" for other in others)))
        return table((*header, "fused / ours", "vanilla / ours", *SENSITIVITIES), lines)

    def _steps(self) -> str:
        lines = []
        for step in goals.steps():
            ours = sum(self.predict(p, chip.QUADRO)[0].microseconds for p in (step.forward, step.backward))
            ratio = step.vanilla_us / ours
            shape = f"{step.backward.batch * step.backward.nheads} x {step.backward.seqlen}"
            line = (shape, f"{step.vanilla_us:.0f}", f"{ours:.0f}", f"{step.factor:.2f}", f"**{ratio:.2f}**")
            lines.append((*line, verdict(ratio, step.factor)))
        return table(("heads x tokens", "vanilla, us", "ours, us", "target", "ratio", "verdict"), lines)

    def _features(self) -> str:
        rates = {p: self.predict(p, chip.SXM2, with_sensitivities=False)[0].tflops for p in goals.feature_problems()}
        lines: dict[str, list[str]] = {}
        for p, rate in rates.items():
            loss = 1 - rate / rates[p._replace(feature="plain")]
            shown = f"{rate:.2f}" if p.feature == "plain" else f"{100 * loss:.0f} %"
            lines.setdefault(p.feature, []).append(f"**{shown}**" if loss > goals.FEATURE_LOSS else shown)
        header = ("", *(f"{pass_} {seqlen}" for pass_ in goals.GOALS for seqlen in goals.FEATURE_LENGTHS))
        return table(header, [(f"{name}, TFLOP/s" if name == "plain" else name, *line) for name, line in lines.items()])

    def _used(self) -> list[tuple[str, int, TracedLaunch]]:
        elements = [*ELEMENTS]
        in_order = sorted(self._launches.items(), key=lambda item: (elements.index(item[0][1]), item[0][0]))
        return [(f"{kernel} ({element})", *entry) for (kernel, element), entry in in_order]

    def _kernels(self) -> str:
        header = ("kernel", "registers", "spills", "threads", "shared memory", "blocks", "warps")
        lines = []
        for name, _, launch in self._used():
            taken = launch.taken
            spills = sum(instruction.op in ("LDL", "STL") for instruction in launch.program.instructions)
            warps = taken.resident * taken.threads // 32
            numbers = (taken.registers, spills, taken.threads, taken.smem, taken.resident, warps)
            lines.append((name, *map(str, numbers)))
        return table(header, lines)

    def _loops(self) -> str:
        lines = []
        for name, length, launch in self._used():
            executed = mix.mix(launch.program, launch.kinds[0].block.times(launch.program))
            for where, turn in {**mix.main_loops(launch.program), f"block, {length} tokens": executed}.items():
                lines.append((name, *mix.row(where, turn)))
        return table(("kernel", *mix.HEADER), lines)

    def _sgemm(self) -> str:
        lines = []
        with tempfile.TemporaryDirectory() as folder:
            for card in (chip.SXM2, chip.PCIE):
                model = Model(self.kernels, card)
                launch = sgemm.trace(Path(folder), *SGEMM, card.multiprocessors)
                cycles = [model.cycles(launch, assumptions) for assumptions in (USUAL, *SENSITIVITIES.values())]
                rates = [2 * math.prod(SGEMM) * card.clock_hz / n for n in cycles]
                shown = [f"{rate * 1e-12:.2f}" for rate in rates]
                lines.append((card.name, f"**{shown[0]}**", f"{100 * rates[0] / card.peak_flops:.0f} %", *shown[1:]))
        return table(("card", "predicted, TFLOP/s", "of the peak", *SENSITIVITIES), lines)


def digest(file: Path) -> str:
    """Of the cubin that a report belongs to."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def verdict(got: float, wanted: float | None) -> str:
    """Whether a target is reached."""
    if wanted is None:
        return "no target"
    return "reached" if got >= wanted else f"missed by {100 * (1 - got / wanted):.0f} %"


def binding(prediction: Prediction) -> str:
    """The unit that allows least, and what it allows."""
    rates = {name: rate for name, rate in prediction.bound_tflops().items() if name != WITHOUT_PAIRS}
    name, rate = min(rates.items(), key=lambda bound: bound[1])
    return f"{name} ({rate:.2f})"


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    rows = [tuple(header), *map(tuple, lines)]
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
