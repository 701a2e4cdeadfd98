"""Times beam search: with cached keys and values, with everything computed again at each step, and with torch's layers.

    python -m benchmarks.decode          on a GPU; --smoke for tiny cases on any machine

The paper's search (beam 4, alpha 0.6, at most 50 ids more than the source), the paper's models with random parameters,
the same in all ways, which must find the same translations before a time counts. Random models seldom end a sentence,
so that most grow to the greatest length. Half precision is timed where float32 was right. Tokens are those of the
translations. Writes decode.csv and decode.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from benchmarks.cases import precisions, short
from benchmarks.command import Command, parse
from benchmarks.result_table import ResultTable
from benchmarks.torch_model import TorchTransformer
from benchmarks.transformer_step import models, padded_ids
from fastattn import Transformer, TransformerConfig
from fastattn.nmt.cache import DecoderCache
from fastattn.nmt.generation import Hypothesis, MakeDecoder, beam_search
from fastattn.nmt.layout import Padded
from fastattn.nmt.transformer import TeacherForcing

COLUMNS = (
    "model",
    "precision",
    "way",
    "backend",
    "sentences",
    "beam_size",
    "tokens",
    "tokens_per_s",
    "seconds",
    "no_numbers_because",
)
SOURCE_LENGTH = 30
BEAM_SIZE = 4
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]  # prefix, memory, source -> decoder states
MAX_DIFFERENT = 0.1  # of the translations, where rounding decides between near equals


class Recomputing:
    """A `StepwiseDecoder` without a cache: each step runs the decoder over all positions so far."""

    def __init__(self, model: Transformer, decode: Decode, memory: Tensor, source: Tensor) -> None:
        self.model, self.decode, self.memory, self.source = model, decode, memory, source
        self.prefix: Tensor | None = None  # (sentences * beam, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits that follow the newest decoder inputs, as `StepwiseDecoder.step` describes."""
        newest = tokens.flatten()[:, None]
        self.prefix = newest if self.prefix is None else torch.cat([self.prefix, newest], dim=1)
        beams = (x.repeat_interleave(tokens.shape[1], 0) for x in (self.memory, self.source))
        return self.model.logits(self.decode(self.prefix, *beams)[:, -1]).unflatten(0, tokens.shape)

    def select(self, hypotheses: Tensor, sentences: Tensor | None = None) -> None:
        """Keep some of the hypotheses and of the sentences, as `StepwiseDecoder.select` describes."""
        assert self.prefix is not None
        self.prefix = self.prefix[hypotheses]
        if sentences is not None:
            self.memory, self.source = self.memory[sentences], self.source[sentences]


