"""The struct that kernels get: every field, read back through a twin of csrc/attention.h."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.params import UNBOUNDED, AttentionParams
from tests.support.attention_struct import BiasGrad, PerRow, Rows, Scores, Struct, as_dict

launcher = pytest.importorskip("fastattn._launcher", reason="fastattn._launcher is not built: it takes a C++ compiler")
cuda = pytest.importorskip("fastattn.cuda_kernels.attention")
SOURCES = Path(__file__).parents[2] / "csrc"
HEADER = SOURCES / "attention.h"


def problem(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> AttentionParams:
    p = AttentionParams(
        q, k, v, None, None, None, None, None, q.size(-2), k.size(-2), 0.25, 0.0, UNBOUNDED, UNBOUNDED, False
    )
    return p.replace(**changes)


def buffers(*first: Tensor, **others: Tensor) -> Any:
    """cuda.Buffers with nothing but these."""
    given = dict(zip(cuda.Buffers._fields, first, strict=False)) | others
    return cuda.Buffers(**dict.fromkeys(cuda.Buffers._fields) | given)


def pack(p: AttentionParams, given: Any = None) -> dict[str, Any]:
    """The packed struct as nested dicts."""
    packed = launcher.pack(cuda.ELEMENTS[p.q.dtype], p, given or buffers())
    assert len(packed) == ctypes.sizeof(Struct)
    return as_dict(Struct.from_buffer_copy(packed))


def test_twin_names_the_fields_of_the_header():
    text = re.sub(r"//.*", "", HEADER.read_text())
    structs = dict(re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL))
    twins = {"Rows": Rows, "Scores": Scores, "PerRow": PerRow, "BiasGrad": BiasGrad, "AttentionParams": Struct}
    assert set(structs) == set(twins)
    for name, body in structs.items():
        declared = [re.findall(r"\w+(?=\s*[,;])", line) for line in body.splitlines()]
        assert sum(declared, []) == [field for field, *_ in twins[name]._fields_], name


@pytest.mark.parametrize(("enum", "twin"), [("ParamsField", AttentionParams), ("BuffersField", cuda.Buffers)])
def test_positions_are_those_of_the_tuples(enum, twin):
    (body,) = re.findall(rf"enum {enum} \{{(.*?)\}};", (SOURCES / "pack.h").read_text(), re.DOTALL)
    *names, count = re.findall(r"k(\w+)", body)
    assert count == enum + "s"
    assert [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names] == list(twin._fields)


# ---- what is expected ----


def rows(x: Tensor | None, is_aligned: bool = True) -> dict[str, Any]:
    if x is None:
        return {"data": None, "batch": 0, "head": 0, "row": 0, "is_aligned": 0}
    batch, head, row = (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]
    return {"data": x.data_ptr(), "batch": batch, "head": head, "row": row, "is_aligned": int(is_aligned)}


def scores(x: Tensor | None, strides: tuple[int, ...] = (0, 0, 0, 0)) -> dict[str, Any]:
    return {
        "data": None if x is None else x.data_ptr(),
        **dict(zip(("batch", "head", "row", "key"), strides, strict=True)),
    }


NO_BIAS_GRAD = {"data": None, "partial": None, "copies": 0, "batch": 0, "heads": 0, "rows": 0, "keys": 0}


def assert_fields(packed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: packed[name] for name in expected} == expected


def qkv(nheads: int = 2, nheads_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Batch 3, 5 queries, 7 keys, 8 and 12 wide: sizes that cannot be mistaken for each other."""
    sizes = (3, nheads, 5, 8), (3, nheads_k, 7, 8), (3, nheads_k, 7, 12)
    return tuple(torch.randn(size).to(dtype) for size in sizes)


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
        **{"scale": -0.5, "left": 3, "right": 0, "bottom_right": 1},
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
    """A band's edges and a position add up within 32 bits for lengths below 2^29."""
    packed = pack(problem(*qkv(), max_seqlen_q=2**29 - 1, max_seqlen_k=2**29 - 1))
    assert_fields(packed, {"seqlen_q": 2**29 - 1, "seqlen_k": 2**29 - 1})


# ---- alignment ----


def strided(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
    return torch.randn(4096).as_strided(sizes, strides, offset)


ALIGNMENTS = {
    "contiguous": (strided((3, 2, 5, 8), (80, 40, 8, 1)), True),
    "padded rows": (strided((3, 2, 5, 8), (240, 120, 12, 1)), True),
    "expanded": (strided((3, 2, 5, 8), (0, 0, 8, 1)), True),
    "one row inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=8), True),
    "four elements inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=4), True),
    "one element inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=1), False),
    "two elements inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=2), False),
    "odd batch stride": (strided((3, 2, 5, 8), (81, 40, 8, 1)), False),
    "odd head stride": (strided((3, 2, 5, 8), (200, 41, 8, 1)), False),
    "odd row stride": (strided((3, 2, 5, 8), (200, 100, 9, 1)), False),
    "row stride of two": (strided((3, 2, 5, 8), (200, 100, 10, 1)), False),
    "odd stride of one batch": (strided((1, 2, 5, 8), (81, 40, 8, 1)), True),
    "odd stride of one head": (strided((3, 1, 5, 8), (80, 41, 8, 1)), True),
    "odd stride of one row": (strided((3, 2, 1, 8), (80, 40, 9, 1)), True),
    "odd strides of one head and of rows": (strided((3, 1, 5, 8), (80, 41, 9, 1)), False),
    "head_dim 6": (strided((3, 2, 5, 6), (80, 40, 8, 1)), False),
    "head_dim 1": (strided((3, 2, 5, 1), (80, 40, 8, 7)), False),
}


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignment(name):
    q, is_aligned = ALIGNMENTS[name]
    _, k, v = qkv()
    packed = pack(problem(q, k[..., : q.size(-1)], v))
    assert packed["q"] == rows(q, is_aligned)
    assert packed["k"]["is_aligned"] == (q.size(-1) == 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "is_aligned"), [(4, True), (2, False), (6, False), (8, True)])
