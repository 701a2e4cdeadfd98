"""MultiHeadAttention as a torch module: state and copies, inside torch's layers, compiled, under autocast."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fastattn.modules import MultiHeadAttention
from tests.support.module_calls import BATCH, CALLS, CONSTRUCTORS, EMBED, HEADS, SEQLEN_Q, make_call, make_pair, run

# torch warns when a bool and a float mask meet; here the combination is supported.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning"
)


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
    assert other._qkv_same_embed_dim is True
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_accepts_the_state_of_an_old_torch_module():
    stock, _ = make_pair()
    state = {k: v for k, v in stock.__dict__.items() if k not in ("_qkv_same_embed_dim", "batch_first")}
    ours = MultiHeadAttention.__new__(MultiHeadAttention)
    ours.__setstate__(state)
    x = torch.randn(SEQLEN_Q, BATCH, EMBED, dtype=torch.float64)
    assert ours._qkv_same_embed_dim is True
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


@pytest.mark.long
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


@pytest.mark.long
def test_compiles_with_dropout_and_changing_lengths():
    _, ours = make_pair(batch_first=True, dropout=0.5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (4, 6, 9):
        x = torch.randn(BATCH, seqlen, EMBED, dtype=torch.float64)
        out, weights = compiled(x, x, x, average_attn_weights=False)
        value = ours.project_value(x).transpose(1, 2)
        assert (weights == 0).any()
        torch.testing.assert_close(out, ours.project_output((weights @ value).transpose(1, 2)))


@pytest.mark.long
def test_compiles_with_masks_and_changing_lengths():
    _, ours = make_pair(batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=True)
    for seqlen in (4, 6):
        x = torch.randn(BATCH, seqlen, EMBED, dtype=torch.float64)
        masks = {
            "key_padding_mask": torch.rand(BATCH, seqlen) < 0.3,
            "attn_mask": torch.randn(BATCH, 1, seqlen, seqlen),
        }
        torch.testing.assert_close(compiled(x, x, x, **masks), ours(x, x, x, **masks))


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


# ---- without memory ----


@pytest.mark.parametrize("need_weights", [True, False])
def test_on_the_meta_device(need_weights):
    with torch.device("meta"):
        module = MultiHeadAttention(EMBED, HEADS, dropout=0.1, batch_first=True)
        x = torch.randn(BATCH, SEQLEN_Q, EMBED, requires_grad=True)
    padding = torch.zeros(BATCH, SEQLEN_Q, dtype=torch.bool, device="meta")
    for train in (True, False):
        out, weights = module.train(train)(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        assert out.is_meta and out.shape == x.shape
        assert (None if weights is None else weights.shape) == ((BATCH, SEQLEN_Q, SEQLEN_Q) if need_weights else None)
        (grad,) = torch.autograd.grad(out, x, torch.empty_like(out))
        assert grad.is_meta and grad.shape == x.shape
