"""The attention calls that are timed on a CPU: suites of about 4,000 tokens, in 8 heads of 64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch

from benchmarks import cases, lengths
from benchmarks.cases import AttentionCase, of_updates, square

TOKENS, NHEADS, HEAD_DIM = 4_000, 8, 64
LONGEST = (22, 37, 58, 82)  # sentences of the batches of WMT
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# The call of a batch of sentences with dropout, by the one without.
WITH_DROPOUT = {"none": "dropout", "padding": "padding-dropout", "causal": "causal-dropout"}
DECODING = tuple(product((64, 512), (1, 2, 3, 4), (30, 70, 500)))  # batch * nheads, queries, keys
MEMORY_SEQLEN = 16_384


def sentences(dtype: torch.dtype, longest: Iterable[int] = LONGEST) -> list[AttentionCase]:
    """The three attentions of a Transformer on batches of sentences of similar length, padded and packed."""
    among = lengths.every_update()
    return list(of_updates([lengths.longest_up_to(n, TOKENS, among) for n in longest], [dtype], NHEADS))


def with_dropout(plain: Iterable[AttentionCase]) -> Iterator[AttentionCase]:
    """The same batches in a suite of their own; cross-attention, which costs what the encoder's does, is left out."""
    for case in plain:
        if not case.workload.startswith("cross"):
            yield replace(case, suite="wmt-dropout", mask=WITH_DROPOUT[case.mask])


def long(dtype: torch.dtype, seqlens: Iterable[int] = (512, 2048)) -> Iterator[AttentionCase]:
    """Long rows."""
    for seqlen, mask in product(seqlens, ("none", "causal", "dropout")):
        yield square("long", 4096 // seqlen, NHEADS, seqlen, HEAD_DIM, mask, dtype)


def decoding(sizes: Iterable[tuple[int, int, int]] = DECODING) -> Iterator[AttentionCase]:
    """Few queries against the keys so far, as a search calls it."""
    for heads, seqlen_q, seqlen_k in sizes:
        case = square("decode", heads // NHEADS, NHEADS, seqlen_k, HEAD_DIM, "none", FLOAT32)
        yield replace(case, workload="search", seqlen_q=seqlen_q)


def every_case() -> list[AttentionCase]:
    """All that is timed with the CPU's best instruction set."""
    batches = sentences(FLOAT32)
    scores = [square("masks", 16, NHEADS, 82, HEAD_DIM, mask, FLOAT32) for mask in ("padding", "bool", "bias")]
    halves = [case for case in sentences(BFLOAT16, (22, 82)) if not case.workload.startswith("cross")]
    return [
        *(*batches, *with_dropout(batches), *scores, *long(FLOAT32)),
        *(*halves, *long(BFLOAT16, [512]), *decoding()),
    ]


def quick_cases() -> list[AttentionCase]:
    """A few of every suite."""
    batches = [case for case in sentences(FLOAT32, (22, 58)) if not case.workload.startswith("cross")]
    scores = [square("masks", 16, NHEADS, 82, HEAD_DIM, mask, FLOAT32) for mask in ("bool", "bias")]
    halves = [case for case in sentences(BFLOAT16, [37]) if case.workload.startswith("encoder")]
    return [
        *batches,
        *with_dropout(case for case in batches if case.seqlen_k == 22),
        *scores,
        *long(FLOAT32, [512]),
        *halves,
        *decoding(DECODING[:3]),
    ]


def smoke_cases() -> list[AttentionCase]:
    """Tiny cases, with every mask and layout."""
    tiny = cases.smoke_cases()
    batches = [case for case in tiny if case.suite == "wmt"]
    return [*tiny, *with_dropout(batches), *decoding([(8, 2, 5)])]


def held_to(isa: str, plain: Iterable[AttentionCase]) -> list[AttentionCase]:
    """The float32 batches of sentences, in a suite for an instruction set that all are held to."""
    return [replace(case, suite=f"wmt-{isa}") for case in plain if case.suite == "wmt" and case.dtype == FLOAT32]


def memory(seqlen: int = MEMORY_SEQLEN) -> AttentionCase:
    """One head so long that its scores would take 1 GiB."""
    return square("memory", 1, 1, seqlen, HEAD_DIM, "none", FLOAT32)
