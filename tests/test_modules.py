"""MultiHeadAttention against torch.nn.MultiheadAttention: every constructor argument times every kind of call."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import functional
from fastattn.modules import MultiHeadAttention
from tolerance import Condition, assert_close_to_oracle

EMBED, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 12, 3, 2, 5, 7

# torch warns when a bool and a float mask meet; here the combination is supported.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning"
)

CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "one_head": {"num_heads": 1},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv-zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim-vdim": {"kdim": 8, "vdim": 10, "batch_first": True},
    "vdim-bias_kv": {"vdim": 10, "add_bias_kv": True},
    "kdim-no_bias-zero_attn": {"kdim": 8, "bias": False, "add_zero_attn": True},
}

# inputs: the tensors given as query, key, value. same: one tensor; memory: key is value; apart: three.
CALLS = {
    "same": {"inputs": "same"},
    "memory": {"inputs": "memory"},
    "apart": {"inputs": "apart"},
    "unbatched": {"inputs": "unbatched"},
    "no_weights": {"inputs": "memory", "need_weights": False},
    "weights_per_head": {"inputs": "same", "average_attn_weights": False},
    "padding": {"inputs": "same", "key_padding_mask": "bool"},
    "padding-no_weights": {"inputs": "memory", "key_padding_mask": "bool", "need_weights": False},
    "float_padding": {"inputs": "apart", "key_padding_mask": "float", "average_attn_weights": False},
    "unbatched-padding": {"inputs": "unbatched", "key_padding_mask": "bool", "average_attn_weights": False},
    "mask": {"inputs": "same", "attn_mask": "bool"},
    "mask_per_head": {"inputs": "memory", "attn_mask": "bool per head", "need_weights": False},
    "float_mask": {"inputs": "memory", "attn_mask": "float", "average_attn_weights": False},
    "float_mask_per_head": {"inputs": "same", "attn_mask": "float per head"},
    "unbatched-mask_per_head": {"inputs": "unbatched", "attn_mask": "bool per head"},
    "mask-padding": {"inputs": "memory", "attn_mask": "bool", "key_padding_mask": "bool"},
    "mask_per_head-padding": {"inputs": "same", "attn_mask": "bool per head", "key_padding_mask": "bool"},
    "float_mask-float_padding": {"inputs": "apart", "attn_mask": "float", "key_padding_mask": "float"},
    "mask-float_padding": {"inputs": "memory", "attn_mask": "bool", "key_padding_mask": "float"},
    "float_mask_per_head-padding": {"inputs": "same", "attn_mask": "float per head", "key_padding_mask": "bool"},
    "unbatched-both": {"inputs": "unbatched", "attn_mask": "float", "key_padding_mask": "bool"},
    "causal": {"inputs": "same", "attn_mask": "causal", "is_causal": True, "need_weights": False},
    "causal-weights": {"inputs": "memory", "attn_mask": "causal", "is_causal": True},
    "float_causal": {"inputs": "same", "attn_mask": "float causal", "is_causal": True, "need_weights": False},
    "causal-padding": {"inputs": "same", "attn_mask": "causal", "is_causal": True, "key_padding_mask": "bool"},
    "causal-float_padding": {
        "inputs": "memory", "attn_mask": "float causal", "is_causal": True, "key_padding_mask": "float"
    },
}  # fmt: skip


def make_pair(dtype=torch.float64, **kwargs):
    """torch's module and ours with the same random parameters, biases included."""
    kwargs = {"embed_dim": EMBED, "num_heads": HEADS, "dtype": dtype, **kwargs}
    torch.manual_seed(0)
    stock, ours = nn.MultiheadAttention(**kwargs), MultiHeadAttention(**kwargs)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.5)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_inputs(module, kind, dtype=torch.float64):
    """query, key, value that require grad."""

    def tensor(seqlen, features):
        shape = (BATCH, seqlen, features) if module.batch_first else (seqlen, BATCH, features)
        shape = (seqlen, features) if kind == "unbatched" else shape
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    if module.kdim != module.vdim or module.kdim != module.embed_dim:
        kind = "apart" if kind in ("same", "memory") else kind
    query = tensor(SEQLEN_Q, module.embed_dim)
    if kind == "same":
        return query, query, query
    key = tensor(SEQLEN_K, module.kdim)
    return query, key, key if kind == "memory" else tensor(SEQLEN_K, module.vdim)


