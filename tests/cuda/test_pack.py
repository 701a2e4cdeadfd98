"""The struct that kernels get: every field, read back through a twin of csrc/attention.h."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from fastattn.params import UNBOUNDED, AttentionParams, Buffers
from tests.support.attention_struct import BiasGrad, PerRow, Rows, Scores, Struct
from tests.support.packing import NO_BIAS_GRAD, assert_fields, buffers, launcher, pack, problem, qkv, rows, scores

SOURCES = Path(__file__).parents[2] / "csrc"
HEADER = SOURCES / "attention.h"


def test_twin_names_the_fields_of_the_header():
    text = re.sub(r"//.*", "", HEADER.read_text())
    structs = dict(re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL))
    twins = {"Rows": Rows, "Scores": Scores, "PerRow": PerRow, "BiasGrad": BiasGrad, "AttentionParams": Struct}
    assert set(structs) == set(twins)
    for name, body in structs.items():
        declared = [re.findall(r"\w+(?=\s*[,;])", line) for line in body.splitlines()]
        assert sum(declared, []) == [field for field, *_ in twins[name]._fields_], name


@pytest.mark.parametrize(("enum", "twin"), [("ParamsField", AttentionParams), ("BuffersField", Buffers)])
def test_positions_are_those_of_the_tuples(enum, twin):
    (body,) = re.findall(rf"enum {enum} \{{(.*?)\}};", (SOURCES / "pack.h").read_text(), re.DOTALL)
    *names, count = re.findall(r"k(\w+)", body)
    assert count == enum + "s"
    assert [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names] == list(twin._fields)


# ---- the problem ----


def test_dense():
    q, k, v = qkv(nheads=4, nheads_k=2)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    out, lse = torch.empty(3, 5, 4, 12).transpose(1, 2), torch.empty(3, 4, 5)
    packed = pack(problem(q, k, v, left=3, right=0, bottom_right=True, scale=-0.5), buffers(out, lse))
    assert packed == {
        **{"q": rows(q), "k": rows(k), "v": rows(v), "out": rows(out)},
        "lse": {"data": lse.data_ptr(), "batch": 20, "head": 5},
        **{"mask": scores(None), "bias": scores(None), "bias_type": 0},
        **{name: rows(None) for name in ("dout", "dq", "dk", "dv")},
        **{name: {"data": None, "batch": 20, "head": 5} for name in ("dlse", "delta", "dq_sum")},
        "dbias": NO_BIAS_GRAD,
        **{"cu_seqlens_q": None, "cu_seqlens_k": None, "total_q": 0, "total_k": 0},
        **{"batch": 3, "nheads": 4, "nheads_k": 2, "seqlen_q": 5, "seqlen_k": 7, "head_dim": 8, "head_dim_v": 12},
        **{"seqused_k": None, "scale": -0.5, "softcap": 0.0, "left": 3, "right": 0, "bottom_right": 1},
        **{"seed": None, "dropout_threshold": 0, "dropout_rescale": 1.0},
    }
    assert packed["k"] == {"data": k.data_ptr(), "batch": 7 * 16, "head": 8, "row": 16, "is_aligned": 1}


def test_packed():
    q, k, v = torch.randn(20, 4, 8), torch.randn(30, 2, 8), torch.randn(2, 30, 12).transpose(0, 1)
    cu_seqlens_q = torch.tensor([0, 5, 11, 20], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 6, 13, 29], dtype=torch.int32)
    sequences = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": 9, "max_seqlen_k": 16}
    out, lse = torch.empty(20, 4, 12), torch.empty(4, 20)
    packed = pack(problem(q, k, v, **sequences), buffers(out, lse))
    assert_fields(packed, {"q": rows(q), "k": rows(k), "v": rows(v), "out": rows(out)})
    assert packed["v"] == {"data": v.data_ptr(), "batch": 0, "head": 360, "row": 12, "is_aligned": 1}
    assert packed["lse"] == {"data": lse.data_ptr(), "batch": 0, "head": 20}
    assert_fields(packed, {"cu_seqlens_q": cu_seqlens_q.data_ptr(), "cu_seqlens_k": cu_seqlens_k.data_ptr()})
    assert_fields(packed, {"total_q": 20, "total_k": 30, "batch": 3, "nheads": 4, "nheads_k": 2})
    assert_fields(packed, {"seqlen_q": 9, "seqlen_k": 16, "head_dim": 8, "head_dim_v": 12})


def test_backward():
    q, k, v = qkv(nheads=4, nheads_k=2)
    out, dout = torch.empty(2, 3, 4, 5, 12).unbind()
    lse, dlse, delta = torch.empty(3, 3, 4, 5).unbind()
    dq, dk, dv, dq_sum = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty(3, 4, 5, 8)
    dbias_partial, dbias = torch.empty(6, 3, 1, 5, 7), torch.empty(3, 1, 5, 7)
    given = buffers(out, lse, dout, dlse, delta, dq, dk, dv, dq_sum, dbias_partial, dbias)
    packed = pack(problem(q, k, v), given)
    assert_fields(packed, {"out": rows(out), "dout": rows(dout), "dq": rows(dq), "dk": rows(dk), "dv": rows(dv)})
    for name, x in {"lse": lse, "dlse": dlse, "delta": delta, "dq_sum": dq_sum}.items():
        assert packed[name] == {"data": x.data_ptr(), "batch": 20, "head": 5}, name
    sizes = {"copies": 6, "batch": 3, "heads": 1, "rows": 5, "keys": 7}
    assert packed["dbias"] == {"data": dbias.data_ptr(), "partial": dbias_partial.data_ptr(), **sizes}


def test_expanded_tensor_keeps_its_strides():
    q, k, v = qkv()
    k, v = k[:, :1].expand(3, 2, 7, 8), v[:1].expand(3, 2, 7, 12)
    packed = pack(problem(q, k, v))
    assert packed["k"] == {"data": k.data_ptr(), "batch": 112, "head": 0, "row": 8, "is_aligned": 1}
    assert packed["v"] == {"data": v.data_ptr(), "batch": 0, "head": 84, "row": 12, "is_aligned": 1}


def test_no_queries_and_no_keys():
    q, k, v = torch.randn(3, 2, 0, 8), torch.randn(3, 2, 0, 8), torch.randn(3, 2, 0, 12)
    packed = pack(problem(q, k, v), buffers(torch.empty(3, 2, 0, 12), torch.empty(3, 2, 0)))
    assert_fields(packed, {"batch": 3, "nheads": 2, "seqlen_q": 0, "seqlen_k": 0, "head_dim": 8, "head_dim_v": 12})
    assert packed["lse"] == {"data": None, "batch": 0, "head": 0}


def test_longest_sequences():
    """Lengths below 2^29 are packed: a band's edge and a position then add up within 32 bits."""
    longest = torch.empty(1, 1, 1, 8).expand(1, 1, 2**29 - 1, 8)
    packed = pack(problem(longest, longest, longest))
    assert_fields(packed, {"seqlen_q": 2**29 - 1, "seqlen_k": 2**29 - 1})


