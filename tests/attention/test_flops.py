"""What counters of floating-point operations say about fastattn."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from tests.support.module_calls import BATCH, EMBED, SEQLEN_Q

B, H, HK, N, M, D, DV = 2, 4, 2, 5, 7, 8, 16


def dense():
    return torch.randn(B, H, N, D), torch.randn(B, HK, M, D), torch.randn(B, HK, M, DV)


def packed(lengths):
    total = sum(lengths)
    return torch.randn(total, H, D), torch.randn(total, HK, D), torch.randn(total, HK, DV)


def counted(call, *tensors):
    """FLOPs of a call, and of its backward pass."""
    tensors = [x.requires_grad_() for x in tensors]
    with FlopCounterMode(display=False) as counter:
        out = call(*tensors)
        forward = counter.get_total_flops()
        out.backward(torch.randn_like(out))
        return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True, "dropout_p": 0.5}, {"window": (1, 1)}], ids=str)
def test_dense(arguments):
    def call(*qkv):
        return fastattn.scaled_dot_product_attention(*qkv, enable_gqa=True, return_lse=True, **arguments)[0]

    scores = B * H * N * M
    assert counted(call, *dense()) == (2 * scores * (D + DV), 2 * scores * (3 * D + 2 * DV))


def test_dense_is_counted_as_torchs_own_kernels_are():
    flop_counter = importlib.import_module("torch.utils.flop_counter")
    q, k, v = (torch.randn(B, H, length, D) for length in (N, M, M))
    shapes = q.shape, k.shape, v.shape
    expected = flop_counter.sdpa_flop_count(*shapes), flop_counter.sdpa_backward_flop_count(q.shape, *shapes)
    assert counted(lambda *qkv: fastattn.scaled_dot_product_attention(*qkv, return_lse=True)[0], q, k, v) == expected


def test_lengths_of_keys_are_counted():
    used = torch.tensor([2, 7], dtype=torch.int32)

    def call(*qkv):
        return fastattn.scaled_dot_product_attention(*qkv, enable_gqa=True, seqused_k=used)

    assert counted(call, *dense())[0] == 2 * H * N * (2 + 7) * (D + DV)


def test_packed_counts_the_lengths():
    lengths = [3, 0, 5, 1]
    edges = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)

    def call(*qkv):
        return fastattn.varlen_attention(*qkv, edges, edges, 5, 6, enable_gqa=True)

    scores = H * sum(n * n for n in lengths)
    assert counted(call, *packed(lengths)) == (2 * scores * (D + DV), 2 * scores * (3 * D + 2 * DV))


def test_packed_without_numbers_counts_the_longest_length():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        edges = torch.empty(4, dtype=torch.int32)
        operator = torch.ops.fastattn.attention_fwd
        q, k, v = packed([9])
        operator(
            q, k, v, None, None, None, edges, edges, None, 5, 6, 1.0, 0.0, 0.0, 2**31 - 1, 2**31 - 1, False, "torch"
        )
    assert counter.get_total_flops() == 3 * H * 5 * 6 * 2 * (D + DV)


def test_a_replaced_layer_counts_its_attention():
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, batch_first=True)
    x = torch.randn(BATCH, SEQLEN_Q, EMBED)
    linear = 2 * BATCH * SEQLEN_Q * (4 * EMBED * EMBED + 2 * EMBED * 16)
    attention = 2 * 2 * BATCH * SEQLEN_Q * SEQLEN_Q * EMBED
    assert counted(fastattn.replace_attention(layer), x)[0] == linear + attention


def test_torchs_function_is_counted_as_torchs_function():
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    with fastattn.use_backend("torch"):
        ours = counted(fastattn.scaled_dot_product_attention, q, k, v)
    assert ours == counted(F.scaled_dot_product_attention, q, k, v)


IMPORT = """
import json, sys, torch
BEFORE
import fastattn
early = "torch.utils.flop_counter" in sys.modules
from torch.utils.flop_counter import flop_registry
names = [str(op) for op in flop_registry if "fastattn" in str(op)]
print(json.dumps([early, sorted(names), sum("flops" in type(f).__module__ for f in sys.meta_path)]))
"""


@pytest.mark.long
@pytest.mark.parametrize("before", ["", "import torch.utils.flop_counter"], ids=["later", "earlier"])
def test_registered_whenever_the_counter_is_imported(before):
    done = subprocess.run([sys.executable, "-c", IMPORT.replace("BEFORE", before)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [bool(before), ["fastattn.attention_bwd", "fastattn.attention_fwd"], 0]


# ---- ptflops ----


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops_with_its_hook_for_torchs_module(backend):
    ptflops = pytest.importorskip("ptflops")
    from ptflops.pytorch_ops import multihead_attention_counter_hook

    layer = nn.TransformerEncoderLayer(EMBED, 2, 16)
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
    expected = ptflops.get_model_complexity_info(layer, (SEQLEN_Q, EMBED), **options)
    options["custom_modules_hooks"] = {fastattn.MultiHeadAttention: multihead_attention_counter_hook}
    replaced = fastattn.replace_attention(layer)
    assert ptflops.get_model_complexity_info(replaced, (SEQLEN_Q, EMBED), **options) == expected