def make_mask(kind, shape, dtype=torch.float64):
    """A mask of which the first key is never blocked; a float one requires grad."""
    if kind is None:
        return None
    if "causal" in kind:
        mask = torch.ones(shape, dtype=torch.bool).triu(1)
        return torch.zeros(shape, dtype=dtype).masked_fill(mask, -torch.inf) if "float" in kind else mask
    if "float" in kind:
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def make_call(module, call, dtype=torch.float64):
    """The arguments of one call of CALLS, as tensors."""
    torch.manual_seed(1)
    call = dict(call)
    kind = call.pop("inputs")
    query, key, value = make_inputs(module, kind, dtype)
    batch = 1 if kind == "unbatched" else BATCH
    seqlen_q, seqlen_k = (x.size(-2 if module.batch_first or kind == "unbatched" else 0) for x in (query, key))
    padding_shape = (seqlen_k,) if kind == "unbatched" else (batch, seqlen_k)
    mask_kind = call.pop("attn_mask", None)
    per_head = (batch * module.num_heads,) if mask_kind and "per head" in mask_kind else ()
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": make_mask(call.pop("key_padding_mask", None), padding_shape, dtype),
        "attn_mask": make_mask(mask_kind, (*per_head, seqlen_q, seqlen_k), dtype),
        **call,
    }