# ---- mask and bias ----

SCORES = {
    (3, 2, 5, 7): (70, 35, 7, 1),
    (3, 1, 1, 7): (7, 0, 0, 1),
    (1, 2, 5, 1): (0, 5, 1, 0),
    (1, 1, 5, 7): (0, 0, 7, 1),
    (1, 1, 1, 1): (0, 0, 0, 0),
}


@pytest.mark.parametrize("size", SCORES, ids=str)
def test_mask_and_bias_broadcast_by_strides_of_0(size):
    mask, bias = torch.rand(size) > 0.5, torch.randn(size)
    packed = pack(problem(*qkv(), mask=mask))
    assert_fields(packed, {"mask": scores(mask, SCORES[size]), "bias": scores(None)})
    packed = pack(problem(*qkv(), bias=bias))
    assert_fields(packed, {"mask": scores(None), "bias": scores(bias, SCORES[size])})


def test_strides_of_mask_and_bias_are_their_own():
    mask, bias = torch.rand(7, 5, 2, 3).permute(3, 2, 1, 0) > 0.5, torch.randn(1, 1, 5, 7).expand(3, 2, 5, 7)
    packed = pack(problem(*qkv(), mask=mask, bias=bias))
    assert_fields(packed, {"mask": scores(mask, (1, 3, 6, 30)), "bias": scores(bias, (0, 0, 7, 1))})


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 2)], ids=str)
def test_bias_type(dtype, code):
    text = re.sub(r"\s+", " ", HEADER.read_text())
    assert "enum BiasType { kBiasFloat32, kBiasFloat16, kBiasBfloat16 };" in text
    bias = torch.randn(3, 2, 5, 7).to(dtype)
    assert_fields(pack(problem(*qkv(), bias=bias)), {"bias": scores(bias, (70, 35, 7, 1)), "bias_type": code})


# ---- numbers ----


@pytest.mark.parametrize(
    ("p", "threshold", "rescale"),
    [
        (0, 0, 1.0),
        (0.0, 0, 1.0),
        (1e-12, 0, 1.0),
        (0.1, 429496730, 1.1111112),
        (0.5, 2**31, 2.0),
        (2.5 / 2**32, 2, 1.0),
        (3.5 / 2**32, 4, 1.0),
        (1 - 2**-32, 2**32 - 1, 2.0**32),
        (1 - 1e-12, 0, 0.0),
        (1.0, 0, 0.0),
        (1, 0, 0.0),
    ],
)
def test_dropout(p, threshold, rescale):
    seed = torch.tensor([7])
    packed = pack(problem(*qkv(), dropout_p=p, seed=seed))
    assert_fields(packed, {"seed": seed.data_ptr(), "dropout_threshold": threshold})
    assert packed["dropout_rescale"] == torch.tensor(rescale).item()
    assert threshold == round(p * 2**32) % 2**32  # as the reference decides


@pytest.mark.parametrize("p", torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist())
def test_dropout_like_the_reference(p):
    packed = pack(problem(*qkv(), dropout_p=p))
    assert packed["dropout_threshold"] == round(p * 2**32)
    assert packed["dropout_rescale"] == torch.tensor(1 / (1 - p)).item()


def test_band_edges():
    packed = pack(problem(*qkv(), left=UNBOUNDED, right=-3))
    assert_fields(packed, {"left": 2**31 - 1, "right": -3, "bottom_right": 0})


# ---- references ----


def test_nothing_is_kept():
    p, given = problem(*qkv(), bias=torch.randn(3, 1, 1, 7)), buffers(torch.empty(3, 2, 5, 12), torch.empty(3, 2, 5))
    launcher.pack("float32", p, given)
    references, blocks = sys.getrefcount(p.q), sys.getallocatedblocks()
    for _ in range(1000):
        launcher.pack("float32", p, given)
    more_references, more_blocks = sys.getrefcount(p.q) - references, sys.getallocatedblocks() - blocks
    assert more_references == 0
    assert more_blocks < 100
