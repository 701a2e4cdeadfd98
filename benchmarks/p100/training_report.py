"""Predicts, without the card, a training step of the paper's models on a P100 and writes docs/p100_training.md.

    python -m benchmarks.p100.training_report

Nothing is measured: the time of attention comes from its machine code, that of the products from published rates of
cuBLAS, that of the rest from the bytes it moves. It needs nvdisasm, as benchmarks.p100.kernel_report does.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from benchmarks import published
from benchmarks.lengths import Lengths, updates
from examples.wmt14.configs import CONFIGS, Config
from examples.wmt14.estimate import GPUS, OVERHEAD_BYTES, activation_bytes, count_parameters, estimate
from fastattn import TransformerConfig

from . import chip, training_step
from .calibration import expected
from .page import DOCS, Band, digest, markdown_table, verdict
from .passes import Pass
from .pipeline import SENSITIVITIES, USUAL, ChipAssumptions
from .prediction import Predictor
from .tracing import INSTALLED, Cubins
from .training_step import StepAssumptions, Work, needed_tflops, stored_weights_bytes, tokens_that_fit

TEMPLATE = Path(__file__).with_name("training_report.md")
CARD, CARD_IN_ESTIMATE = chip.SXM2, "P100 SXM2"
VOCABULARY = 37_000
UPDATES = 6  # chosen from one of short sentences to one of long ones
HALF_DRAM = SENSITIVITIES["half of DRAM"]
# The published passes of vanilla attention with the shortest sentences: batch, heads, tokens, head dimension.
VANILLA = {"forward": (8192, 1, 82, 64), "backward": (1024, 8, 82, 64)}


class PaperModel(NamedTuple):
    """One of the paper's models with the paper's time, the aim, and a rate measured elsewhere."""

    config: Config
    step_seconds: float  # on eight P100 (section 5.2)
    aim: float  # target tokens per second of one P100 alone
    tensorflow: float  # the same, as TensorFlow's official model reached it


PAPER_MODELS = {
    "base": PaperModel(CONFIGS["base_en_de"], 0.4, 14_500, 8_100),
    "big": PaperModel(CONFIGS["big_en_de"], 1.0, 5_800, 3_700),
}
PAPER_GPUS = 8


class UpdateAttention(NamedTuple):
    """The passes of attention over one GPU's share of an update."""

    longest: int  # tokens of a sentence
    pairs: int
    passes: dict[Pass, int]  # each with the number of layers that compute it


def attentions(model: TransformerConfig, chosen: list[Lengths]) -> list[UpdateAttention]:
    """The attention of each update, all of whose sentences are taken to be as long as its longest."""
    found = []
    for lengths in chosen:
        longest, pairs = max(lengths.source + lengths.target), round(len(lengths.source) / PAPER_GPUS)
        passes = {}
        head_dim = model.head_dim or model.d_model // model.num_heads
        for direction in ("forward", "backward"):
            one = Pass(direction, pairs, model.num_heads, longest, head_dim)
            passes[one._replace(feature="packed")] = model.num_encoder_layers + model.num_decoder_layers
            passes[one._replace(feature="causal")] = model.num_decoder_layers
        found.append(UpdateAttention(longest, pairs, passes))
    return found


def vanilla_seconds(pass_: Pass) -> float:
    """The time of vanilla attention at its published rate; where causal, it computes everything and hides half."""
    shape = VANILLA[pass_.direction]
    measured = published.times(pass_.direction, shape, pass_.dtype)
    if measured is None:
        raise ValueError(f"dtype: no time of vanilla attention is published for {pass_.dtype}")
    rate = Pass(pass_.direction, *shape).flops / measured.vanilla_ms * 1e3
    return pass_._replace(feature="plain").flops / rate


