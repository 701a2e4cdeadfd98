"""Torch's own samples of its attention function and of its modules, with fastattn's in their place."""

import copy
import importlib
import itertools
from functools import cache
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fastattn
from fastattn import reference
from fastattn.arguments import attention_params, draw_seed
from tests.support.contract import dense_condition
from tests.support.tolerance import Condition, assert_close_to_oracle

# To import torch's samples takes seconds, and more memory than all other tests of a worker.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning", "ignore:Support for mismatched:"),
]

MODULES = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)


def of_torchs_tests(name):
    """A module of torch's own tests, which would freeze the flags of torch.backends in the whole process."""
    with mock.patch("torch.backends.disable_global_flags"):
        return importlib.import_module(f"torch.testing._internal.{name}")


def in_dtype(dtype, values):
    """A nest of arguments with the floating-point tensors as new leaves in another dtype."""

    def convert(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)

    return tree_map(convert, values)


def leaves_of(values):
    found = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) and x.requires_grad else None, values)
    return found


def with_gradients(out, leaves):
    """The output and the gradient of every leaf, for a random upstream gradient, which comes last."""
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True), upstream


def assert_same(actual, expected):
    """In float64, where everything is equal but for rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ---- the function ----


@cache
def function_samples():
    """(query, key, value), arguments of every sample of F.scaled_dot_product_attention, in float64."""
    op_db = of_torchs_tests("common_methods_invocations").op_db
    (op,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
    return [((sample.input, *sample.args), sample.kwargs) for sample in samples]


def batch_and_heads(q, k):
    """The dimensions of the output before its last two, all batch dimensions as one."""
    *batch, nheads = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    return torch.Size(batch).numel(), nheads


def torch_function(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """Torch's function, with the dropout that fastattn draws next."""
    if dropout_p == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
    shape = (*batch_and_heads(q, k), q.size(-2), k.size(-2))
    one = torch.zeros(1, 1, 1, 1)
    seed = draw_seed(attention_params(one, one, one, dropout_p=dropout_p)).seed
    kept = reference.dropout_mask(seed, *shape, dropout_p)
    kept = kept.view(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]) + shape[2:])
    return torch._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, kept)[0]


def run_function(function, dtype, sample):
    tensors, arguments = in_dtype(dtype, sample)
    torch.manual_seed(3)
    return with_gradients(function(*tensors, **arguments), leaves_of((tensors, arguments)))


def condition(sample, dout):
    """What the tolerance depends on, of a sample as a problem of four dimensions."""
    tensors, arguments = sample
    q, k = tensors[:2]
    dense = [x.detach().expand(*batch_and_heads(q, k), -1, -1) if x.dim() < 4 else x.detach() for x in (*tensors, dout)]
    rest = {"is_causal": arguments.get("is_causal", False)}
    return dense_condition(tuple(dense), None, arguments.get("attn_mask"), arguments.get("dropout_p", 0.0), rest)


@pytest.mark.filterwarnings("ignore:Dropout mask should only be used for testing:UserWarning")
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16, torch.bfloat16))],
    ids=str,
)
def test_samples_of_the_function(dtype):
    samples = function_samples()
    assert len(samples) > 20
    for sample in samples:
        *actual, _ = run_function(fastattn.scaled_dot_product_attention, dtype, sample)
        *oracle, dout = run_function(torch_function, torch.float64, sample)
        if dtype == torch.float64:
            assert_same(actual, oracle)
            continue
        *eager, _ = run_function(torch_function, dtype, sample)
        rounding = condition(sample, dout)
        for name, *results in zip(("out", "dq", "dk", "dv", "dbias"), actual, oracle, eager, strict=False):
            assert_close_to_oracle(name, *results, rounding)


# ---- the modules ----


@cache
def module_samples(module_class, train):
    """(constructor's arguments, forward's arguments) of every sample of a module, in float64."""
    if module_class is nn.TransformerDecoder:  # which torch has no samples of
        layers = module_samples(nn.TransformerDecoderLayer, train)
        return [(((nn.TransformerDecoderLayer(*args, **kwargs), 2), {}), call) for (args, kwargs), call in layers]
    module_db = of_torchs_tests("common_modules").module_db
    (info,) = (info for info in module_db if info.module_cls is module_class)
    samples = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=train)
    inputs = [(sample.constructor_input, sample.forward_input) for sample in samples]
    return [((new.args, new.kwargs), (call.args, call.kwargs)) for new, call in inputs]


def make_module(module_class, args, kwargs):
    module = module_class(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in module.parameters():  # some of which are 0 at first
            parameter.normal_(std=0.5)
    return module


def run_module(module, dtype, call):
    """Outputs and gradients of a copy of a module in another dtype."""
    module = copy.deepcopy(module).to(dtype)
    args, kwargs = in_dtype(dtype, call)
    results = module(*args, **kwargs)
    out, weights = results if isinstance(results, tuple) else (results, None)
    outputs, *gradients, _ = with_gradients(out, [*leaves_of((args, kwargs)), *module.parameters()])
    return [outputs] if weights is None else [outputs, weights.detach()], gradients


def end_to_end(tensors):
    return torch.cat([x.flatten() for x in tensors if x is not None])


def largest_score(calls):
    """Of the absolute terms of the scores of all attention in a module, which rounding grows with."""
    scores = [abs(p.scale) * p.q.detach().abs() @ p.k.detach().abs().transpose(-1, -2) for p in calls]
    return max(float(x.max()) for x in scores)


def module_cases():
    """Every module: some samples in one mode, the modes by turns; in make test-all every sample in every mode."""
    modes = list(itertools.product((torch.float32, torch.float64), (True, False)))
    for index, module_class in enumerate(MODULES):
        yield pytest.param(module_class, *modes[index % len(modes)], 5, id=f"{module_class.__name__}-some")
        for dtype, train in modes:
            name = f"{module_class.__name__}-{dtype}-{'train' if train else 'eval'}"
            yield pytest.param(module_class, dtype, train, 1, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("module_class", "dtype", "train", "step"), list(module_cases()))
def test_samples_of_a_module(module_class, dtype, train, step, attended):
    samples = module_samples(module_class, train)
    assert len(samples) > 20
    for (args, kwargs), call in samples[::step]:
        stock = make_module(module_class, args, kwargs).train(train)
        ours = fastattn.replace_attention(copy.deepcopy(stock))
        actual, oracle = run_module(ours, dtype, call), run_module(stock, torch.float64, call)
        assert attended
        if dtype == torch.float64:
            assert_same(actual, oracle)
            continue
        eager = run_module(stock, dtype, call)
        rounding = Condition(largest_score(attended), terms={})
        for kind, *results in zip(("out", "dq"), actual, oracle, eager, strict=True):
            # Together, since a tensor of a few numbers may happen to have no error in eager.
            assert_close_to_oracle(kind, *map(end_to_end, results), rounding)
        attended.clear()