def test_four_half_elements_are_eight_bytes(dtype, offset, is_aligned):
    q = torch.randn(1024).to(dtype).as_strided((3, 2, 5, 8), (80, 40, 8, 1), offset)
    assert q.data_ptr() % 16 == 2 * offset % 16
    assert pack(problem(q, *qkv(dtype=dtype)[1:]))["q"] == rows(q, is_aligned)


def test_alignment_of_packed_tensors():
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
    sequences = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    q, k, v = strided((20, 2, 8), (17, 8, 1)), strided((20, 1, 8), (16, 3, 1)), strided((20, 1, 6), (8, 4, 1))
    packed = pack(problem(q, k, v, **sequences))
    assert [packed[name]["is_aligned"] for name in "qkv"] == [0, 1, 0]
    assert (packed["q"]["row"], packed["q"]["head"]) == (17, 8)


def test_values_are_as_wide_as_values():
    q, k, v = qkv()
    v, out, dv, dout = v[..., :6], torch.empty(3, 2, 5, 6), torch.empty(3, 2, 7, 6), torch.empty(3, 2, 5, 6)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    packed = pack(problem(q, k, v), buffers(out=out, dout=dout, dq=dq, dk=dk, dv=dv))
    assert [packed[name]["is_aligned"] for name in ("v", "out", "dout", "dv")] == [0] * 4
    assert [packed[name]["is_aligned"] for name in ("q", "k", "dq", "dk")] == [1] * 4


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


# ---- refusals ----

Q, K, V = qkv()
REFUSALS = {
    "q: must have 4 dimensions, got torch.Size([2, 5, 8])": (problem(Q[0], K, V), buffers()),
    "out: must have 4 dimensions, got (12, 1)": (problem(Q, K, V), buffers(out=torch.empty(5, 12))),
    "mask: must have 4 dimensions, got torch.Size([5, 7])": (problem(Q, K, V, mask=torch.ones(5, 7) > 0), buffers()),
    "k: the last dimension must be contiguous, got a stride of 7": (
        problem(Q, torch.randn(3, 2, 8, 7).transpose(2, 3), V),
        buffers(),
    ),
    "dout: the last dimension must be contiguous, got a stride of 0": (
        problem(Q, K, V),
        buffers(dout=torch.ones(1).expand(3, 2, 5, 12)),
    ),
    "dlse: must be contiguous": (problem(Q, K, V), buffers(dlse=torch.ones(1).expand(3, 2, 5))),
    "dbias_partial: must be contiguous": (
        problem(Q, K, V),
        buffers(dbias_partial=torch.ones(2, 3, 2, 7, 5).transpose(3, 4)),
    ),
    "dbias: must be contiguous": (
        problem(Q, K, V),
        buffers(dbias_partial=torch.ones(2, 3, 2, 5, 7), dbias=torch.ones(3, 2, 7, 5).transpose(2, 3)),
    ),
    "bias: dtype must be torch.float32, torch.float16 or torch.bfloat16, got torch.float64": (
        problem(Q, K, V, bias=torch.zeros(3, 2, 5, 7, dtype=torch.float64)),
        buffers(),
    ),
    "left: must fit 32 bits, got 2147483648": (problem(Q, K, V, left=2**31), buffers()),
    "right: must fit 32 bits, got -2147483649": (problem(Q, K, V, right=-(2**31) - 1), buffers()),
    "max_seqlen_q: must be below 2^29, got 536870912": (problem(Q, K, V, max_seqlen_q=2**29), buffers()),
    "max_seqlen_k: must be below 2^29, got 4294967296": (problem(Q, K, V, max_seqlen_k=2**32), buffers()),
    "max_seqlen_k: must be below 2^29, got -1": (problem(Q, K, V, max_seqlen_k=-1), buffers()),
    "p: must have 15 fields, got 14": (problem(Q, K, V)[:-1], buffers()),
    "buffers: must have 11 fields, got 10": (problem(Q, K, V), buffers()[:-1]),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusal(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        launcher.pack("float32", *REFUSALS[message])


def test_an_unknown_element_is_refused():
    with pytest.raises(ValueError, match="^element: must be float32, float16 or bfloat16, got float64$"):
        launcher.pack("float64", problem(Q, K, V), buffers())


def test_what_is_no_tensor_is_said():
    with pytest.raises(AttributeError, match="shape"):
        launcher.pack("float32", problem(Q, K, V).replace(q=3), buffers())
    with pytest.raises(TypeError):
        launcher.pack("float32", problem(Q, K, V, scale="a"), buffers())
    with pytest.raises(TypeError):
        launcher.pack("float32", problem(Q, K, V, left=0.5), buffers())
    with pytest.raises(TypeError):
        launcher.pack("float32", [], buffers())


def test_nothing_is_kept():
    p, given = problem(*qkv(), bias=torch.randn(3, 1, 1, 7)), buffers(torch.empty(3, 2, 5, 12), torch.empty(3, 2, 5))
    launcher.pack("float32", p, given)
    references, blocks = sys.getrefcount(p.q), sys.getallocatedblocks()
    for _ in range(1000):
        launcher.pack("float32", p, given)
    more_references, more_blocks = sys.getrefcount(p.q) - references, sys.getallocatedblocks() - blocks
    assert more_references == 0
    assert more_blocks < 100
