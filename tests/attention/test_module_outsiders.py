"""Code from outside that looks into MultiHeadAttention as if it were torch's module, whose names it knows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn import MultiHeadAttention, replace_attention
from tests.support.module_calls import BATCH, CONSTRUCTORS, EMBED, HEADS, SEQLEN_Q, make_call, make_pair

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_torchs_function_with_the_modules_fields(constructor):
    stock, ours = make_pair(**CONSTRUCTORS[constructor] | {"batch_first": False})
    arguments = make_call(stock, {"inputs": "apart"})
    assert ours._qkv_same_embed_dim is stock._qkv_same_embed_dim
    separate = not ours._qkv_same_embed_dim
    apart = {f"{x}_proj_weight": getattr(ours, f"{x}_proj_weight") for x in "qkv"} if separate else {}
    actual = F.multi_head_attention_forward(
        arguments["query"], arguments["key"], arguments["value"], ours.embed_dim, ours.num_heads,
        ours.in_proj_weight, ours.in_proj_bias, ours.bias_k, ours.bias_v, ours.add_zero_attn,
        ours.dropout, ours.out_proj.weight, ours.out_proj.bias, use_separate_proj_weight=separate, **apart,
    )  # fmt: skip
    same(actual, stock(**arguments))


def test_torchs_own_forward():
    """Which a wrapper may have kept."""
    stock, ours = make_pair(batch_first=True)
    arguments = make_call(stock, {"inputs": "memory"})
    same(nn.MultiheadAttention.forward(ours, **arguments), stock(**arguments))


@pytest.mark.parametrize("sizes", [{"head_dim": 5}, {"v_head_dim": 5}])
def test_weights_that_only_fastattn_can_use_are_not_called_the_same(sizes):
    assert MultiHeadAttention(EMBED, HEADS, **sizes)._qkv_same_embed_dim is False


class Quantizable(torch.ao.nn.quantizable.MultiheadAttention):
    """Torch's, which insists on the exact class of the module that it copies."""

    _FLOAT_MODULE = MultiHeadAttention


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:None of the submodule got qconfig")
@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 10}])
def test_quantizable_module_of_torch(sizes):
    _, ours = make_pair(torch.float32, **sizes)
    ours.qconfig = None
    arguments = make_call(ours, {"inputs": "apart"}, torch.float32)
    torch.testing.assert_close(Quantizable.from_float(ours).eval()(**arguments), ours(**arguments))


# ---- adapters ----


class Adapter(nn.Module):
    """What PEFT's LoRA of nn.MultiheadAttention does: merged weights in place of the module's while it runs."""

    def __init__(self, base):
        super().__init__()
        if not base._qkv_same_embed_dim:
            raise ValueError("the projections of query, key and value must be one")
        self.base = base
        self.delta = nn.Parameter(torch.randn_like(base.in_proj_weight))

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("base", "delta") else getattr(self.base, name)

    @property
    def _qkv_same_embed_dim(self):
        return self.base._qkv_same_embed_dim

    def forward(self, *args, **kwargs):
        weight = self.base.in_proj_weight
        del self.base.in_proj_weight
        self.base.in_proj_weight = weight.detach() + self.delta
        try:
            return self.base(*args, **kwargs)
        finally:
            del self.base.in_proj_weight
            self.base.register_parameter("in_proj_weight", weight)


def adapted_layers(adapter):
    """A layer of torch with an adapter, and the same with fastattn's attention below it; both frozen but for it."""
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(EMBED, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = replace_attention(copy.deepcopy(stock))
    layers = []
    for layer in (stock, ours):
        torch.manual_seed(1)
        layers.append(adapter(layer.requires_grad_(False)))
    return layers


def lora(layer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    return peft.get_peft_model(layer, config)


def stand_in(layer):
    layer.self_attn = Adapter(layer.self_attn)
    return layer


@pytest.mark.parametrize("adapter", [stand_in, pytest.param(lora, marks=pytest.mark.long)])
def test_adapters_on_a_replaced_module(adapter, attended):
    stock, ours = adapted_layers(adapter)
    x = torch.randn(BATCH, SEQLEN_Q, EMBED, dtype=torch.float64)
    upstream = torch.randn_like(x)
    results = []
    for layer in (stock, ours):
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        out = layer(x)
        results.append((out, torch.autograd.grad(out, trained, upstream)))
    same(results[1], results[0])
    assert len(attended) == 1
    with torch.no_grad():  # where torch's own kernel, of which the adapter knows nothing, would take the bare weights
        same(ours.eval()(x), results[0][0])
    assert len(attended) == 2
