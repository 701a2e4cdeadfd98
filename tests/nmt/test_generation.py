"""Search against exhaustive enumeration and against a plain search that caches nothing."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.nmt import generation
from fastattn.nmt.config import TransformerConfig
from fastattn.nmt.generation import beam_search, cross_attention_weights, greedy_search, length_penalty, translate
from fastattn.nmt.layout import pack
from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.transformer import Transformer
from tests.support.tiny_search import EOS, PAD, constant_model, random_model, sentences


@torch.no_grad()
def log_probs(model, source, prefix):
    """Log-probabilities (vocab,) of what follows `prefix`, the whole decoder run anew."""
    target = torch.tensor([[*prefix, EOS]])
    return model(source[None], target)[0, -1].log_softmax(-1)


@torch.no_grad()
def score(model, source, tokens, alpha):
    target = torch.tensor([[*tokens, EOS]])
    steps = model(source[None], target)[0].log_softmax(-1)
    return steps.gather(-1, target[0, :, None]).sum().item() / ((5 + len(tokens) + 1) / 6) ** alpha


def plain_beam_search(model, source, beam_size, alpha, max_length, penalty="paper"):
    """The search in lists: no cache, no early stop. Returns (score, tokens), best first."""
    divisor = {"paper": lambda length: ((5 + length) / 6) ** alpha, "length": lambda length: length**alpha}[penalty]
    alive, finished = [(0.0, [])], []
    for length in range(1, max_length + 1):
        candidates = []
        for total, tokens in alive:
            step = log_probs(model, source, tokens).tolist()
            allowed = [EOS] if length == max_length else range(1, model.config.vocab_size)
            candidates += [(total + step[token], [*tokens, token]) for token in allowed]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beam_size]
        finished += [(total / divisor(length), t[:-1]) for total, t in candidates if t[-1] == EOS]
        alive = [c for c in candidates if c[1][-1] != EOS][:beam_size]
    return sorted(finished, key=lambda f: -f[0])


def assert_same(hypotheses, expected):
    """Assert that the hypotheses are the expected (score, tokens), best first."""
    assert [h.tokens for h in hypotheses] == [tokens for _, tokens in expected]
    assert [h.score for h in hypotheses] == pytest.approx([s for s, _ in expected], rel=1e-9)


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), alpha=st.sampled_from([0.0, 0.6, 2.0]), max_length=st.integers(2, 4))
def test_a_wide_beam_finds_all_sentences_in_order(seed, alpha, max_length):
    model = random_model(seed)
    source = sentences(1, seed=seed)
    every = [list(t) for n in range(max_length) for t in product([2, 3, 4], repeat=n)]
    ranked = sorted(((score(model, source[0], t, alpha), t) for t in every), key=lambda s: -s[0])
    options = {"alpha": alpha, "max_extra_tokens": max_length - 1}
    assert_same(beam_search(model, source, 40, num_hypotheses=40, **options)[0], ranked)
    assert_same(beam_search(model, source, 40, **options)[0], ranked[:1])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    beam_size=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.6, 1.0]),
    penalty=st.sampled_from(["paper", "length"]),
    norm=st.sampled_from(["post", "pre"]),
    positions=st.sampled_from(["sinusoidal", "learned"]),
)
def test_cached_batched_search_is_the_plain_one(seed, lengths, beam_size, alpha, penalty, norm, positions):
    model = random_model(seed, vocab_size=7, norm=norm, positions=positions, head_dim=3, v_head_dim=2)
    source = sentences(*lengths, vocab=7, seed=seed)
    options = {"beam_size": beam_size, "alpha": alpha, "max_extra_tokens": 4, "penalty": penalty}
    results = beam_search(model, source, **options)
    n_best = beam_search(model, source, num_hypotheses=beam_size, **options)
    for row, length, best, several in zip(source, lengths, results, n_best, strict=True):
        expected = plain_beam_search(model, row[:length], beam_size, alpha, length + 4, penalty)
        assert_same(best, expected[:1])
        assert_same(several, expected[:beam_size])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_greedy_takes_the_most_probable_id(seed, lengths):
    model = random_model(seed)
    source = sentences(*lengths, seed=seed)
    for row, length, hypothesis in zip(source, lengths, greedy_search(model, source, 3), strict=True):
        tokens = []
        while len(tokens) < length + 2:
            token = log_probs(model, row[:length], tokens)[1:].argmax().item() + 1
            if token == EOS:
                break
            tokens.append(token)
        assert hypothesis.tokens == tokens
        assert hypothesis.score == pytest.approx(score(model, row[:length], tokens, alpha=0.0))


def test_search_goes_on_while_the_length_penalty_can_change_the_order():
    hypotheses = beam_search(constant_model(0.6, 0.3, 0.05, 0.05), sentences(2), alpha=5.0, max_extra_tokens=10)[0]
    assert hypotheses[0].tokens == [2] * 11  # the end is the most probable id, but the longest sentence scores best


def test_the_longest_translation_is_a_whole_sentence():
    model = constant_model(1e-20, 0.5, 0.3, 0.2)
    for hypotheses, length in zip(beam_search(model, sentences(2, 4), max_extra_tokens=3), [2, 4], strict=True):
        tokens = length + 3
        assert hypotheses[0].tokens == [2] * (tokens - 1)
        log_prob = (tokens - 1) * math.log(0.5) + math.log(1e-20)
        assert hypotheses[0].score == pytest.approx(log_prob / ((5 + tokens) / 6) ** 0.6)


def test_learned_positions_limit_the_length():
    model = constant_model(1e-20, 0.5, 0.3, 0.2, positions="learned", max_len=6)
    assert greedy_search(model, sentences(5))[0].tokens == [2] * 5


def test_padding_is_never_produced():
    model = constant_model(1e-30, 1e-30, 1e-30, 1e-30)  # padding is the most probable id by far
    hypotheses = beam_search(model, sentences(3), num_hypotheses=4, max_extra_tokens=3)[0]
    assert len(hypotheses) == 4
    assert all(PAD not in hypothesis.tokens for hypothesis in hypotheses)


def test_results_do_not_depend_on_the_batch_or_its_padding():
    model = random_model(vocab_size=9)
    source = sentences(6, 1, 3, 6, vocab=9)
    options = {"max_extra_tokens": 5, "num_hypotheses": 3}
    together = beam_search(model, source, **options)
    wider = beam_search(model, F.pad(source, (0, 4)), **options)
    rows = [[token for token in row if token] for row in source.tolist()]
    batches = []
    by_two = translate(model, rows, batch_size=2, progress=batches.append, **options)
    assert batches == [2, 2]
    for i, expected in enumerate(together):
        alone = beam_search(model, torch.tensor([rows[i]]), **options)[0]
        for actual in (alone, wider[i], by_two[i]):
            assert_same(actual, [(h.score, h.tokens) for h in expected])
    assert len({tuple(h[0].tokens) for h in together}) > 1


def test_nothing_to_translate():
    model = random_model()
    assert beam_search(model, torch.zeros(0, 3, dtype=torch.int64), with_attention=True) == []
    nothing = constant_model(0.9, 0.05, 0.03, 0.02)
    assert greedy_search(nothing, sentences(3), with_attention=True)[0].attention.shape == (2, 2, 0, 3)
    assert translate(model, []) == []
    assert len(translate(model, [[], [2, 3]], max_extra_tokens=2)) == 2
    assert len(translate(model, [[]], max_extra_tokens=2)[0][0].tokens) < 2


@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_of_equal_candidates_the_first_wins(k):
    values = torch.randint(0, 4, (200, 6)).double()
    values[::3] = values[::3].masked_fill(torch.rand(67, 6) < 0.5, -torch.inf)
    largest, columns = generation._top(values, k)
    expected = values.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(largest, expected.values[:, :k])
    real = largest > -torch.inf
    assert torch.equal(columns[real], expected.indices[:, :k][real])


def test_equal_ids_are_taken_in_order():
    model = random_model()
    with torch.no_grad():
        model.embedding.weight.zero_()  # all ids are equally probable
    hypotheses = beam_search(model, sentences(1), beam_size=2, alpha=0.0, max_extra_tokens=2, num_hypotheses=2)[0]
    assert [h.tokens for h in hypotheses] == [[], [2]]
    assert [h.score for h in hypotheses] == pytest.approx([-math.log(5), -2 * math.log(5)])


def test_length_penalty():
    assert length_penalty(1, 0.6) == 1.0
    assert length_penalty(25, 0.6) == pytest.approx(5**0.6)
    assert length_penalty(7, 0.0) == 1.0
    assert length_penalty(7, 1.0, "length") == 7.0
    assert length_penalty(9, 0.5, "length") == pytest.approx(3.0)


def test_attention_of_the_best_hypothesis():
    model = random_model(vocab_size=9)
    source = sentences(6, 2, vocab=9)
    plain = beam_search(model, source, max_extra_tokens=4, num_hypotheses=2)
    results = beam_search(model, source, max_extra_tokens=4, num_hypotheses=2, with_attention=True)
    for row, length, (best, second), (expected, _) in zip(source, [6, 2], results, plain, strict=True):
        assert best[:2] == expected[:2]
        assert second.attention is None
        assert best.attention.shape == (2, 2, len(best.tokens), length)
        torch.testing.assert_close(best.attention.sum(-1), torch.ones(2, 2, len(best.tokens)).double())
        with torch.no_grad():
            alone = cross_attention_weights(model, row[None, :length], torch.tensor([best.tokens]))[0]
        torch.testing.assert_close(best.attention, alone)
    greedy = greedy_search(model, source, with_attention=True)
    assert greedy[0].attention.shape == (2, 2, len(greedy[0].tokens), 6)


@torch.no_grad()
def test_attention_weights_are_the_softmax_of_the_scores():
    model = random_model()
    source, target = sentences(4), torch.tensor([[3, 2, 4]])
    inputs = {}
    layer = model.decoder[0]
    layer.cross_attention.register_forward_pre_hook(lambda _, args: inputs.update(query=args[0], key=args[1]))
    weights = cross_attention_weights(model, source, target)
    query = layer.cross_attention.project_query(inputs["query"])[0]
    key = layer.cross_attention.project_key(inputs["key"])[0]
    scores = torch.einsum("qhd,khd->hqk", query, key) / 2
    torch.testing.assert_close(weights[0, 0], scores.softmax(-1))


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_nan_is_an_error(search):
    model = random_model()
    with torch.no_grad():
        model.decoder[0].feed_forward[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match="model: gives no translation a finite log-probability"):
        search(model, sentences(2, 3))


def test_half_precision():
    model = random_model().float()
    source = sentences(3, 2)
    expected = beam_search(model, source, max_extra_tokens=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_autocast = beam_search(model, source, max_extra_tokens=3)
    for actual in (by_autocast, beam_search(model.bfloat16(), source, max_extra_tokens=3)):
        assert [h[0].score for h in actual] == pytest.approx([h[0].score for h in expected], rel=0.1)


def test_search_leaves_the_model_trainable():
    model = random_model(positions="learned")
    source = sentences(3)
    beam_search(model, source, max_extra_tokens=2)
    model.train()
    model(source, source).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hypotheses": 5}, r"num_hypotheses: must lie in \[1, beam_size 4\], got 5"),
        ({"num_hypotheses": 0}, r"num_hypotheses: must lie in \[1, beam_size 4\], got 0"),
        ({"alpha": -0.1}, "alpha: must not be negative, got -0.1"),
        ({"penalty": "mean"}, "penalty: must be 'paper' or 'length', got 'mean'"),
        ({"max_extra_tokens": 0}, "max_extra_tokens: must be at least 1, got 0"),
        ({"source": torch.tensor([2, 3])}, r"source: must be \(batch, length\) int64, got shape \(2,\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(**{"model": random_model(), "source": sentences(2), **options})


def test_training_mode_is_an_error():
    with pytest.raises(ValueError, match="model: is in training mode"):
        beam_search(random_model().train(), sentences(2))


@pytest.mark.long
def test_a_trained_model_reverses_unseen_sentences():
    torch.manual_seed(1)
    config = TransformerConfig(
        vocab_size=10, d_model=48, d_ff=96, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, dropout=0.0
    )
    model = Transformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)

    def batch(size):
        ids = sentences(*torch.randint(1, 6, (size,)).tolist(), vocab=10, seed=int(torch.randint(1 << 30, ())))
        rows = [[token for token in row if token] for row in ids.tolist()]
        return ids, [row[::-1] for row in rows]

    for _ in range(250):
        source, answers = batch(48)
        target = pack(generation._pad([[*answer, EOS] for answer in answers], model))
        sums = label_smoothed_cross_entropy(model.hidden(pack(source), target), model.output_weight(), target.tokens)
        optimizer.zero_grad()
        (sums.loss / sums.num_tokens).backward()
        optimizer.step()
    source, answers = batch(100)
    results = beam_search(model.eval(), source)
    assert sum(h[0].tokens == answer for h, answer in zip(results, answers, strict=True)) >= 90
