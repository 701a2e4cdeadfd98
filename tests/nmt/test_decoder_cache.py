"""Cached steps against the whole decoder, and a search that drives the cache it is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastattn.nmt.cache import DecoderCache
from fastattn.nmt.generation import beam_search, greedy_search
from tests.support.tiny_search import EOS, constant_model, random_model, sentences


@pytest.mark.parametrize("changes", [{}, {"norm": "pre"}, {"positions": "learned"}, {"head_dim": 3, "v_head_dim": 5}])
def test_cached_steps_are_the_decoder(changes):
    model = random_model(**changes)
    source = sentences(4, 2)
    target = torch.randint(1, 5, (2, 3, 6))  # (sentences, beam, length)
    cache = DecoderCache(model, source)
    inputs = F.pad(target, (1, 0), value=EOS)
    with torch.no_grad():
        for position in range(6):
            logits = cache.step(inputs[:, :, position])
            for beam in range(3):
                expected = model(source, target[:, beam, : position + 1])[:, -1]
                torch.testing.assert_close(logits[:, beam], expected, rtol=1e-10, atol=1e-10)


def test_cache_keeps_what_is_selected():
    model = random_model()
    source = sentences(4, 2, 3)
    cache = DecoderCache(model, source)
    prefixes = torch.tensor([[2, 3], [3, 4], [4, 2]])  # one id, two hypotheses of three sentences
    with torch.no_grad():
        cache.step(torch.full((3, 2), EOS))
        cache.select(torch.tensor([5, 5, 1, 0]), torch.tensor([2, 0]))
        logits = cache.step(torch.stack([prefixes[2], prefixes[0]]))
        for row, sentence in enumerate([2, 0]):
            for beam in range(2):
                target = torch.tensor([[prefixes[sentence, beam], EOS]])
                expected = model(source[sentence : sentence + 1], target)[0, -1]
                torch.testing.assert_close(logits[row, beam], expected, rtol=1e-10, atol=1e-10)


def test_cache_follows_the_hypotheses():
    model = random_model()
    source = sentences(3)
    cache = DecoderCache(model, source)
    with torch.no_grad():
        cache.step(torch.full((1, 2), EOS))
        cache.step(torch.tensor([[2, 3]]))
        cache.select(torch.tensor([1, 0]))
        logits = cache.step(torch.tensor([[4, 4]]))
        for beam, tokens in enumerate([[3, 4, EOS], [2, 4, EOS]]):
            expected = model(source, torch.tensor([tokens]))[0, -1]
            torch.testing.assert_close(logits[0, beam], expected, rtol=1e-10, atol=1e-10)


class Counting(DecoderCache):
    """A cache that notes the number of sentences of every step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.batch_sizes = []

    def step(self, tokens):
        self.batch_sizes.append(len(tokens))
        return super().step(tokens)


@pytest.fixture
def counting():
    """A maker of `Counting` caches that keeps what it made, in `made`, and its arguments, in `arguments`."""

    def make(*arguments):
        make.arguments.append(arguments)
        make.made.append(Counting(*arguments))
        return make.made[-1]

    make.arguments, make.made = [], []
    return make


def test_finished_sentences_leave_the_batch(counting):
    beam_search(constant_model(1e-20, 0.5, 0.3, 0.2), sentences(1, 5, 2), max_extra_tokens=2, cache=counting)
    assert counting.made[0].batch_sizes == [3] * 3 + [2] + [1] * 3  # at most 3, 4 and 7 ids


def test_search_stops_as_soon_as_nothing_can_change(counting):
    assert beam_search(constant_model(0.9, 0.05, 0.03, 0.02), sentences(3, 4), cache=counting)[1][0].tokens == []
    assert counting.made[0].batch_sizes == [2]


@pytest.mark.parametrize("search", [beam_search, greedy_search])
def test_a_search_drives_the_cache_it_is_given(search, counting):
    model, source = random_model(), sentences(3, 2)
    found = search(model, source, max_extra_tokens=3, target_space=5, cache=counting)
    assert counting.arguments == [(model, source, 5)]
    assert len(counting.made[0].batch_sizes) > 1
    assert found == search(model, source, max_extra_tokens=3, target_space=5)
    assert found != search(model, source, max_extra_tokens=3, cache=lambda *arguments: Stubborn())


class Stubborn:
    """A decoder to which id 2 is always the most probable, then id 3."""

    def step(self, tokens):
        return torch.tensor([0.0, 1, 9, 8, 7]).expand(*tokens.shape, 5)

    def select(self, hypotheses, sentences=None):
        pass
