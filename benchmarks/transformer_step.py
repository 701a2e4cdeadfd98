"""Times training steps of the paper's models on batches of WMT's sentence lengths, part by part.

    python -m benchmarks.transformer_step          on a GPU; --quick for a minute, --smoke on any machine

The rungs of a ladder, each with one more part than the one before: torch.nn.Transformer; fastattn's model on torch's
attention; with fused attention; without padding; with the loss in chunks. A step is forward, loss, backward and Adam on
an update of at most 25,000 ids a side (500 on a CPU). Tokens are source and target ids without padding. Writes
transformer_step.csv and .json, with the days that the paper's number of updates would take.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastattn
from benchmarks.cases import precisions, short
from benchmarks.command import Command, parse
from benchmarks.gate import MAX_SUM_OFF, Wrong, off_by
from benchmarks.lengths import Lengths, updates
from benchmarks.result_table import ResultTable
from benchmarks.timing import peak_memory_mib, time_once
from benchmarks.torch_model import TorchTransformer
from fastattn import Transformer, TransformerConfig
from fastattn.nmt.layout import pack
from fastattn.nmt.losses import label_smoothed_cross_entropy

COLUMNS = (
    "model",
    "precision",
    "rung",
    "tokens_per_s",
    "step_ms",
    "peak_memory_mib",
    "paper_days",
    "no_numbers_because",
)
PAPER_UPDATES = {"base": 100_000, "big": 300_000}
PAPER_TOKENS = 50_000  # of both sides of an update, by section 5.1
FIRST_ID = 3
# Decoder states have passed through some forty matrix products; without a mask they are off by a tenth of their norm.
MAX_ROUNDINGS = 4
MAX_LOSS_OFF = 0.01
CHECKED_SENTENCES = 64

TrainedModel = Transformer | TorchTransformer
TrainingBatch = tuple[Any, Any, Tensor]  # source and target as the model takes them, and the ids that the loss wants


def whole_logits(model: TrainedModel, hidden: Tensor, target: Tensor) -> Tensor:
    """torch's loss, of logits that are all there at once."""
    logits = F.linear(hidden, model.output_weight()).float().flatten(0, -2)
    smoothing = model.config.label_smoothing
    return F.cross_entropy(logits, target.flatten(), ignore_index=model.config.pad_id, label_smoothing=smoothing)


def chunked_logits(model: TrainedModel, hidden: Tensor, target: Tensor) -> Tensor:
    """fastattn's loss."""
    sums = label_smoothed_cross_entropy(hidden, model.output_weight(), target, model.config.label_smoothing)
    return sums.loss / sums.num_tokens


class Rung(NamedTuple):
    """One way to train."""

    name: str
    make: Callable[[TransformerConfig], TrainedModel]
    attention: Callable[[], AbstractContextManager[Any]]
    is_packed: bool
    loss: Callable[[TrainedModel, Tensor, Tensor], Tensor]


LADDER = (
    Rung("torch.nn.Transformer", TorchTransformer, nullcontext, False, whole_logits),
    Rung("torch's attention", Transformer, partial(fastattn.use_backend, "torch"), False, whole_logits),
    Rung("+ fused attention", Transformer, nullcontext, False, whole_logits),
    Rung("+ no padding", Transformer, nullcontext, True, whole_logits),
    Rung("+ chunked loss", Transformer, nullcontext, True, chunked_logits),
)


