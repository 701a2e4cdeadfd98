"""Updates hold every pair once per epoch, within their bounds, whoever shares them and wherever training resumed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.nmt.batches import TokenBatches

MOST = 300


def lengths(pairs=1000, seed=0):
    """Lengths of both sides as in real text: log-normal, correlated."""
    random = np.random.default_rng(seed)
    source = random.lognormal(2.5, 0.6, pairs)
    target = source * random.lognormal(0.1, 0.25, pairs)
    return tuple(np.clip(side.round(), 1, MOST).astype(np.int32) for side in (source, target))


@pytest.fixture
def batches():
    return TokenBatches(*lengths(), tokens_per_update=MOST)


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=200),
    tokens=st.integers(40, 200),
    epoch=st.integers(0, 5),
)
def test_every_pair_once_within_the_bounds(pairs, tokens, epoch):
    source, target = np.array(pairs).T
    updates = TokenBatches(source, target, tokens).updates(epoch)
    assert sorted(np.concatenate(updates).tolist()) == list(range(len(pairs)))
    for update in updates:
        assert update.size
        assert source[update].sum() <= tokens and target[update].sum() <= tokens


def test_updates_are_full():
    batches = TokenBatches(*lengths(), tokens_per_update=2000)
    longest = max(batches.source_lengths.max(), batches.target_lengths.max())
    sides = batches.source_lengths, batches.target_lengths
    fullest = sorted(max(int(side[update].sum()) for side in sides) for update in batches.updates(0))
    assert len(fullest) > 5
    assert fullest[1] > 2000 - longest  # all but the rest of the pairs


def test_pairs_of_an_update_are_of_similar_length(batches):
    longer = np.maximum(batches.source_lengths, batches.target_lengths)
    spans = sorted((longer[update].min(), longer[update].max()) for update in batches.updates(0))
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def as_lists(updates):
    return [update.tolist() for update in updates]


def test_an_epoch_depends_on_seed_and_epoch_alone(batches):
    same = TokenBatches(*lengths(), tokens_per_update=MOST)
    next(same.stream(3))
    assert as_lists(same.updates(2)) == as_lists(batches.updates(2))
    assert as_lists(batches.updates(0)) != as_lists(batches.updates(1))
    assert as_lists(TokenBatches(*lengths(), tokens_per_update=MOST, seed=2).updates(0)) != as_lists(batches.updates(0))


def test_neither_updates_nor_their_order_repeat(batches):
    first, second = (batches.updates(epoch) for epoch in (0, 1))
    assert not {frozenset(u.tolist()) for u in first} & {frozenset(u.tolist()) for u in second if u.size > 3}
    longer = np.maximum(batches.source_lengths, batches.target_lengths)
    for updates in (first, second):
        means = np.array([longer[update].mean() for update in updates])
        assert abs(np.corrcoef(means, np.arange(means.size))[0, 1]) < 0.4


def test_stream_goes_on_anywhere(batches):
    per_epoch = len(batches.updates(0))
    whole = list(islice(batches.stream(), 2 * per_epoch + 3))
    assert [(epoch, index) for epoch, index, _ in whole[per_epoch - 1 : per_epoch + 1]] == [(0, per_epoch - 1), (1, 0)]
    for position in (0, 1, per_epoch - 1, per_epoch, per_epoch + 2):
        epoch, index, _ = whole[position]
        resumed = islice(batches.stream(epoch, index + 1), 3)
        for expected, actual in zip(whole[position + 1 :], resumed, strict=False):
            assert expected[:2] == actual[:2]
            assert expected[2].tolist() == actual[2].tolist()


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 1000])
def test_parts_are_the_update_and_even(batches, parts):
    longest = int((batches.source_lengths + batches.target_lengths).max())
    for update in batches.updates(0)[:20]:
        shares = [batches.share(update, part, parts) for part in range(parts)]
        assert np.concatenate(shares).tolist() == update.tolist()
        tokens = [int(batches.source_lengths[s].sum() + batches.target_lengths[s].sum()) for s in shares]
        assert max(tokens) - min(tokens) <= 2 * longest
        assert max(tokens) <= sum(tokens) / parts + longest


def test_equal_pairs_are_shared_equally():
    batches = TokenBatches([5] * 12, [5] * 12, 60)
    assert [batches.share(np.arange(12), part, 4).tolist() for part in range(4)] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11],
    ]  # fmt: skip


# ---- padding ----


def test_padding_share_by_hand():
    batches = TokenBatches([2, 4], [3, 3], 10)
    assert len(batches.updates(0)) == 1
    assert batches.padding_share() == pytest.approx((1 - 12 / 14, 0.0))
    # Of two parts, the places of each: padded as packed, 5 and 7 tokens that both take as long as 7.
    assert batches.padding_share(parts=2) == pytest.approx((1 - 12 / 14, 1 - 12 / 14))


def test_padding_share_of_realistic_lengths():
    batches = TokenBatches(*lengths(30_000), tokens_per_update=25_000)
    alone, shared = batches.padding_share(), batches.padding_share(parts=8)
    assert alone.packed == 0 and 0 < shared.packed < 0.03
    assert 0.03 < alone.padded < 0.25 and 0.03 < shared.padded < 0.25


# ---- what is left out and refused ----


def test_long_pairs_are_left_out():
    batches = TokenBatches([1, 9, 3, 5], [1, 2, 8, 5], 20, max_length=8)
    assert batches.num_left_out == 1
    assert sorted(np.concatenate(batches.updates(0)).tolist()) == [0, 2, 3]


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ([1, 2], [1], {}, r"must be \(pairs,\) both, got \(2,\) and \(1,\)"),
        ([], [], {}, "no pair"),
        ([9], [9], {"max_length": 3}, "no pair of at most max_length 3"),
        ([1, 9], [1, 2], {"tokens_per_update": 8}, "must be at least 9, the ids of pair 1, got 8"),
    ],
)
def test_refusals(source, target, options, message):
    with pytest.raises(ValueError, match=message):
        TokenBatches(source, target, **options)


@pytest.mark.parametrize("part", [-1, 2])
def test_part_outside(batches, part):
    with pytest.raises(ValueError, match=rf"part: must lie in \[0, parts 2\), got {part}"):
        batches.share(np.arange(3), part, 2)
