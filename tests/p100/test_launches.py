"""The recorded launches of both passes: kernels, grids, buffers."""

from __future__ import annotations

import pytest
import torch

from fastattn.arguments import attention_params, varlen_attention_params
from fastattn.params import AttentionParams

launches = pytest.importorskip("benchmarks.p100.launches", reason="the native part is not built")


def problem(length: int, **arguments: object) -> AttentionParams:
    tensors = (torch.randn(2, 3, length, 64) for _ in range(3))
    return attention_params(*tensors, **arguments)


def test_forward() -> None:
    p = problem(96)
    (launch,) = launches.record(p, backward=False)
    kernel = launches.KERNELS[launch.kernel]
    assert kernel.pass_ == "attention_fwd" and kernel.head_dim == 64
    assert (launch.element, launch.grid) == ("float32", (-(-96 // kernel.block_m), 3, 2))
    assert (launch.threads, launch.smem) == (kernel.threads, kernel.smem)
    assert [(name, is_written) for _, name, is_written in launch.buffers] == [
        *((name, False) for name in "qkv"),
        *((name, True) for name in ("out", "lse")),
    ]
    for tensor, _, _ in launch.buffers:
        assert tensor.data_ptr().to_bytes(8, "little") in launch.params_bytes


def test_backward_depends_on_how_full_the_card_is() -> None:
    names = {n: [x.kernel for x in launches.record(problem(256), True, multiprocessors=n)] for n in (1, 56)}
    assert [launches.KERNELS[name].pass_ for name in names[1]] == ["attention_bwd"]
    assert [launches.KERNELS[name].pass_ for name in names[56]] == ["attention_bwd_dq", "attention_bwd"]


def test_backward_of_a_bias() -> None:
    recorded = launches.record(problem(64, attn_bias=torch.randn(3, 64, 64)), True)
    passes = [launches.KERNELS[launch.kernel].pass_ for launch in recorded]
    assert passes[-2:] == ["attention_bwd_dbias", "attention_dbias_sum"]
    assert "dbias" in [name for _, name, _ in recorded[-1].buffers]


def test_packed() -> None:
    edges = torch.tensor([0, 5, 40], dtype=torch.int32)
    tensors = (torch.randn(40, 3, 64) for _ in range(3))
    p = varlen_attention_params(*tensors, cu_seqlens_q=edges, cu_seqlens_k=edges, max_seqlen_q=35, max_seqlen_k=35)
    (launch,) = launches.record(p, backward=False)
    shapes = {name: tuple(x.shape) for x, name, _ in launch.buffers}
    assert shapes["out"] == (40, 3, 64) and shapes["lse"] == (3, 40)
    assert launch.grid[1:] == (3, 2)
