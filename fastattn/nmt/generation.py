"""Translation with a trained Transformer: greedy and beam search with cached keys and values.

The beam search is that of the paper's authors' first code. Each step extends every hypothesis of a sentence by one id
and looks at the 2 * beam_size most probable extensions: those that end the sentence are finished, scored, and kept if
they are among the best; the beam_size most probable others live on. A finished hypothesis Y of |Y| ids, the end of
sentence included, scores log P(Y) over a length penalty, ((5 + |Y|) / 6)^alpha unless another is asked for. The most a
living one can still score is its log P so far over the penalty of the greatest length; when no finished hypothesis to
be returned is worse than that, the sentence is complete and leaves the batch. At the greatest length only the end of
sentence may follow, so every hypothesis returned is a whole sentence with its true probability. Of equal candidates the
first in the order (hypothesis, id) wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modules import MultiHeadAttention
from .cache import DecoderCache, StepwiseDecoder
from .config import TransformerConfig
from .layout import Padded
from .transformer import TeacherForcing, Transformer

MakeDecoder = Callable[[Transformer, Tensor, int], StepwiseDecoder]  # model, source, target_space


class Hypothesis(NamedTuple):
    """One translation of a sentence."""

    tokens: list[int]  # without the end of sentence
    score: float  # log-probability in nats, end of sentence included, over the length penalty
    attention: Tensor | None = None  # (layers, heads, target, source) weights of cross-attention; one row per token


class _Recorder(TeacherForcing):
    """Teacher forcing that keeps the weights of the cross-attention."""

    source: Padded
    weights: Tensor

    def attend_memory(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        padding = self.source.key_padding_mask
        out, self.weights = attention(x, self.memory, self.memory, padding, average_attn_weights=False)
        return out


def cross_attention_weights(model: Transformer, source: Tensor, target: Tensor, target_space: int = 0) -> Tensor:
    """The weights (batch, layers, heads, target, source) that each target id, when predicted, gave to the source.

    Args:
        model: in evaluation mode.
        source, target: (batch, length) int64 ids, padding on the right.
        target_space: as in `Transformer.hidden`.
    """
    pad_id = model.config.pad_id
    source_layout, target_layout = Padded(source, pad_id), Padded(target, pad_id)
    memory = model.encode(source, target_space)
    recorders = [_Recorder(target_layout, source_layout, memory) for _ in model.decoder]
    decoder_input = target_layout.shift_right(model.config.bos_id)
    model.decode(decoder_input, target_layout.positions, target_layout.max_seqlen, recorders)
    return torch.stack([recorder.weights for recorder in recorders], dim=1)


# ---- search ----


def length_penalty(length: int | Tensor, alpha: float, kind: str = "paper") -> Any:
    """The divisor of the log-probability of a hypothesis of `length` ids.

    Args:
        length: |Y|, the end of sentence included.
        alpha: exponent.
        kind: "paper" for ((5 + |Y|) / 6)^alpha (Wu et al., 2016, equation 14), or "length" for |Y|^alpha, which other
            toolkits take; with alpha 1 that is the mean log-probability.
    """
    return ((5 + length) / 6) ** alpha if kind == "paper" else length**alpha


class _Search:
    """The beams of all sentences that are not complete yet.

    Args:
        max_lengths: (sentences,) int64, the most ids of a hypothesis, its end of sentence included.
        beam_size: living hypotheses of a sentence.
        num_candidates: extensions considered at each step.
        num_hypotheses: finished hypotheses kept.
        penalty: `length_penalty` of a length.
    """

    def __init__(
        self,
        config: TransformerConfig,
        max_lengths: Tensor,
        beam_size: int,
        num_candidates: int,
        num_hypotheses: int,
        penalty: Callable[[Any], Any],
    ) -> None:
        self.config, self.max_lengths = config, max_lengths
        self.beam_size, self.num_candidates, self.penalty = beam_size, num_candidates, penalty
        sentences, device = max_lengths.shape[0], max_lengths.device
        self.results: list[list[Hypothesis]] = [[] for _ in range(sentences)]
        self.sentences = torch.arange(sentences, device=device)
        self.tokens = torch.full((sentences, beam_size, 1), config.bos_id, device=device)
        self.log_probs = torch.full((sentences, beam_size), -torch.inf, device=device)
        self.log_probs[:, 0] = 0.0  # all hypotheses are the empty one: count it once
        self.finished_tokens = torch.full((sentences, num_hypotheses, 1), config.bos_id, device=device)
        self.finished_scores = torch.full((sentences, num_hypotheses), -torch.inf, device=device)

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extend every hypothesis by one id, given `logits` (sentences, beam, vocab_size).

        Returns:
            The arguments of `StepwiseDecoder.select`: the hypotheses that the new ones extend, and the sentences that
            are not complete yet.
        """
        length = self.tokens.shape[2]
        is_last = self.max_lengths <= length
        log_probs = self._extension_log_probs(logits, is_last)
        candidates, columns = _top(log_probs.flatten(1), self.num_candidates)
        parents, ids = columns // log_probs.shape[2], columns % log_probs.shape[2]
        tokens = torch.cat([_take(self.tokens, parents), ids[..., None]], dim=2)
        ends = ids == self.config.eos_id
        self._finish(tokens, candidates.masked_fill(~ends, -torch.inf) / self.penalty(length))
        self.log_probs, living = _top(candidates.masked_fill(ends, -torch.inf), self.beam_size)
        self.tokens = _take(tokens, living)
        hypotheses = parents.gather(1, living)
        hypotheses += torch.arange(hypotheses.shape[0], device=hypotheses.device)[:, None] * self.beam_size
        reachable = self.log_probs[:, 0] / self.penalty(self.max_lengths)
        return self._drop_complete(is_last | (self.finished_scores[:, -1] >= reachable), hypotheses)

    def _extension_log_probs(self, logits: Tensor, is_last: Tensor) -> Tensor:
        """Log-probabilities (sentences, beam, vocab_size) of all hypotheses, each extended by every id."""
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        log_probs[..., self.config.pad_id] = -torch.inf
        if is_last.any():
            end = log_probs[is_last, :, self.config.eos_id]
            log_probs[is_last] = -torch.inf
            log_probs[is_last, :, self.config.eos_id] = end
        return log_probs.add_(self.log_probs[..., None])

    def _finish(self, tokens: Tensor, scores: Tensor) -> None:
        scores = torch.cat([self.finished_scores, scores], dim=1)
        tokens = torch.cat([F.pad(self.finished_tokens, (0, 1)), tokens], dim=1)
        self.finished_scores, best = _top(scores, self.finished_scores.shape[1])
        self.finished_tokens = _take(tokens, best)

    def _drop_complete(self, is_complete: Tensor, hypotheses: Tensor) -> tuple[Tensor, Tensor | None]:
        if not is_complete.any():
            return hypotheses.flatten(), None
        if not (self.finished_scores[is_complete, 0] > -torch.inf).all():
            raise ValueError("model: gives no translation a finite log-probability; its parameters may hold NaN")
        finished = (x[is_complete].tolist() for x in (self.sentences, self.finished_tokens, self.finished_scores))
        for sentence, all_tokens, scores in zip(*finished, strict=True):
            for tokens, score in zip(all_tokens, scores, strict=True):
                if score > -torch.inf:
                    tokens = tokens[1 : tokens.index(self.config.eos_id, 1)]
                    self.results[sentence].append(Hypothesis(tokens, score))
        kept = (~is_complete).nonzero().squeeze(1)
        self.sentences, self.max_lengths = self.sentences[kept], self.max_lengths[kept]
        self.tokens, self.log_probs = self.tokens[kept], self.log_probs[kept]
        self.finished_tokens, self.finished_scores = self.finished_tokens[kept], self.finished_scores[kept]
        return hypotheses[kept].flatten(), kept


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest values of every row in falling order, and their columns; of equal ones the first columns."""
    k = min(k, values.shape[1])
    largest, columns = values.topk(min(k + 1, values.shape[1]))
    runner_up = largest[:, k:]
    if ((runner_up == largest[:, k - 1 : k]) & (runner_up > -torch.inf)).any():
        columns = values.sort(dim=1, descending=True, stable=True).indices
    columns = columns[:, :k].sort(dim=1).values
    largest, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return largest, columns.gather(1, order)


def _take(sequences: Tensor, rows: Tensor) -> Tensor:
    """The sequences[i, rows[i, j]] of sequences (sentences, n, length) and rows (sentences, m)."""
    return sequences.gather(1, rows[..., None].expand(-1, -1, sequences.shape[2]))


@torch.inference_mode()
def beam_search(
    model: Transformer,
    source: Tensor,
    beam_size: int = 4,
    alpha: float = 0.6,
    max_extra_tokens: int = 50,
    num_hypotheses: int = 1,
    target_space: int = 0,
    with_attention: bool = False,
    penalty: str = "paper",
    *,
    cache: MakeDecoder = DecoderCache,
) -> list[list[Hypothesis]]:
    """The best translations of every source sentence, best first.

    Args:
        model: in evaluation mode.
        source: (batch, length) int64 ids, padding on the right.
        beam_size: hypotheses that live on at each step.
        alpha: exponent of the length penalty, at least 0.
        max_extra_tokens: a translation has at most this many ids more than its source, its end of sentence included
            (and at most `max_len` with learned positions).
        num_hypotheses: translations per sentence, at most `beam_size`; fewer if the search meets fewer.
        target_space: as in `Transformer.hidden`.
        with_attention: fill `Hypothesis.attention` of each sentence's best.
        penalty: "paper" or "length", the kind of `length_penalty`.
        cache: called with model, source and target_space, makes the `StepwiseDecoder` that the search drives.

    Raises:
        ValueError: a model in training mode or with NaN, or an argument outside its range.

    Source: "Attention Is All You Need", section 6.1; Wu et al., 2016, section 7.
    """
    if not 1 <= num_hypotheses <= beam_size:
        raise ValueError(f"num_hypotheses: must lie in [1, beam_size {beam_size}], got {num_hypotheses}")
    if alpha < 0:
        raise ValueError(f"alpha: must not be negative, got {alpha}")
    if penalty not in ("paper", "length"):
        raise ValueError(f"penalty: must be 'paper' or 'length', got {penalty!r}")
    rules = (beam_size, 2 * beam_size, num_hypotheses, partial(length_penalty, alpha=alpha, kind=penalty))
    results = _search(model, source, rules, max_extra_tokens, target_space, cache)
    if with_attention:
        best = _with_attention(model, source, [hypotheses[0] for hypotheses in results], target_space)
        results = [[first, *others[1:]] for first, others in zip(best, results, strict=True)]
    return results


@torch.inference_mode()
def greedy_search(
    model: Transformer,
    source: Tensor,
    max_extra_tokens: int = 50,
    target_space: int = 0,
    with_attention: bool = False,
    *,
    cache: MakeDecoder = DecoderCache,
) -> list[Hypothesis]:
    """The translation of every source sentence by the most probable id at each step; its score is its log-probability.

    `beam_search` with a beam of 1 may find another: it also scores the end of sentence where that is second. The
    arguments and errors are those of `beam_search`.
    """
    rules = (1, 1, 1, partial(length_penalty, alpha=0.0))
    results = _search(model, source, rules, max_extra_tokens, target_space, cache)
    best = [hypotheses[0] for hypotheses in results]
    return _with_attention(model, source, best, target_space) if with_attention else best


def translate(
    model: Transformer,
    sentences: Sequence[Sequence[int]],
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> list[list[Hypothesis]]:
    """Translations of any number of sentences by `beam_search`, in batches of similar length, in the given order.

    Args:
        model: in evaluation mode.
        sentences: ids of each source sentence, as the model was trained to read them (with or without an end).
        batch_size: sentences searched at a time.
        progress: called after every batch with its number of sentences.
        options: further arguments of `beam_search`.
    """
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    results: list[list[Hypothesis]] = [[] for _ in sentences]
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        source = _pad([sentences[i] for i in indices], model)
        for i, hypotheses in zip(indices, beam_search(model, source, **options), strict=True):
            results[i] = hypotheses
        if progress is not None:
            progress(len(indices))
    return results


def _search(
    model: Transformer,
    source: Tensor,
    rules: tuple[int, int, int, Callable[[int], float]],
    max_extra_tokens: int,
    target_space: int,
    cache: MakeDecoder,
) -> list[list[Hypothesis]]:
    if model.training:
        raise ValueError("model: is in training mode, whose dropout would apply; call model.eval()")
    if max_extra_tokens < 1:
        raise ValueError(f"max_extra_tokens: must be at least 1, got {max_extra_tokens}")
    config = model.config
    decoder = cache(model, source, target_space)
    max_lengths = (source != config.pad_id).sum(1) + max_extra_tokens
    if config.positions == "learned":
        max_lengths = max_lengths.clamp(max=config.max_len)
    search = _Search(config, max_lengths, *rules)
    while search.sentences.numel():
        decoder.select(*search.advance(decoder.step(search.tokens[:, :, -1])))
    return search.results


def _with_attention(
    model: Transformer, source: Tensor, hypotheses: list[Hypothesis], target_space: int
) -> list[Hypothesis]:
    if not hypotheses:
        return []
    target = _pad([hypothesis.tokens for hypothesis in hypotheses], model)
    weights = cross_attention_weights(model, source, target, target_space)
    lengths = (source != model.config.pad_id).sum(1).tolist()
    return [
        hypothesis._replace(attention=weights[i, :, :, : len(hypothesis.tokens), : lengths[i]])
        for i, hypothesis in enumerate(hypotheses)
    ]


def _pad(sentences: list[Sequence[int]], model: Transformer) -> Tensor:
    rows = [torch.tensor(sentence, dtype=torch.int64) for sentence in sentences]
    padded = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_id)
    return padded.to(model.embedding.weight.device)
