"""replace_attention: whole torch models before and after the swap."""

import copy
import warnings
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastattn.integrations.torch import replace_attention
from fastattn.modules import MultiHeadAttention

DIM, HEADS, BATCH, SEQLEN, SEQLEN_MEMORY = 8, 2, 3, 5, 6

# What torch says about its own layers: nested tensors, and bool padding with a float mask, which nn.Transformer makes.
pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
    "ignore:Support for mismatched:UserWarning",
    "ignore:replace_attention. left as they are. special:UserWarning",
)

LAYER = {"d_model": DIM, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.0, "dtype": torch.float64}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def padding(*lengths):
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def swapped_copy(model, **kwargs):
    return replace_attention(copy.deepcopy(model), **kwargs)


def sequence_first(x, batch_first):
    return x if batch_first else x.transpose(0, 1)


def compare(stock, call, valid, leaves):
    """Outputs at the positions that are no padding, and in training the gradients that flow from there."""
    swapped = swapped_copy(stock)
    outs = [call(model) for model in (stock, swapped)]
    assert outs[1].isfinite().all()
    torch.testing.assert_close(outs[1][valid], outs[0][valid], rtol=1e-9, atol=1e-11)
    if stock.training:
        upstream = torch.randn_like(outs[0]) * valid[..., None]
        expected, actual = (
            torch.autograd.grad(out, [*leaves, *model.parameters()], upstream)
            for out, model in zip(outs, (stock, swapped), strict=True)
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal-padding", "mask-padding"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seqlen_first"])
def test_encoder(attended, batch_first, norm_first, masks, train):
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=batch_first, norm_first=norm_first)
    stock = randomised(nn.TransformerEncoder(layer, 2)).train(train)
    x = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64, requires_grad=train)
    is_padding = padding(5, 3, 1)
    kwargs = {}
    if "padding" in masks:
        kwargs["src_key_padding_mask"] = is_padding
    if "causal" in masks:
        kwargs["mask"] = nn.Transformer.generate_square_subsequent_mask(SEQLEN, dtype=torch.float64)
    elif "mask" in masks:
        kwargs["mask"] = torch.rand(SEQLEN, SEQLEN) < 0.4
        kwargs["mask"][:, 0] = False

    def call(model):
        with torch.set_grad_enabled(train):
            return sequence_first(model(sequence_first(x, batch_first), **kwargs), batch_first)

    compare(stock, call, ~is_padding, [x])
    assert len(attended) == stock.num_layers
    assert all((params.right == 0) == ("causal" in masks) for params in attended)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("is_padded", [True, False], ids=["padding", "full"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seqlen_first"])
def test_decoder(attended, batch_first, is_padded, train):
    layer = nn.TransformerDecoderLayer(**LAYER, batch_first=batch_first)
    stock = randomised(nn.TransformerDecoder(layer, 2)).train(train)
    x = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(BATCH, SEQLEN_MEMORY, DIM, dtype=torch.float64, requires_grad=True)
    is_padding = padding(5, 3, 1)
    kwargs = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(SEQLEN, dtype=torch.float64)}
    if is_padded:
        kwargs |= {"tgt_key_padding_mask": is_padding, "memory_key_padding_mask": padding(2, 6, 4)}

    def call(model):
        inputs = (sequence_first(tensor, batch_first) for tensor in (x, memory))
        return sequence_first(model(*inputs, **kwargs), batch_first)

    compare(stock, call, ~is_padding, [x, memory])
    assert [params.right == 0 for params in attended] == [True, False] * 2


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_transformer(attended, train):
    stock = nn.Transformer(**LAYER, num_encoder_layers=2, num_decoder_layers=2, batch_first=True)
    stock = randomised(stock).train(train)
    source = torch.randn(BATCH, SEQLEN_MEMORY, DIM, dtype=torch.float64, requires_grad=train)
    target = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64, requires_grad=train)
    is_padding, source_padding = padding(5, 3, 1), padding(2, 6, 4)
    causal = nn.Transformer.generate_square_subsequent_mask(SEQLEN, dtype=torch.float64)

    def call(model):
        with torch.set_grad_enabled(train):
            return model(
                source,
                target,
                tgt_mask=causal,
                src_key_padding_mask=source_padding,
                tgt_key_padding_mask=is_padding,
                memory_key_padding_mask=source_padding,
            )

    compare(stock, call, ~is_padding, [source, target])
    assert len(attended) == 2 + 2 * 2