class TrainingReport:
    """The page of one build.

    Args:
        cubins: the kernels.
    """

    def __init__(self, cubins: Cubins) -> None:
        self.file = cubins.file("float32")
        self.predictor = Predictor(cubins, CARD)
        self.models = {name: paper.config.model(VOCABULARY) for name, paper in PAPER_MODELS.items()}

    @cached_property
    def chosen(self) -> list[Lengths]:
        return updates(UPDATES)

    def fused_seconds(self, pass_: Pass, assumptions: ChipAssumptions = USUAL) -> float:
        """The time that a pass is expected to take on the card: the prediction as the calibration corrects it."""
        return self.banded_seconds(pass_, assumptions).centre

    def banded_seconds(self, pass_: Pass, assumptions: ChipAssumptions = USUAL) -> Band:
        """The same with the band of the calibration."""
        seconds = self.predictor.predict(pass_, assumptions).microseconds * 1e-6
        return expected(pass_.direction, CARD).under(seconds)

    def attention(self, name: str, seconds_of: Callable[[Pass], float]) -> float:
        """Seconds per token that attention takes in all layers, over the chosen updates."""
        found = attentions(self.models[name], self.chosen)
        seconds = sum(count * seconds_of(pass_) for one in found for pass_, count in one.passes.items())
        return seconds * PAPER_GPUS / sum(sum(lengths.target) for lengths in self.chosen)

    def works(self, name: str) -> dict[str, Work]:
        """The work of one of eight GPUs for an update, and that of a single one."""
        model, tokens = self.models[name], PAPER_MODELS[name].config.tokens_per_update
        steps = math.ceil(tokens / tokens_that_fit(model, activation_bytes(model, "fp32")))
        return {"one of eight": Work(model, tokens / PAPER_GPUS), "alone": Work(model, tokens, steps)}

    def seconds(self, name: str, where: str, parts: dict[str, float]) -> float:
        """The time of an update: the parts or the host, whichever takes longer, plus the exposed all-reduce."""
        work = self.works(name)[where]
        exposed = estimate(PAPER_MODELS[name].config, CARD_IN_ESTIMATE, PAPER_GPUS, 1, "fp32", VOCABULARY).exposed
        return max(sum(parts.values()), work.host_seconds) + (exposed if where == "one of eight" else 0.0)

    def text(self) -> str:
        """The page."""
        fused = {name: self.attention(name, self.fused_seconds) for name in PAPER_MODELS}
        return TEMPLATE.read_text().format(
            cubin=markdown_table(("file", "sha256"), [(f"`{self.file.name}`", f"`{digest(self.file)}`")]),
            totals=self._totals(fused),
            parts="\n\n".join(self._parts(name, fused[name]) for name in PAPER_MODELS),
            changes=self._changes(fused),
            attention=self._attention(),
            memory=self._memory(),
            all_reduce=self._all_reduce(),
            expected_forward=expected("forward", CARD).shown(),
            expected_backward=expected("backward", CARD).shown(),
            assumptions=markdown_table(("what", "from where"), training_step.SOURCES),
        )

    # ---- the tables

    def _totals(self, fused: dict[str, float]) -> str:
        header = ["model", "P100", "predicted, ms", "the paper, ms", "target tokens/s of a card", "aim", "verdict"]
        header += ["products needed at, TFLOP/s", "attention", "by `estimate.py`", "TensorFlow, measured"]
        lines = []
        for name, paper in PAPER_MODELS.items():
            for where, work in self.works(name).items():
                parts = work.parts(fused[name], CARD)
                seconds = self.seconds(name, where, parts)
                is_alone = where == "alone"
                aim = paper.aim if is_alone else work.tokens / paper.step_seconds
                rate = work.tokens / seconds
                rest = seconds - sum(spent for part, spent in parts.items() if part.startswith("products"))
                coarse = estimate(paper.config, CARD_IN_ESTIMATE, 1 if is_alone else PAPER_GPUS, 1, "fp32", VOCABULARY)
                line = [name, where, f"**{1e3 * seconds:.0f}**", "" if is_alone else f"{1e3 * paper.step_seconds:.0f}"]
                line += [f"**{rate:,.0f}**", f"{aim:,.0f}", verdict(rate, aim)]
                line += [f"{needed_tflops(work, aim, rest):.2f}", f"{100 * parts['attention'] / seconds:.1f} %"]
                line += [f"{coarse.tokens_per_second:,.0f}", f"{paper.tensorflow:,.0f}" if is_alone else ""]
                lines.append(line)
        return markdown_table(header, lines)

    def _parts(self, name: str, attention: float) -> str:
        works = self.works(name)
        parts = {where: work.parts(attention, CARD) for where, work in works.items()}
        columns = []
        for seconds in parts.values():
            total = sum(seconds.values())
            columns.append({part: (f"{1e3 * n:.1f}", f"{100 * n / total:.1f} %") for part, n in seconds.items()})
        first = parts["one of eight"]
        lines = [(part, *columns[0][part], *columns[1][part]) for part in sorted(first, key=lambda part: -first[part])]
        alone = works["alone"]
        described = f"alone, {alone.steps} x {alone.tokens / alone.steps:,.0f} tokens, ms"
        return markdown_table((f"{name}: part", "one of eight, ms", "share", described, "share"), lines)

    def _changes(self, fused: dict[str, float]) -> str:
        half = {name: self.attention(name, lambda p: self.fused_seconds(p, HALF_DRAM)) for name in PAPER_MODELS}
        vanilla = {name: self.attention(name, vanilla_seconds) for name in PAPER_MODELS}
        least = {name: self.attention(name, lambda p: self.banded_seconds(p).low) for name in PAPER_MODELS}
        most = {name: self.attention(name, lambda p: self.banded_seconds(p).high) for name in PAPER_MODELS}
        changes = {
            "as above": (fused, StepAssumptions()),
            "attention as fast as its band allows": (least, StepAssumptions()),
            "attention as slow as its band allows": (most, StepAssumptions()),
            "products 15 % slower": (fused, StepAssumptions(product_rate=0.85)),
            "products 15 % faster": (fused, StepAssumptions(product_rate=1.15)),
            "products at the slower published rates": (fused, StepAssumptions(cublas="squares")),
            "half of DRAM, attention included": (half, StepAssumptions(dram_rate=0.5)),
            "vanilla attention at its published rate": (vanilla, StepAssumptions()),
        }
        lines = []
        for change, (attention, assumed) in changes.items():
            line = [change]
            for name in PAPER_MODELS:
                for where, work in self.works(name).items():
                    seconds = self.seconds(name, where, work.parts(attention[name], CARD, assumed))
                    line += [f"{1e3 * seconds:.0f}", f"{work.tokens / seconds:,.0f}"]
            lines.append(line)
        columns = [f"{name}, {where}" for name in PAPER_MODELS for where in self.works(name)]
        return markdown_table(("", *(f"{column}: {what}" for column in columns for what in ("ms", "tokens/s"))), lines)

    def _attention(self) -> str:
        lines = []
        for name in PAPER_MODELS:
            for longest, pairs, passes in attentions(self.models[name], self.chosen):
                shown = []
                for pass_ in passes:
                    seconds = self.fused_seconds(pass_)
                    shown.append(f"{1e6 * seconds:.0f} ({pass_.flops / seconds * 1e-12:.2f})")
                vanilla = sum(count * vanilla_seconds(pass_) for pass_, count in passes.items())
                ours = sum(count * self.fused_seconds(pass_) for pass_, count in passes.items())
                lines.append((name, f"{longest}", f"{pairs}", *shown, f"{1e3 * ours:.1f}", f"{1e3 * vanilla:.1f}"))
        columns = ("forward", "forward, causal", "backward", "backward, causal")
        return markdown_table(("model", "ids", "pairs", *columns, "all layers, ms", "vanilla, ms"), lines)

    def _memory(self) -> str:
        columns = []
        for name, model in self.models.items():
            tokens, parameters = PAPER_MODELS[name].config.tokens_per_update, count_parameters(model)
            kept, stored, logits = (
                activation_bytes(model, "fp32"),
                self.stored_weights(name),
                2 * 4.0 * model.vocab_size,
            )
            sizes = {
                "weights, gradients, Adam": 16 * parameters,
                "context, libraries, a chunk of logits": OVERHEAD_BYTES,
                "activations of 3,125 tokens": kept * tokens / PAPER_GPUS,
                "activations of 25,000 tokens": kept * tokens,
                "vanilla: attention weights of 25,000 tokens more": stored * tokens,
                "whole logits and their gradient, of 25,000 tokens, more": logits * tokens,
            }
            per_token = {
                "tokens that fit": kept,
                "tokens that fit if attention weights are stored": kept + stored,
                "tokens that fit if whole logits are stored as well": kept + stored + logits,
            }
            shown = {what: f"{size / 1e9:.2f} GB" for what, size in sizes.items()}
            shown |= {what: f"{tokens_that_fit(model, n):,.0f}" for what, n in per_token.items()}
            columns.append(shown)
        return markdown_table(("", *PAPER_MODELS), [(what, *(shown[what] for shown in columns)) for what in columns[0]])

    def stored_weights(self, name: str) -> float:
        """Bytes per token of the attention weights that vanilla attention stores."""
        stored = sum(
            len(lengths.source) * stored_weights_bytes(self.models[name], max(lengths.source), max(lengths.target))
            for lengths in self.chosen
        )
        return stored / sum(sum(lengths.target) for lengths in self.chosen)

    def _all_reduce(self) -> str:
        lines = []
        for name, paper in PAPER_MODELS.items():
            gigabytes = 2 * (PAPER_GPUS - 1) / PAPER_GPUS * 4 * count_parameters(self.models[name]) / 1e9
            for gpu in (CARD_IN_ESTIMATE, "P100 PCIe"):
                run = estimate(paper.config, gpu, PAPER_GPUS, 1, "fp32", VOCABULARY)
                link = "NVLink" if gpu == CARD_IN_ESTIMATE else "PCIe"
                shown = (f"{1e3 * run.all_reduce:.1f}", f"{1e3 * run.exposed:.1f}")
                lines.append((name, f"{link}, {GPUS[gpu].link / 1e9:g} GB/s", f"{gigabytes:.2f}", *shown))
        return markdown_table(("model", "by", "GB sent by a card", "ms", "not hidden, ms"), lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.p100.training_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kernel-dir", type=Path, default=INSTALLED, help="cubins (default: the installed ones)")
    parser.add_argument("--out", type=Path, default=DOCS / "p100_training.md", help="the page to write")
    options = parser.parse_args(arguments)
    options.out.write_text(TrainingReport(Cubins(options.kernel_dir)).text())
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
