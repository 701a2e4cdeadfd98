"""MultiHeadAttention around the fused function: what reaches it, head dimensions, packed tokens, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import functional
from fastattn.modules import MultiHeadAttention
from tests.support.module_calls import BATCH, CALLS, EMBED, HEADS, SEQLEN_K, SEQLEN_Q, make_call, make_inputs, make_pair

# torch warns when a bool and a float mask meet; here the combination is supported.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


# ---- what reaches the fused function ----


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
