"""The CUDA kernels against the float64 oracle, executed on the CPU.

Three ways to run the same table of cases: as g++ compiles the sources, the same with every memory access judged, and
from the PTX that NVRTC emits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import functional, operators
from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from tests.simt.attention import PtxKernels, SourceKernels, on_the_cpu
from tests.simt.executor import SCHEDULES
from tests.support.cases import SEVERAL_TILES, WITHIN_ONE_TILE, Case, full, pairwise
from tests.support.contract import call, check, check_lengths_are_cut, run

MANY = 1000  # multiprocessors: more than there are blocks, so that the backward splits up
MODES = pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["whole", "split"])
PARTICULAR = WITHIN_ONE_TILE + SEVERAL_TILES
VARIED = Case(
    **{"dtype": torch.float16, "mask": "padding", "bias": "per-head", "band": "window", "dropout_p": 0.3},
    **{"heads": (4, 2), "softcap": 3.0, "used": True, "seqlens": (70, 75)},
)


@MODES
def test_contract(attention_case: Case, multiprocessors: int, poisoned: None) -> None:
    with on_the_cpu(SourceKernels(), multiprocessors=multiprocessors):
        check(attention_case)


@MODES
@pytest.mark.parametrize("case", PARTICULAR, ids=str)
def test_what_pairs_do_not_promise(case: Case, multiprocessors: int, poisoned: None) -> None:
    with on_the_cpu(SourceKernels(), multiprocessors=multiprocessors):
        check(case)


@pytest.mark.parametrize("packed", [False, True])
@MODES
def test_several_sequences_for_each_block(multiprocessors: int, packed: bool, poisoned: None) -> None:
    """Blocks take several sequences where a grid's z is too small: here three blocks for four sequences."""
    with on_the_cpu(SourceKernels(checked=True), multiprocessors=multiprocessors, max_grid_z=3):
        check(replace(VARIED, packed=packed, batch=4))
        check(replace(WITHIN_ONE_TILE[0], packed=packed, batch=4))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives costly runs fewer cases: a judged one costs twenty plain ones, a kernel from PTX seconds of g++."""
    everything, pairs = metafunc.config.getoption("full"), pairwise()
    if "judged_case" in metafunc.fixturenames:
        short = [case for case in pairs if math.prod(case.seqlens) <= 64 * 65]
        judged = pairs + full()[::20] if everything else short
        metafunc.parametrize("judged_case", judged + PARTICULAR, ids=str)
    if "ptx_case" in metafunc.fixturenames:
        # The kernels of 64 dimensions in one element type: the others have the same sources.
        small = [case for case in pairs if max(case.dims) <= (64 if case.dtype == torch.float16 else 32)]
        translated = pairs + full()[::50] if everything else small
        metafunc.parametrize("ptx_case", translated + WITHIN_ONE_TILE[: 3 if everything else 2], ids=str)


def test_contract_with_every_access_judged(judged_case: Case, poisoned: None) -> None:
    with on_the_cpu(SourceKernels(checked=True), multiprocessors=MANY if judged_case.heads[0] > 2 else 1):
        check(judged_case)


# ---- from PTX ----


def test_contract_from_ptx(ptx_case: Case, poisoned: None) -> None:
    with on_the_cpu(PtxKernels("compute_60"), multiprocessors=MANY if ptx_case.heads[0] > 2 else 1):
        check(ptx_case)


@MODES
def test_contract_from_ptx_of_a_newer_architecture(multiprocessors: int, poisoned: None) -> None:
    with on_the_cpu(PtxKernels("compute_90"), multiprocessors=multiprocessors):
        check(VARIED)
        check(replace(VARIED, packed=True, dtype=torch.bfloat16))


@MODES
def test_ptx_with_every_access_judged(multiprocessors: int, poisoned: None) -> None:
    with on_the_cpu(PtxKernels("compute_60", checked=True), multiprocessors=multiprocessors):
        check(VARIED)
        check(replace(VARIED, packed=True))


# ---- the same bits ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@MODES
def test_order_of_threads_does_not_matter(multiprocessors: int, schedule: str | int, packed: bool) -> None:
    case = replace(VARIED, packed=packed)
    results = []
    for order in (SCHEDULES[0], schedule):
        with on_the_cpu(SourceKernels(), schedule=order, multiprocessors=multiprocessors):
            results.append(run(call, case, case.dtype))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("copies", [1, 3, 64])
def test_bias_gradient_in_any_number_of_copies(copies: int) -> None:
    case = replace(VARIED, dtype=torch.float32, bias="per-key", batch=3)
    with on_the_cpu(SourceKernels(), multiprocessors=copies):
        check(case)


# ---- what the table cannot say ----


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    multiprocessors: int = 1,
    checked: bool = False,
    shift: int = 0,
    **arguments: object,
) -> list[Tensor]:
    """out and the gradients of q, k and v for a random upstream gradient, `shift` elements off an aligned address."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with on_the_cpu(SourceKernels(checked=checked), multiprocessors=multiprocessors):
        out = fastattn.scaled_dot_product_attention(*inputs, **arguments)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        dout = torch.cat([dout.new_empty(shift), dout.flatten()])[shift:].view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_alignment(dtype: torch.dtype) -> None:
    memory = torch.randn(3, 1 + 2 * 40 * 36, dtype=dtype)
    aligned = [row[:-1].view(1, 2, 40, 36) for row in memory]
    shifted = [torch.cat([row[:1], x.flatten()])[1:].view(x.shape) for row, x in zip(memory, aligned, strict=True)]
    assert all(x.data_ptr() % 16 for x in shifted)
    expected = gradients(*aligned)
    for inputs, shift in ((shifted, 0), (aligned, 1)):
        for x, y in zip(gradients(*inputs, checked=True, shift=shift), expected, strict=True):
            assert torch.equal(x, y)


