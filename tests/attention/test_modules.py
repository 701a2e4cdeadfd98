"""MultiHeadAttention against torch.nn.MultiheadAttention: every constructor argument times every kind of call."""

import pytest
import torch

from tests.support.module_calls import (
    BATCH,
    CALLS,
    CONSTRUCTORS,
    EMBED,
    HEADS,
    SEQLEN_K,
    SEQLEN_Q,
    make_call,
    make_inputs,
    make_pair,
    run,
)
from tests.support.tolerance import Condition, assert_close_to_oracle

# torch warns when a bool and a float mask meet; here the combination is supported.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


def stock_arguments(module, arguments):
    """The arguments without the hint where keys are appended: torch masks these, too, if it computes no weights."""
    has_appended = module.bias_k is not None or module.add_zero_attn
    return {**arguments, "is_causal": False} if has_appended and arguments.get("is_causal") else arguments


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.long)], ids=["train", "eval"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_equals_torch(constructor, call, train):
    stock, ours = make_pair(**CONSTRUCTORS[constructor])
    arguments = make_call(stock, CALLS[call])
    expected = run(stock.train(train), stock_arguments(stock, arguments))
    actual = run(ours.train(train), arguments)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("call", ["same", "mask-padding", "float_mask_per_head", "causal-padding"])
@pytest.mark.parametrize("constructor", ["plain", "bias_kv-zero_attn", "kdim-vdim"])
def test_float32_is_as_close_as_torch(constructor, call):
    results = {}
    for dtype in (torch.float64, torch.float32):
        stock, ours = make_pair(**CONSTRUCTORS[constructor])
        arguments = make_call(stock, CALLS[call], dtype)
        results["torch", dtype] = run(stock.to(dtype), stock_arguments(stock, arguments))
        results["ours", dtype] = run(ours.to(dtype), arguments)
    for name, oracle in results["torch", torch.float64].items():
        eager, actual = results["torch", torch.float32][name], results["ours", torch.float32][name]
        assert actual.dtype == torch.float32
        kind = "dq" if name.startswith("grad") else "out"
        assert_close_to_oracle(kind, actual, oracle, eager, Condition(scores=0.0, terms={}))


@pytest.mark.parametrize("constructor", ["plain", "batch_first", "kdim-vdim", "bias_kv-zero_attn"])
def test_is_causal_needs_no_mask(constructor):
    _, ours = make_pair(**CONSTRUCTORS[constructor])
    arguments = make_call(ours, CALLS["causal-weights"])
    expected = run(ours, {**arguments, "is_causal": False})
    actual = run(ours, {**arguments, "attn_mask": None})
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


def test_is_causal_reads_a_mask_that_requires_grad():
    stock, ours = make_pair()
    arguments = make_call(stock, {**CALLS["float_mask"], "is_causal": True})
    expected, actual = run(stock, {**arguments, "is_causal": False}), run(ours, arguments)
    torch.testing.assert_close(actual["grad of attn_mask"], expected["grad of attn_mask"], rtol=1e-9, atol=1e-11)


# ---- rows without an allowed key ----


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("kind", ["padding", "float padding", "mask", "float mask", "both", "causal"])
def test_no_allowed_key_gives_no_attention(kind, need_weights):
    stock, ours = make_pair(batch_first=True)
    arguments = make_call(ours, {"inputs": "memory", "need_weights": need_weights, "average_attn_weights": False})
    blocked = torch.zeros(BATCH, SEQLEN_Q, dtype=torch.bool)
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    mask = torch.zeros(SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
    if "padding" in kind or kind == "causal":
        padding[1] = blocked[1] = True
    elif "mask" in kind:
        mask[3] = blocked[:, 3] = True
    else:
        padding[1, :4] = mask[2, 4:] = blocked[1, 2] = True
    if kind == "causal":
        mask = mask.new_ones(mask.shape).triu(1)
    if "float" in kind:
        padding, mask = (torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -torch.inf) for m in (padding, mask))
    arguments |= {"key_padding_mask": padding, "attn_mask": mask, "is_causal": kind == "causal"}

    actual = run(ours, arguments)
    assert all(x.isfinite().all() for x in actual.values())
    assert torch.equal(actual["out"][blocked], ours.out_proj.bias.expand_as(actual["out"][blocked]))
    assert not actual["grad of query"][blocked].any()
    elsewhere = stock(**arguments)[0][~blocked]
    torch.testing.assert_close(actual["out"][~blocked], elsewhere, rtol=1e-9, atol=1e-11)
    if need_weights:
        assert not actual["weights"].transpose(1, 2)[blocked].any()


@pytest.mark.parametrize("constructor", ["batch_first", "bias_kv-zero_attn", "kdim-vdim"])
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_tensors(batch, seqlen_q, seqlen_k, constructor):
    _, ours = make_pair(**CONSTRUCTORS[constructor] | {"batch_first": True})
    query, key, value = (
        torch.randn(batch, seqlen, features, dtype=torch.float64)
        for seqlen, features in ((seqlen_q, EMBED), (seqlen_k, ours.kdim), (seqlen_k, ours.vdim))
    )
    out, weights = ours(
        query,
        key,
        value,
        key_padding_mask=torch.zeros(batch, seqlen_k, dtype=torch.bool),
        attn_mask=torch.zeros(batch * HEADS, seqlen_q, seqlen_k, dtype=torch.float64),
    )
    appended = (ours.bias_k is not None) + ours.add_zero_attn
    assert out.shape == query.shape
    assert weights.shape == (batch, seqlen_q, seqlen_k + appended)
    if seqlen_k + appended == 0:
        assert torch.equal(out, ours.out_proj.bias.expand_as(out))


# ---- dropout ----


def test_returned_weights_contain_the_dropout_of_the_output():
    _, ours = make_pair(dropout=0.4, batch_first=True)
    query, memory, _ = make_inputs(ours, "memory")
    out, weights = ours(query, memory, memory, average_attn_weights=False)
    value = ours.project_value(memory).transpose(1, 2)
    torch.testing.assert_close(out, ours.project_output((weights @ value).transpose(1, 2)))
    undropped = ours.eval()(query, memory, memory, average_attn_weights=False)[1]
    kept = weights != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(weights, undropped * kept / 0.6)
    torch.testing.assert_close(undropped.sum(-1), torch.ones_like(undropped[..., 0]))


def test_gradients_with_dropout():
    _, ours = make_pair(dropout=0.3, batch_first=True)
    query, memory, _ = make_inputs(ours, "memory")
    leaves = [query, memory, *ours.parameters()]
    out, weights = ours(query, memory, memory, average_attn_weights=False)
    factor = (weights != 0) / 0.7
    q, k, v = (project(x).transpose(1, 2) for project, x in (
        (ours.project_query, query), (ours.project_key, memory), (ours.project_value, memory),
    ))  # fmt: skip
    by_hand = torch.softmax(q @ k.transpose(-1, -2) * ours.head_dim**-0.5, -1) * factor
    expected = ours.project_output((by_hand @ v).transpose(1, 2))
    dout, dweights = torch.randn_like(out), torch.randn_like(weights)
    for x, y, upstream in ((out, expected, dout), (weights, by_hand, dweights)):
        torch.testing.assert_close(x, y)
        gradients = (torch.autograd.grad(z, leaves, upstream, retain_graph=True, allow_unused=True) for z in (x, y))
        for actual, oracle in zip(*gradients, strict=True):
            if oracle is not None:
                torch.testing.assert_close(actual, oracle)


def test_dropout_statistics():
    p, calls = 0.25, 300
    _, ours = make_pair(dropout=p, batch_first=True, add_zero_attn=True)
    query, memory, _ = make_inputs(ours, "memory")
    with torch.no_grad():
        expected = ours.eval()(query, memory, memory)[0]
        ours.train()
        outs, weights = zip(
            *(ours(query, memory, memory, average_attn_weights=False) for _ in range(calls)), strict=True
        )
    outs, weights = torch.stack(outs), torch.stack(weights)
    error = (outs.mean(0) - expected) / (outs.std(0) / calls**0.5)
    assert error.abs().max() < 5
    dropped = (weights == 0).double()
    assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    per_position = 5 * (p * (1 - p) / calls) ** 0.5
    assert (dropped.mean(0) - p).abs().max() < per_position


@pytest.mark.parametrize("constructor", ["plain", "bias_kv-zero_attn", "kdim-vdim"])
@pytest.mark.parametrize("call", ["same", "mask-padding", "causal-float_padding"])
def test_asking_for_weights_does_not_change_the_output(constructor, call):
    _, ours = make_pair(dropout=0.2, **CONSTRUCTORS[constructor])
    arguments = {**make_call(ours, CALLS[call]), "average_attn_weights": False}
    outs, states = [], []
    for need_weights in (True, False):
        torch.manual_seed(5)
        outs.append(ours(**{**arguments, "need_weights": need_weights})[0])
        states.append(torch.get_rng_state())
    assert torch.equal(*outs)
    assert torch.equal(*states)
