"""Masks of MultiHeadAttention that heads or sequences share: as torch with a copy for each head, without the copies."""

import pytest
import torch
from torch import nn

from tests.support.module_calls import BATCH, EMBED, HEADS, SEQLEN_K, SEQLEN_Q, make_inputs, make_mask, make_pair, run

LAST = (SEQLEN_Q, SEQLEN_K)
SHARED = [
    (BATCH, *LAST),
    (BATCH, 1, *LAST),
    (BATCH, HEADS, *LAST),
    (1, HEADS, *LAST),
    (1, 1, *LAST),
]
APPENDED = {"add_bias_kv": True, "add_zero_attn": True}


def four_dimensional(shape):
    return shape if len(shape) == 4 else (shape[0], 1, *shape[1:])


def compare(constructor, kind, inputs, shape, **call):
    """Both modules, torch's with the mask once for each head; its gradient is summed over the copies."""
    stock, ours = make_pair(batch_first=True, **constructor)
    batch = 1 if inputs == "unbatched" else BATCH
    arguments = dict(zip(("query", "key", "value"), make_inputs(ours, inputs), strict=True))
    mask = make_mask(kind, shape)
    copies = mask.view(four_dimensional(shape)).expand(batch, ours.num_heads, *LAST).flatten(0, 1)
    expected = run(stock, {**arguments, "attn_mask": copies, "average_attn_weights": False, **call})
    actual = run(ours, {**arguments, "attn_mask": mask, "average_attn_weights": False, **call})
    if "float" in kind:
        grad = expected["grad of attn_mask"].unflatten(0, (batch, ours.num_heads))
        expected["grad of attn_mask"] = grad.sum_to_size(four_dimensional(shape)).view(shape)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("constructor", [{}, APPENDED], ids=["plain", "appended"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_shared_by_heads_or_sequences(shape, kind, constructor):
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.float64)
    padding[1, 3:] = -torch.inf
    compare(constructor, kind, "memory", shape, key_padding_mask=padding if kind == "float" else padding < 0)


@pytest.mark.parametrize("shape", [(1, *LAST), (HEADS, *LAST), (1, 1, *LAST), (1, HEADS, *LAST)], ids=str)
def test_without_batch(shape):
    stock, ours = make_pair()
    query, memory, _ = make_inputs(ours, "unbatched")
    mask = make_mask("bool", shape)
    copies = mask if len(shape) == 3 else mask[0]
    expected = stock(query, memory, memory, attn_mask=copies.expand(HEADS, *LAST))
    torch.testing.assert_close(ours(query, memory, memory, attn_mask=mask), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(BATCH, *LAST), (BATCH, 1, *LAST)], ids=str)
def test_one_head(shape):
    compare({"num_heads": 1}, "float", "memory", shape)


@pytest.mark.parametrize("shape", [(0, *LAST), (0, 1, *LAST), (0, HEADS, *LAST), LAST], ids=str)
def test_no_sequence(shape):
    _, ours = make_pair(batch_first=True)
    query, memory = torch.randn(0, SEQLEN_Q, EMBED).double(), torch.randn(0, SEQLEN_K, EMBED).double()
    out, weights = ours(query, memory, memory, attn_mask=torch.zeros(shape))
    assert (out.shape, weights.shape) == (query.shape, (0, *LAST))


@pytest.mark.parametrize("shape", [*SHARED, (BATCH * HEADS, *LAST)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_no_copy_reaches_the_kernel(attended, kind, shape):
    _, ours = make_pair(batch_first=True)
    query, memory, _ = make_inputs(ours, "memory")
    mask = make_mask(kind, shape)
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    ours(query, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False)
    (params,) = attended
    reached = params.mask if kind == "bool" else params.bias
    batch, nheads = (BATCH, HEADS) if shape[0] == BATCH * HEADS else four_dimensional(shape)[:2]
    assert tuple(reached.shape) == (BATCH if kind == "bool" else batch, nheads, *LAST)  # bool: merged with the padding
    if kind == "float":
        assert reached.data_ptr() == mask.data_ptr()


def test_inside_a_layer_of_torch():
    """Which hands the mask on; each sequence has its own causal prefix."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    _, layer.self_attn = make_pair(batch_first=True)
    x = torch.randn(BATCH, SEQLEN_Q, EMBED, dtype=torch.float64)
    blocked = torch.ones(BATCH, SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).triu(1)
    blocked[1, :, :3] = False
    expected = [layer(x[b : b + 1], src_mask=blocked[b]) for b in range(BATCH)]
    torch.testing.assert_close(layer(x, src_mask=blocked[:, None]), torch.cat(expected))


@pytest.mark.parametrize(
    "shape", [(BATCH + 1, *LAST), (HEADS, *LAST), (BATCH, 2, *LAST), (BATCH, 1, 1, SEQLEN_K), (1, 1, 1, *LAST)], ids=str
)
def test_refuses_others(shape):
    _, ours = make_pair(batch_first=True)
    query, memory, _ = make_inputs(ours, "memory")
    with pytest.raises(ValueError, match=r"attn_mask: shape .* is not \(5, 7\) or \(6, 5, 7\) or \(2, 5, 7\) or \("):
        ours(query, memory, memory, attn_mask=torch.zeros(shape))