@MODES
def test_tiles_that_band_or_length_exclude_are_never_loaded(multiprocessors: int) -> None:
    q, k, v = (torch.randn(1, 1, n, 16) for n in (32, 160, 160))
    expected = gradients(q, k, v, multiprocessors, window=(0, 31))
    k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.nan  # a product with any of these is NaN, whatever its weight
    actual = gradients(q, k, v, multiprocessors, window=(0, 31))
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(actual[2][:, :, 64:], torch.zeros(1, 1, 96, 16))


def test_a_bias_in_float32_beside_half_tensors() -> None:
    q, k, v = (torch.randn(2, 2, 33, 16, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(2, 33, 33, requires_grad=True)
    with on_the_cpu(SourceKernels()):
        out = fastattn.scaled_dot_product_attention(q, k, v, attn_bias=bias)
        (dbias,) = torch.autograd.grad(out, bias, torch.ones_like(out) * torch.arange(16))
    with fastattn.use_backend("reference"):
        out_reference = fastattn.scaled_dot_product_attention(q, k, v, attn_bias=bias)
        (expected,) = torch.autograd.grad(out_reference, bias, torch.ones_like(out) * torch.arange(16))
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(out, out_reference, rtol=0, atol=2e-2)
    torch.testing.assert_close(dbias, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_lengths_are_cut_to_the_tensors() -> None:
    """Wrong lengths, which only a synchronising check could refuse, give some numbers and touch nothing outside."""
    q, k, v = (torch.randn(20, 2, 16) for _ in range(3))
    right, wrong = torch.tensor([[0, 8, 16], [0, 9, 40]], dtype=torch.int32)
    p = varlen_attention_params(q, k, v, right, right, 8, 8)
    with on_the_cpu(SourceKernels(checked=True)):
        out, _ = functional.attend(p.replace(cu_seqlens_q=wrong, cu_seqlens_k=wrong))
    assert out.isfinite().all()
    assert torch.equal(out[8], torch.zeros(2, 16)) and torch.equal(out[17:], torch.zeros(3, 2, 16))


@MODES
@pytest.mark.parametrize("packed", [False, True])
def test_lengths_of_keys_are_cut_to_those_there_are(multiprocessors: int, packed: bool) -> None:
    case = Case(seqlens=(40, 45), packed=packed, band="window-bottom-right", bias="per-key")
    with on_the_cpu(SourceKernels(checked=True), multiprocessors=multiprocessors):
        check_lengths_are_cut(case)


@pytest.mark.parametrize("softcap", [1e-30, 1e4, 1e37])
@pytest.mark.parametrize("kernels", [SourceKernels(), PtxKernels("compute_60")], ids=["sources", "ptx"])
def test_softcap_of_any_size(kernels: SourceKernels | PtxKernels, softcap: float) -> None:
    """A bound far away changes nothing, as little as the hyperbolic tangent of a small number does."""
    q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
    results = []
    for bound in (softcap, None if softcap > 1 else 2 * softcap):
        with on_the_cpu(kernels):
            out = fastattn.scaled_dot_product_attention(q, k, v, softcap=bound)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


def test_no_problem_is_too_small() -> None:
    with on_the_cpu(SourceKernels()):
        q, k, v = (torch.randn(1, 2, n, 8, 2)[..., 0].requires_grad_() for n in (0, 5, 5))  # rows are not contiguous
        none = fastattn.scaled_dot_product_attention(q, k, v)
        none.sum().backward()
        out = fastattn.scaled_dot_product_attention(*(torch.randn(0, 2, 5, 8) for _ in range(3)))
        edges = torch.zeros(1, dtype=torch.int32)
        packed = fastattn.varlen_attention(*(torch.randn(4, 2, 8) for _ in range(3)), edges, edges, 4, 4)
    assert out.shape == (0, 2, 5, 8) and none.shape == q.grad.shape == (1, 2, 0, 8)
    assert torch.equal(k.grad, torch.zeros(1, 2, 5, 8))
    assert torch.equal(packed, torch.zeros(4, 2, 8))


# ---- in torch ----


class HostReads(TorchDispatchMode):
    """Fails where the host reads a value: that would synchronise, and a CUDA graph would keep the value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor's value is read"
        return func(*args, **(kwargs or {}))


@MODES
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_read_by_the_host(multiprocessors: int, packed: bool) -> None:
    (q, k, v, bias), arguments = replace(VARIED, packed=packed).make()
    params = varlen_attention_params if packed else attention_params
    del arguments["return_lse"], arguments["sinks"]
    p = draw_seed(params(q, k, v, attn_bias=bias, **arguments))
    with on_the_cpu(SourceKernels(), multiprocessors=multiprocessors), HostReads():
        out, lse = operators.run_forward(p, "cuda")
        grads = operators.run_backward(p, out, lse, torch.ones_like(out), torch.ones_like(lse), True, "cuda")
    assert all(x.isfinite().all() for x in (out, *grads))


def test_operators_are_registered_as_torch_wants_them() -> None:
    p = attention_params(*(torch.randn(2, 2, 9, 16) for _ in range(3)), is_causal=True)
    with on_the_cpu(SourceKernels()):
        torch.library.opcheck(torch.ops.fastattn.attention_fwd.default, (*p, "cuda"))
        out, lse = torch.ops.fastattn.attention_fwd(*p, "cuda")
        results = (out, lse, torch.randn_like(out), None, False, "cuda")
        torch.library.opcheck(torch.ops.fastattn.attention_bwd.default, (*p, *results))


def test_one_graph_when_compiled() -> None:
    q, k, v = (torch.randn(2, 2, 9, 16, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)

    with on_the_cpu(SourceKernels()):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        for x, expected in zip(
            torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v)),
            torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v)),
            strict=True,
        ):
            assert torch.equal(x, expected)