def padded_ids(lengths: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Random ids (batch, longest) in sentences of these lengths, each ended by id 1; the same every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    words = [torch.randint(FIRST_ID, vocab_size, (n - 1,), generator=generator, device="cpu") for n in lengths]
    return pad_sequence([F.pad(sentence, (0, 1), value=1) for sentence in words], batch_first=True).to(device)


def batch_of(lengths: Lengths, vocab_size: int, is_packed: bool, device: torch.device) -> TrainingBatch:
    """Random sentences of these lengths."""
    source, target = (padded_ids(side, vocab_size, device) for side in lengths)
    if not is_packed:
        return source, target, target
    packed = pack(source), pack(target)
    return *packed, packed[1].tokens


def check(
    rung: Rung, config: TransformerConfig, precision: torch.dtype, lengths: Lengths, device: torch.device
) -> None:
    """Compares decoder states and loss of one batch, without dropout, with those of the reference in float32.

    Raises:
        Wrong: they differ by more than rounding and, in the loss, label smoothing's two rules for the true id.
    """
    config = replace(config, dropout=0.0)
    lengths = Lengths(*(side[:CHECKED_SENTENCES] for side in lengths))
    with torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        exact = Transformer(config)
        model = rung.make(config)
        if isinstance(model, TorchTransformer):
            model.copy_from(exact)
        else:
            model.load_state_dict(exact.state_dict())
        source, target, wanted = batch_of(lengths, config.vocab_size, False, device)
        is_token = target != config.pad_id
        with fastattn.use_backend("reference"):
            states = exact.hidden(source, target)
            expected = states[is_token], whole_logits(exact, states, wanted)
        source, target, wanted = batch_of(lengths, config.vocab_size, rung.is_packed, device)
        with rung.attention(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            states = model.hidden(source, target)
            actual = states if rung.is_packed else states[is_token], rung.loss(model, states, wanted)
    allowed = MAX_ROUNDINGS * torch.finfo(precision).eps + MAX_SUM_OFF, MAX_LOSS_OFF
    for name, ours, theirs, most in zip(("states", "loss"), actual, expected, allowed, strict=True):
        off = off_by(ours, theirs)
        if not off <= most:
            raise Wrong(f"{name} off by {off:.1e} of their norm, allowed are {most:.1e}")


def measure(
    rung: Rung, config: TransformerConfig, precision: torch.dtype, chosen: list[Lengths], command: Command
) -> dict[str, Any]:
    """The columns with numbers, over one step of each update."""
    device = command.device
    check(rung, config, precision, chosen[0], device)
    with torch.device(device):
        model = rung.make(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-9)

    def step(batch: TrainingBatch) -> None:
        source, target, wanted = batch
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = rung.loss(model, model.hidden(source, target), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = [batch_of(lengths, config.vocab_size, rung.is_packed, device) for lengths in chosen]
    with rung.attention():
        memory = max(peak_memory_mib(partial(step, batch), device) or 0 for batch in batches)  # warms up as well
        repetitions = command.sized(2, 3, 10)
        times = [time_once(partial(step, batch), device, repetitions).p50_ms for batch in batches]
    return {
        "tokens_per_s": round(1e3 * sum(lengths.tokens() for lengths in chosen) / sum(times)),
        "step_ms": f"{statistics.mean(times):.2f}",
        "peak_memory_mib": memory or None,
    }


def models(command: Command) -> dict[str, TransformerConfig]:
    """The paper's models, without the table of target languages, which torch's model does not have."""
    if command.size == "smoke":
        tiny = TransformerConfig(50, 16, 32, 2, num_encoder_layers=1, num_decoder_layers=1, num_target_spaces=0)
        return {"tiny": tiny}
    paper = {"base": TransformerConfig.base(), "big": TransformerConfig.big()}
    return {name: replace(config, num_target_spaces=0) for name, config in paper.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("transformer_step", "Time training steps.", arguments)
    if command is None:
        return 1
    device = command.device
    tokens = 300 if command.size == "smoke" else 500 if device.type == "cpu" else 25_000
    chosen = updates(command.sized(1, 2, 6), tokens)
    print(f"{'model':<6}{'precision':<10}{'':<24}{'tokens/s':>10}{'ms/step':>10}{'MiB':>10}{'days':>8}")
    with ResultTable(command, "transformer_step", COLUMNS, tokens_per_side=tokens) as table:
        for name, config in models(command).items():
            for precision in precisions(device):
                for rung in LADDER:
                    described = {"model": name, "precision": short(precision), "rung": rung.name}
                    if command.wants(*described.values()):
                        table.add(**described, **numbers(name, rung, config, precision, chosen, command))
                        print_row(table.rows[-1])
    return 0


def numbers(
    name: str, rung: Rung, config: TransformerConfig, precision: torch.dtype, chosen: list[Lengths], command: Command
) -> dict[str, Any]:
    """The columns of a rung, or why it has none."""
    try:
        row = measure(rung, config, precision, chosen, command)
    except torch.OutOfMemoryError:
        row = {"no_numbers_because": "out of memory"}
    except Wrong as error:
        row = {"no_numbers_because": f"wrong: {error}"}
    gc.collect()
    if command.device.type == "cuda":
        torch.cuda.empty_cache()
    if "tokens_per_s" in row:
        row["paper_days"] = paper_days(name, row["tokens_per_s"])
    return row


def paper_days(model: str, tokens_per_s: float) -> str | None:
    """The days of the paper's updates at this speed; None if the model is not one of the paper's."""
    if model not in PAPER_UPDATES:
        return None
    return f"{PAPER_UPDATES[model] * PAPER_TOKENS / tokens_per_s / 86_400:.2f}"


def print_row(row: dict[str, str]) -> None:
    """Prints one line of the table."""
    print(f"{row['model']:<6}{row['precision']:<10}{row['rung']:<24}", end="")
    print(f"{row['tokens_per_s']:>10}{row['step_ms']:>10}{row['peak_memory_mib']:>10}{row['paper_days']:>8}", end="")
    print(f"  {row['no_numbers_because']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