def test_a_sentence_of_padding_only_stays_finite():
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    swapped = replace_attention(randomised(nn.TransformerEncoder(layer, 2)))
    x = torch.randn(2, SEQLEN, DIM, dtype=torch.float64)
    is_padding = padding(0, 5)
    for train in (True, False):
        assert swapped.train(train)(x, src_key_padding_mask=is_padding).isfinite().all()


class Model(nn.Module):
    """Attention in the places where models keep it: a list, an attribute, twice the same, and a kind of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, HEADS)}) for _ in range(2))
        self.cross = nn.MultiheadAttention(DIM, HEADS, kdim=4, vdim=6, add_bias_kv=True, dropout=0.1)
        self.again = self.blocks[0]["attention"]
        self.special = SpecialAttention(DIM, HEADS)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["attention"](x, x, x)[0]
        return x + self.again(x, x, x)[0]


class SpecialAttention(nn.MultiheadAttention):
    """A subclass, which is not replaced: it may compute something else."""


def test_custom_model():
    stock = Model()
    swapped = swapped_copy(stock)
    x = torch.randn(SEQLEN, BATCH, DIM)
    torch.testing.assert_close(swapped(x), stock(x))
    classes = {name: type(m) for name, m in swapped.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert classes == {
        "blocks.0.attention": MultiHeadAttention,
        "blocks.1.attention": MultiHeadAttention,
        "cross": MultiHeadAttention,
        "special": SpecialAttention,
    }
    assert swapped.again is swapped.blocks[0]["attention"]
    torch.testing.assert_close(swapped.state_dict(), stock.state_dict())
    stock.load_state_dict(swapped.state_dict())


def test_optimizer_keeps_working():
    model = randomised(Model())
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert replace_attention(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    before = model.blocks[1]["attention"].in_proj_weight.clone()
    x = torch.randn(SEQLEN, BATCH, DIM)
    (model(x) * torch.randn_like(x)).sum().backward()
    optimizer.step()
    weight = model.blocks[1]["attention"].in_proj_weight
    torch.testing.assert_close(weight, before - 0.1 * weight.grad)
    assert weight.grad.any()


def test_module_state_is_kept():
    module = nn.MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True, dtype=torch.float64).eval()
    module.in_proj_weight.requires_grad_(False)
    module.tag = "mine"
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    swapped = replace_attention(module)
    assert type(swapped) is MultiHeadAttention
    assert not swapped.training and not swapped.in_proj_weight.requires_grad
    assert (swapped.dropout, swapped.batch_first, swapped.tag) == (0.5, True, "mine")
    x = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64)
    out, _ = swapped(x, x, x)
    assert torch.equal(seen[0], out)
    handle.remove()
    swapped(x, x, x)
    assert len(seen) == 1
    assert type(copy.deepcopy(swapped)) is MultiHeadAttention


def test_need_weights_false_switches_the_weights_off():
    model = Model()
    replace_attention(model, need_weights=False)
    x, key, value = (torch.randn(SEQLEN, BATCH, features) for features in (DIM, 4, 6))
    assert model.cross(x, key, value, need_weights=True)[1] is None
    assert model.blocks[0]["attention"](x, x, x)[1] is None
    replace_attention(model)
    assert model.cross(x, key, value)[1].shape == (BATCH, SEQLEN, SEQLEN + 1)
    assert model.cross(x, key, value, need_weights=False)[1] is None


def test_need_weights_must_be_none_or_false():
    with pytest.raises(ValueError, match="need_weights: must be None or False, got True"):
        replace_attention(Model(), need_weights=True)


def test_warns_when_there_is_nothing_to_replace():
    with pytest.warns(UserWarning, match="no nn.MultiheadAttention in Linear"):
        replace_attention(nn.Linear(2, 2))
    model = replace_attention(nn.TransformerEncoderLayer(**LAYER))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_attention(model)


# ---- modules that are no plain nn.MultiheadAttention ----


def wrap(module):
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


@pytest.mark.filterwarnings("default:replace_attention. left as they are. special:UserWarning")
def test_names_in_one_warning_what_it_leaves():
    model = Model()
    wrap(model.cross)
    model.quantizable = torch.ao.nn.quantizable.MultiheadAttention(DIM, HEADS)
    with pytest.warns(UserWarning) as warned:
        replace_attention(model)
    message = (
        "replace_attention: left as they are:"
        " cross (its forward is set on the module; replace first, wrap or compile afterwards),"
        " special (a subclass of nn.MultiheadAttention, SpecialAttention),"
        " quantizable (a subclass of nn.MultiheadAttention, MultiheadAttention)"
    )
    assert [str(warning.message) for warning in warned] == [message]
    with pytest.warns(UserWarning, match=r"the model itself \(a subclass of nn.MultiheadAttention, SpecialAttention\)"):
        replace_attention(SpecialAttention(DIM, HEADS))


@pytest.mark.filterwarnings("ignore:replace_attention. left as they are. self_attn:UserWarning")
@pytest.mark.parametrize("wrapper", [wrap, pytest.param(None, marks=pytest.mark.long, id="compile")])
def test_a_wrapped_forward_before_the_swap_goes_on_working(wrapper):
    stock = randomised(nn.TransformerEncoderLayer(**LAYER))
    swapped = copy.deepcopy(stock)
    if wrapper is None:
        swapped.self_attn.forward = torch.compile(swapped.self_attn.forward, backend="eager")
    else:
        wrapper(swapped.self_attn)
    replace_attention(swapped)
    x = torch.randn(SEQLEN, BATCH, DIM, dtype=torch.float64)
    for train in (True, False):
        torch.testing.assert_close(swapped.train(train)(x), stock.train(train)(x))


def test_a_wrapped_forward_after_the_swap_is_called(attended):
    layer = replace_attention(nn.TransformerEncoderLayer(**LAYER, batch_first=True)).eval()
    wrap(layer.self_attn)
    with torch.no_grad():
        layer(torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64))
    assert len(attended) == 1


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x


def test_a_parametrized_module_is_replaced(attended):
    stock = randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER, batch_first=True), 2)).eval()
    attention = stock.layers[0].self_attn
    parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
    parametrizations.weight_norm(attention.out_proj)
    x = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64)
    expected = stock(x)
    replace_attention(stock)
    torch.testing.assert_close(stock(x), expected)
    assert len(attended) == 2
    torch.testing.assert_close(attention.in_proj_weight, 2 * attention.parametrizations.in_proj_weight.original)
    parametrize.remove_parametrizations(attention, "in_proj_weight")
    assert type(attention) is MultiHeadAttention
    torch.testing.assert_close(stock(x), expected)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_a_fully_sharded_module_is_replaced(attended):
    """A parametrized one, so that torch has made a class upon a class."""
    from torch.distributed import FileStore, destroy_process_group, device_mesh, fsdp, init_process_group

    stock = randomised(nn.TransformerEncoderLayer(**LAYER, batch_first=True)).eval()
    parametrize.register_parametrization(stock.self_attn, "in_proj_weight", Doubled())
    x = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64)
    with TemporaryDirectory() as folder:
        init_process_group("gloo", store=FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            fsdp.fully_shard(stock.self_attn, mesh=device_mesh.init_device_mesh("cpu", (1,)))
            expected = stock(x)
            assert not attended
            torch.testing.assert_close(replace_attention(stock)(x), expected)
        finally:
            destroy_process_group()
    assert len(attended) == 1 and isinstance(stock.self_attn, fsdp.FSDPModule)
    parametrized = type(stock.self_attn).__mro__[2]  # where torch looks for the class that it sharded
    assert parametrized.__bases__ == (MultiHeadAttention,)


@pytest.mark.long
def test_swapped_layer_compiles():
    layer = replace_attention(randomised(nn.TransformerEncoderLayer(**LAYER, batch_first=True)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, SEQLEN, DIM, dtype=torch.float64, requires_grad=True)
    outs = [model(x, src_key_padding_mask=padding(5, 3, 1)) for model in (layer, compiled)]
    upstream = torch.randn_like(x)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream) for out in outs))