def run(module, arguments):
    """Outputs, weights and every gradient of a call, under random upstream gradients."""
    results = {}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    leaves = {**tensors, **dict(module.named_parameters())}
    results["out"], weights = module(**arguments)
    generator = torch.Generator().manual_seed(2)
    loss = 0.0
    if weights is not None:
        results["weights"] = weights
    for x in list(results.values()):
        upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        loss = loss + (x * upstream).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results.update({f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return results


def stock_arguments(module, arguments):
    """torch applies the hint to the appended keys too when it computes no weights, and only then."""
    has_appended = module.bias_k is not None or module.add_zero_attn
    return {**arguments, "is_causal": False} if has_appended and arguments.get("is_causal") else arguments


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
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
        assert_close_to_oracle(kind, actual, oracle, eager, Condition(lse=0.0, terms={}))


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


# ---- what reaches the fused function ----


@pytest.fixture
def attended(monkeypatch):
    """The parameters of every attention call made during a test."""
    calls, attend = [], functional.attend

    def record(params, *args):
        calls.append(params)
        return attend(params, *args)

    monkeypatch.setattr(functional, "attend", record)
    return calls


@pytest.mark.parametrize(
    ("call", "mask", "bias", "is_causal"),
    [
        ("padding", (BATCH, 1, 1, SEQLEN_Q), None, False),
        ("float_padding", None, (BATCH, 1, 1, SEQLEN_K), False),
        ("mask", (1, 1, SEQLEN_Q, SEQLEN_Q), None, False),
        ("float_mask", None, (1, 1, SEQLEN_Q, SEQLEN_K), False),
        ("mask_per_head", (BATCH, HEADS, SEQLEN_Q, SEQLEN_K), None, False),
        ("mask-float_padding", (1, 1, SEQLEN_Q, SEQLEN_K), (BATCH, 1, 1, SEQLEN_K), False),
        ("mask-padding", (BATCH, 1, SEQLEN_Q, SEQLEN_K), None, False),
        ("causal", None, None, True),
        ("causal-padding", (BATCH, 1, 1, SEQLEN_Q), None, True),
        ("causal-float_padding", None, (BATCH, 1, 1, SEQLEN_K), True),
    ],
)
def test_masks_keep_their_smallest_shape(attended, call, mask, bias, is_causal):
    _, ours = make_pair()
    arguments = make_call(ours, CALLS[call])
    ours(**arguments)
    (params,) = attended
    assert (None if params.mask is None else tuple(params.mask.shape)) == mask
    assert (None if params.bias is None else tuple(params.bias.shape)) == bias
    assert (params.right == 0) == is_causal
    if bias is not None:
        given = arguments["attn_mask" if call == "float_mask" else "key_padding_mask"]
        assert params.bias.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_are_not_copied(attended, batch_first):
    _, ours = make_pair(batch_first=batch_first)
    query, *_ = make_inputs(ours, "same")
    ours(query, query, query)
    (params,) = attended
    assert len({x.untyped_storage().data_ptr() for x in (params.q, params.k, params.v)}) == 1
    out, _ = functional.attend(params)
    assert out.transpose(1, 2).flatten(-2).untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


class CountProducts(TorchDispatchMode):
    """Counts the matrix products of the projections."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("inputs", "products"), [("same", 2), ("memory", 3), ("apart", 4)])
def test_shared_inputs_are_projected_together(inputs, products):
    _, ours = make_pair(batch_first=True)
    query, key, value = make_inputs(ours, inputs)
    with CountProducts() as count:
        ours(query, key, value, need_weights=False)
    assert count.products == products


# ---- head dimensions, packed execution, pieces ----


@pytest.mark.parametrize("kdim", [None, 8], ids=["fused", "kdim"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(5, None), (None, 6), (3, 7)])
def test_head_dimensions(head_dim, v_head_dim, kdim):
    torch.manual_seed(0)
    ours = MultiHeadAttention(
        EMBED, HEADS, kdim=kdim, batch_first=True, dtype=torch.float64, head_dim=head_dim, v_head_dim=v_head_dim
    )
    d_k = head_dim or EMBED // HEADS
    d_v = v_head_dim or d_k
    shapes = {name: tuple(x.shape) for name, x in ours.state_dict().items()}
    if kdim is None:
        assert shapes["in_proj_weight"] == (HEADS * (2 * d_k + d_v), EMBED)
    else:
        assert shapes["q_proj_weight"] == (HEADS * d_k, EMBED)
        assert shapes["k_proj_weight"] == (HEADS * d_k, kdim)
        assert shapes["v_proj_weight"] == (HEADS * d_v, EMBED)
    assert shapes["in_proj_bias"] == (HEADS * (2 * d_k + d_v),)
    assert shapes["out_proj.weight"] == (EMBED, HEADS * d_v)

    with torch.no_grad():
        ours.in_proj_bias.normal_()
    query, key, value = make_inputs(ours, "apart")
    q, k, v = (x.transpose(1, 2) for x in (ours.project_query(query), ours.project_key(key), ours.project_value(value)))
    assert q.shape == (BATCH, HEADS, SEQLEN_Q, d_k) and v.shape == (BATCH, HEADS, SEQLEN_K, d_v)
    weights = torch.softmax(q @ k.transpose(-1, -2) * d_k**-0.5, -1)
    actual, actual_weights = ours(query, key, value, average_attn_weights=False)
    torch.testing.assert_close(actual, ours.project_output((weights @ v).transpose(1, 2)))
    torch.testing.assert_close(actual_weights, weights)


def test_embed_dim_need_not_be_divisible_with_head_dim():
    ours = MultiHeadAttention(10, 3, head_dim=4)
    x = torch.randn(SEQLEN_Q, BATCH, 10)
    assert ours(x, x, x)[0].shape == x.shape


def pack(x, lengths):
    return torch.cat([x[i, :n] for i, n in enumerate(lengths)])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("inputs", ["same", "memory"])
def test_packed_equals_padded(inputs, is_causal):
    lengths_q = [3, 0, 5, 2]
    lengths_k = lengths_q if inputs == "same" else [7, 2, 1, 4]
    _, ours = make_pair(dropout=0.3, batch_first=True)
    torch.manual_seed(3)
    query = torch.randn(4, max(lengths_q), EMBED, dtype=torch.float64, requires_grad=True)
    memory = query if inputs == "same" else torch.randn(4, max(lengths_k), EMBED, dtype=torch.float64)
    padding = torch.arange(max(lengths_k)) >= torch.tensor(lengths_k)[:, None]
    cu_q, cu_k = (F.pad(torch.tensor(n).cumsum(0), (1, 0)).int() for n in (lengths_q, lengths_k))
    packed_q = pack(query, lengths_q)
    packed_k = packed_q if inputs == "same" else pack(memory, lengths_k)

    torch.manual_seed(4)
    padded = ours(query, memory, memory, key_padding_mask=padding, need_weights=False, is_causal=is_causal)[0]
    torch.manual_seed(4)
    packed = ours.forward_packed(
        packed_q, packed_k, packed_k, cu_q, cu_k, max(lengths_q), max(lengths_k), is_causal=is_causal
    )
    expected = pack(padded, lengths_q)
    torch.testing.assert_close(packed, expected)
    upstream = torch.randn_like(packed)
    leaves = [query, *ours.parameters()]
    for actual, oracle in zip(
        torch.autograd.grad(packed, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(actual, oracle)


# ---- state ----


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_same_initial_values_and_state_dict_as_torch(constructor):
    kwargs = {"embed_dim": EMBED, "num_heads": HEADS, **CONSTRUCTORS[constructor]}
    torch.manual_seed(9)
    stock = nn.MultiheadAttention(**kwargs)
    torch.manual_seed(9)
    ours = MultiHeadAttention(**kwargs)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    stock.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, save_and_load, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "save", "pickle"]
)
def test_copies_compute_the_same(duplicate):
    _, ours = make_pair(add_bias_kv=True, batch_first=True)
    ours.need_weights = False
    other = duplicate(ours)
    arguments = make_call(ours, CALLS["mask-padding"])
    expected, actual = run(ours, arguments), run(other, arguments)
    assert type(other) is MultiHeadAttention
    assert other._qkv_same_embed_dim is False
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_accepts_the_state_of_an_old_torch_module():
    stock, _ = make_pair()
    state = {k: v for k, v in stock.__dict__.items() if k not in ("_qkv_same_embed_dim", "batch_first")}
    ours = MultiHeadAttention.__new__(MultiHeadAttention)
    ours.__setstate__(state)
    x = torch.randn(SEQLEN_Q, BATCH, EMBED, dtype=torch.float64)
    assert ours._qkv_same_embed_dim is False
    torch.testing.assert_close(ours(x, x, x), stock(x, x, x))


# ---- inside torch's layers, compiler and autocast ----


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_torch_layers_cannot_bypass_forward(attended):
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, batch_first=True)
    layer.self_attn = MultiHeadAttention(EMBED, 2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(BATCH, SEQLEN_Q, EMBED)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        layer.eval()(x)
        assert len(attended) == 1
        out = encoder(x, src_key_padding_mask=padding)
    assert len(attended) == 3
    assert out.isfinite().all()


def test_a_nested_tensor_is_refused_with_the_remedy():
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    encoder.layers[0].self_attn = MultiHeadAttention(EMBED, 2, batch_first=True).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with pytest.raises(ValueError, match="query: nested tensors.*use_nested_tensor = False"), torch.no_grad():
        encoder(torch.randn(BATCH, SEQLEN_Q, EMBED), src_key_padding_mask=padding)


@pytest.mark.parametrize("call", ["padding-no_weights", "mask-float_padding", "causal-padding"])
def test_compiles_without_graph_breaks(call):
    _, ours = make_pair(batch_first=True)
    arguments = make_call(ours, CALLS[call])
    expected = run(ours, arguments)
    actual = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), arguments)
    expected = {name.replace("grad of ", "grad of _orig_mod.") if name not in actual else name: x
                for name, x in expected.items()}  # fmt: skip
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


def test_compiles_with_dropout_and_changing_lengths():
    _, ours = make_pair(batch_first=True, dropout=0.5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (4, 6, 9):
        x = torch.randn(BATCH, seqlen, EMBED, dtype=torch.float64)
        out, weights = compiled(x, x, x, average_attn_weights=False)
        value = ours.project_value(x).transpose(1, 2)
        assert (weights == 0).any()
        torch.testing.assert_close(out, ours.project_output((weights @ value).transpose(1, 2)))


@pytest.mark.parametrize("constructor", ["plain", "bias_kv-zero_attn", "kdim-vdim"])
def test_autocast(constructor):
    _, ours = make_pair(torch.float32, **CONSTRUCTORS[constructor])
    arguments = make_call(ours, CALLS["float_mask"], torch.float32)
    expected = run(ours, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(ours, arguments)
    assert actual["out"].dtype == torch.bfloat16
    for name in expected:
        assert name in ("out", "weights") or actual[name].dtype == torch.float32
        scale = expected[name].abs().max()
        assert (actual[name].float() - expected[name]).abs().max() <= 0.05 * scale, name


# ---- errors ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 0}, "embed_dim: must be positive, got 0"),
        ({"num_heads": -1}, "num_heads: must be positive, got -1"),
        ({"head_dim": 0}, "head_dim: must be positive, got 0"),
        ({"num_heads": 5}, "embed_dim: 12 is not divisible by num_heads 5"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **kwargs})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": torch.zeros(EMBED)}, r"query: .*3-D, or 2-D.*\(12,\)"),
        ({"key": torch.zeros(SEQLEN_K, EMBED)}, r"key: .*3-D, or 2-D.*\(7, 12\)"),
        ({"value": torch.zeros(SEQLEN_K, BATCH, 10)}, r"value: the last dimension must be 12, got shape \(7, 2, 10\)"),
        ({"key": torch.zeros(SEQLEN_Q, BATCH, EMBED)}, "value: shape .*"),
        ({"query": torch.zeros(SEQLEN_Q, 3, EMBED)}, "key: batch"),
        ({"key_padding_mask": torch.zeros(BATCH, 3) > 0}, r"key_padding_mask: shape \(2, 3\) is not \(2, 7\)"),
        ({"key_padding_mask": torch.zeros(BATCH, SEQLEN_K).int()}, "key_padding_mask: dtype .* got torch.int32"),
        ({"attn_mask": torch.zeros(3, 3)}, r"attn_mask: shape \(3, 3\) is not \(5, 7\) or \(6, 5, 7\)"),
        ({"attn_mask": torch.zeros(SEQLEN_Q, SEQLEN_K).long()}, "attn_mask: dtype .* got torch.int64"),
        ({"query": torch.zeros(SEQLEN_Q, BATCH, EMBED).double()}, "Double"),
    ],
)
def test_forward_errors(arguments, message):
    memory = torch.zeros(SEQLEN_K, BATCH, EMBED)
    valid = {"query": torch.zeros(SEQLEN_Q, BATCH, EMBED), "key": memory, "value": memory}
    ours = MultiHeadAttention(EMBED, HEADS)
    assert ours(**valid)[0].shape == valid["query"].shape
    with pytest.raises((ValueError, RuntimeError), match=message):
        ours(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("kwargs", "query", "message"),
    [
        ({"add_bias_kv": True}, torch.zeros(4, EMBED), "not defined with add_bias_kv"),
        ({"add_zero_attn": True}, torch.zeros(4, EMBED), "not defined with add_bias_kv or add_zero_attn"),
        ({}, torch.zeros(1, 4, EMBED), r"query: .*\(1, 4, 12\)"),
        ({}, torch.zeros(4, 10), "query: the last dimension must be 12"),
    ],
)
def test_packed_errors(kwargs, query, message):
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(EMBED, HEADS, **kwargs).forward_packed(query, query, query, cu_seqlens, cu_seqlens, 4, 4)