def recompute(model: Transformer, source: Tensor, target_space: int = 0) -> Recomputing:
    """The decoder of fastattn's model, without a cache."""

    def decode(prefix: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        target, keys = Padded(prefix, model.config.pad_id), Padded(source, model.config.pad_id)
        contexts = [TeacherForcing(target, keys, memory)] * len(model.decoder)
        return model.decode(prefix, target.positions, prefix.shape[1], contexts)

    return Recomputing(model, decode, model.encode(source, target_space), source)


def with_torch(model: Transformer) -> MakeDecoder:
    """A maker of decoders of torch's layers, with the parameters of the model."""
    theirs = TorchTransformer(model.config).copy_from(model).to(model.embedding.weight).eval()
    return lambda model, source, target_space: Recomputing(model, theirs.decode, theirs.encode(source), source)


class Way(NamedTuple):
    """One way to decode."""

    name: str
    attention: Callable[[], AbstractContextManager[Any]]
    cache: Callable[[Transformer], MakeDecoder]  # for a model, the cache that beam_search is given


WAYS = (
    Way("fastattn, cached", nullcontext, lambda model: DecoderCache),
    Way("torch's attention, cached", partial(fastattn.use_backend, "torch"), lambda model: DecoderCache),
    Way("fastattn, recomputed", nullcontext, lambda model: recompute),
    Way("torch.nn.Transformer, recomputed", nullcontext, with_torch),
)


def search(way: Way, model: Transformer, source: Tensor, extra: int) -> tuple[list[list[Hypothesis]], float]:
    """The translations, and the seconds they took."""
    cache = way.cache(model)
    with way.attention():
        _wait(source)
        start = time.perf_counter()
        found = beam_search(model, source, BEAM_SIZE, max_extra_tokens=extra, cache=cache)
        _wait(source)
        return found, time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def best(found: list[list[Hypothesis]]) -> list[list[int]]:
    """The ids of each sentence's best translation."""
    return [hypotheses[0].tokens for hypotheses in found]


def share_of_others(way: Way, model: Transformer, source: Tensor, extra: int) -> float:
    """The share of the translations, in float32, that are not those of the reference."""
    with fastattn.use_backend("reference"):
        expected = best(beam_search(model, source, BEAM_SIZE, max_extra_tokens=extra))
    actual = best(search(way, model, source, extra)[0])
    return sum(a != b for a, b in zip(actual, expected, strict=True)) / len(expected)


def measure(
    ways: list[Way], model: Transformer, source: Tensor, extra: int, repetitions: int
) -> dict[str, dict[str, Any]]:
    """The columns of a row that are measured, by way; the ways take turns, and medians count."""
    for way in ways:
        search(way, model, source, min(extra, 2))  # warm up
    turns = [[search(way, model, source, extra) for way in ways] for _ in range(repetitions)]
    columns = {}
    for way, runs in zip(ways, zip(*turns, strict=True), strict=True):
        tokens = sum(len(sentence) + 1 for sentence in best(runs[0][0]))
        seconds = statistics.median(seconds for _, seconds in runs)
        columns[way.name] = {
            "tokens": tokens,
            "tokens_per_s": round(tokens / seconds),
            "seconds": f"{seconds:.3f}",
            "backend": backend_of(way, model),
        }
    return columns


def backend_of(way: Way, model: Transformer) -> str:
    """The backend that the model's attention runs on in that way; none in torch's layers."""
    if way.cache is with_torch:
        return ""
    parameter, config = model.embedding.weight, model.config
    q = parameter.new_zeros(1, config.num_heads, 1, config.d_model // config.num_heads)
    with way.attention():
        return fastattn.explain(q, q, q).backend


def rows(command: Command, name: str, config: TransformerConfig) -> Iterator[dict[str, Any]]:
    """The rows of one model: every way in float32, and in half precision those that were right in float32."""
    device = command.device
    sentences, extra = command.sized((3, 5), *[(64, 50) if device.type == "cuda" else (2, 5)] * 2)
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config).eval()
    source = padded_ids((SOURCE_LENGTH,) * sentences, config.vocab_size, device)
    described = {"model": name, "sentences": sentences, "beam_size": BEAM_SIZE}
    wanted = [(p, way) for p in precisions(device) for way in WAYS if command.wants(name, short(p), way.name)]
    off = {way.name: share_of_others(way, model, source, extra) for way in {way for _, way in wanted}}
    for precision, group in groupby(wanted, key=itemgetter(0)):
        ways = [way for _, way in group]
        right = [way for way in ways if off[way.name] <= MAX_DIFFERENT]
        measured = measure(right, model.to(precision), source, extra, command.sized(1, 1, 5)) if right else {}
        for way in ways:
            reason = f"wrong: {off[way.name]:.0%} of the translations are not those of the reference"
            columns = measured.get(way.name, {"no_numbers_because": reason})
            yield described | {"precision": short(precision), "way": way.name} | columns


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    command = parse("decode", "Time beam search.", arguments)
    if command is None:
        return 1
    chosen = models(command)
    if command.device.type == "cpu" or command.size == "quick":
        chosen.pop("big", None)
    with ResultTable(command, "decode", COLUMNS, source_length=SOURCE_LENGTH) as table:
        for name, config in chosen.items():
            for row in rows(command, name, config):
                table.add(**row)
                result = row.get("no_numbers_because") or f"{row['tokens_per_s']} tokens/s, {row['seconds']} s"
                print(f"{name:<6}{row['precision']:<10}{row['way']:<34}{result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
