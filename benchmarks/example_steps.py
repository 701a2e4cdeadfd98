"""Times training steps of the examples' models on a CPU: padded and packed, attention by torch and by the CPU kernels.

    python -m benchmarks.example_steps --device cpu          two minutes; --quick for one, --smoke for seconds

The models of examples/quickstart.py and of multi30k_fast in examples/wmt14, on batches of the lengths that they train
on. A step is forward, loss in chunks, backward and Adam; its time is what one thread worked, the median of steps that
take turns. States and loss are first compared with the reference. Writes example_steps.csv and .json.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

import fastattn
from benchmarks.cases import short
from benchmarks.command import Command, parse
from benchmarks.cpu_rates import CPU, using_threads
from benchmarks.gate import Wrong
from benchmarks.lengths import Lengths
from benchmarks.result_table import ResultTable
from benchmarks.timing import PassTime, TimedCall, cpu_clock, time_in_turns
from benchmarks.transformer_step import Rung, batch_of, check, chunked_logits
from fastattn import Transformer, TransformerConfig

COLUMNS = (
    *("example", "precision", "way", "backend", "layout", "step_ms", "p20_ms", "p80_ms", "tokens_per_s"),
    *("before", "saved_percent", "wanted_percent", "verdict", "no_numbers_because"),
)
WAYS = tuple(
    Rung(
        f"{backend}, {layout}", Transformer, partial(fastattn.use_backend, backend), layout == "packed", chunked_logits
    )
    for backend in ("torch", "cpu")
    for layout in ("padded", "packed")
)
NEW = "cpu, packed"


class Sentences(NamedTuple):
    """A batch of sentence pairs with lengths of a normal distribution."""

    pairs: int
    source: float  # mean length of a side
    target: float
    deviation: float

    def draw(self, seed: int) -> Lengths:
        """The lengths, the same for the same seed."""
        rng = random.Random(seed)
        source, target = (
            tuple(max(6, round(rng.gauss(mean, self.deviation))) for _ in range(self.pairs))
            for mean in (self.source, self.target)
        )
        return Lengths(source, target)


class Example(NamedTuple):
    """A model and what it trains on."""

    config: TransformerConfig
    batches: tuple[Sentences, ...]
    precisions: tuple[torch.dtype, ...]
    before: str  # the way in which it trained before there were CPU kernels
    wanted_percent: float  # of the time of that, which the CPU kernels have to save


EXAMPLES = {
    "quickstart": Example(
        TransformerConfig(
            368, 96, 384, 4, num_encoder_layers=2, num_decoder_layers=2, dropout=0.0, num_target_spaces=0
        ),
        (Sentences(54, 17, 19.5, 1.3), Sentences(38, 25, 27.5, 1.4), Sentences(33, 30, 34, 1.4)),
        (torch.float32,),
        "torch, padded",
        15,
    ),
    "multi30k_fast": Example(
        TransformerConfig(
            4000, 128, 512, 4, num_encoder_layers=2, num_decoder_layers=2, norm="pre", num_target_spaces=0
        ),
        tuple(Sentences(88, 26, 28, deviation) for deviation in (2, 3, 4)),
        (torch.float32, torch.bfloat16),
        "torch, packed",
        30,
    ),
}  # fmt: skip


def training_step(
    way: Rung, model: Transformer, optimizer: torch.optim.Optimizer, precision: torch.dtype, lengths: Lengths
) -> Callable[[], None]:
    """A step on a batch of these lengths."""
    source, target, wanted = batch_of(lengths, model.config.vocab_size, way.is_packed, CPU)

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = way.loss(model, model.hidden(source, target), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(
    example: Example, precision: torch.dtype, ways: list[Rung], command: Command
) -> tuple[dict[str, PassTime], float]:
    """The times of a step, by way, all batches in a row, and the tokens of such a step."""
    torch.manual_seed(0)
    model = Transformer(example.config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-9, fused=True)
    chosen = [batch.draw(seed) for seed, batch in enumerate(example.batches)][: command.sized(1, 2, 3)]
    calls = {}
    for way in ways:
        steps = [training_step(way, model, optimizer, precision, lengths) for lengths in chosen]
        calls[way.name] = TimedCall(partial(_run_all, steps), context=way.attention)
    seconds, least = command.sized((0.0, 2), (6.0, 5), (25.0, 7))
    times = time_in_turns(calls, cpu_clock(1), seconds, least)
    means = {name: PassTime(*(ms / len(chosen) for ms in passes["forward"])) for name, passes in times.items()}
    return means, sum(lengths.tokens() for lengths in chosen) / len(chosen)


def _run_all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def right_ways(example: Example, precision: torch.dtype, ways: list[Rung]) -> tuple[list[Rung], dict[str, str]]:
    """The ways with right results, and of the others, by name, why they have none."""
    right, reasons = [], {}
    for way in ways:
        try:
            check(way, example.config, precision, example.batches[0].draw(0), CPU)
            right.append(way)
        except Wrong as error:
            reasons[way.name] = f"wrong: {error}"
        except NotImplementedError as error:
            reasons[way.name] = f"unavailable: {error}"
    return right, reasons


def verdict(example: Example, times: dict[str, PassTime]) -> dict[str, Any]:
    """What the new way saves of the time of the one before, and whether that is enough."""
    if NEW not in times or example.before not in times:
        return {}
    saved = 100 * (1 - times[NEW].p50_ms / times[example.before].p50_ms)
    return {
        "before": example.before,
        "saved_percent": f"{saved:.1f}",
        "wanted_percent": example.wanted_percent,
        "verdict": "reached" if saved >= example.wanted_percent else "missed",
    }


def rows(name: str, precision: torch.dtype, command: Command) -> list[dict[str, Any]]:
    """The rows of one example in one precision."""
    example = EXAMPLES[name]
    wanted = [way for way in WAYS if command.wants(name, short(precision), way.name)]
    if command.size == "smoke":
        example = example._replace(
            config=replace(example.config, vocab_size=50, d_model=16, d_ff=32),
            batches=(Sentences(4, 7, 8, 1.0),),
        )
    right, reasons = right_ways(example, precision, wanted)
    times, tokens = measure(example, precision, right, command) if right else ({}, 0)
    found = []
    for way in wanted:
        backend, layout = way.name.split(", ")
        row = {"example": name, "precision": short(precision), "way": way.name, "backend": backend, "layout": layout}
        if way.name in reasons:
            row["no_numbers_because"] = reasons[way.name]
        else:
            time = times[way.name]
            row |= {"step_ms": f"{time.p50_ms:.2f}", "p20_ms": f"{time.p20_ms:.2f}", "p80_ms": f"{time.p80_ms:.2f}"}
            row["tokens_per_s"] = str(round(1e3 * tokens / time.p50_ms))
        found.append(row | (verdict(example, times) if way.name == NEW else {}))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("example_steps", "Time training steps of the examples.", arguments)
    if command is None:
        return 1
    if command.device.type != "cpu":
        print("only a CPU's steps are timed here: give --device cpu; nothing was measured", file=sys.stderr)
        return 1
    with using_threads(1), ResultTable(command, "example_steps", COLUMNS) as table:
        for name, example in EXAMPLES.items():
            for precision in example.precisions:
                for row in rows(name, precision, command):
                    table.add(**row)
                    print_row(table.rows[-1])
    return 0


def print_row(row: dict[str, str]) -> None:
    """Prints one line of the table."""
    timed = f"{row['step_ms']:>9} ms{row['tokens_per_s']:>8} tokens/s" if row["step_ms"] else row["no_numbers_because"]
    saved = f"  {row['saved_percent']} % less than {row['before']}" if row["saved_percent"] else ""
    wanted = f" ({row['wanted_percent']} wanted: {row['verdict']})" if row["verdict"] else ""
    print(f"{row['example']:<15}{row['precision']:<10}{row['way']:<15}{timed}{saved}{wanted}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
