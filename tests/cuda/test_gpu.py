"""The CUDA kernels on a GPU. FASTATTN_CUDA_IMAGE=compute_60 runs the same tests on the first kernels, through PTX."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import fastattn
from tests.support.cases import Case
from tests.support.contract import check

pytestmark = pytest.mark.gpu
MANY = 100_000  # multiprocessors: more than there are blocks, so that the backward splits up
VARIED = Case(
    dtype=torch.float16, mask="padding", bias="per-head", band="window", dropout_p=0.3, heads=(4, 2), seqlens=(70, 75)
)


@pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["whole", "split"])
def test_contract(attention_case: Case, multiprocessors: int, poisoned: None) -> None:
    cuda = pytest.importorskip("fastattn.cuda_kernels.attention")

    class Resized(cuda.Device):
        """The GPU, with other multiprocessors as far as the choice of kernels goes."""

        def multiprocessors(self, device: torch.device) -> int:
            return multiprocessors

    with cuda.on(Resized()), fastattn.use_backend("cuda"):
        check(attention_case, "cuda")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(dtype: torch.dtype, packed: bool) -> None:
    with fastattn.use_backend("cuda"):
        check(replace(VARIED, dtype=dtype, seqlens=(1000, 1100), dims=(64, 64), packed=packed), "cuda")


def small(device: str = "cuda") -> list[torch.Tensor]:
    return [torch.randn(2, 4, 70, 32, device=device, requires_grad=True) for _ in range(3)]


def test_a_cuda_graph_draws_new_dropout_at_every_replay() -> None:
    inputs = small()

    def step() -> torch.Tensor:
        out = fastattn.scaled_dot_product_attention(*inputs, dropout_p=0.5)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        return out

    with fastattn.use_backend("cuda"):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()  # loads the kernels, which must not happen during the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
    assert all(x.isfinite().all() for x in results)
    assert not torch.equal(*results)


def test_the_current_stream_is_used() -> None:
    inputs = small()
    with fastattn.use_backend("cuda"):
        expected = fastattn.scaled_dot_product_attention(*inputs)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = [x * 1 for x in inputs]  # not there yet when the kernel is launched
            out = fastattn.scaled_dot_product_attention(*late)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_threads_that_have_no_context_yet() -> None:
    inputs, results = small(), []

    def work() -> None:
        with fastattn.use_backend("cuda"):
            out = fastattn.scaled_dot_product_attention(*inputs)
            results.append(torch.autograd.grad(out, inputs, torch.ones_like(out)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for grads in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(grads, results[0], strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_that_is_not_current() -> None:
    inputs = small("cuda:1")
    with fastattn.use_backend("cuda"):
        out = fastattn.scaled_dot_product_attention(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert {x.device.index for x in (out, *grads)} == {1}
    assert all(x.isfinite().all() for x in grads)


def test_memory_grows_linearly_with_the_length() -> None:
    def peak(seqlen: int) -> int:
        inputs = [torch.randn(1, 4, seqlen, 64, device="cuda", requires_grad=True) for _ in range(3)]
        mask = torch.ones(seqlen, dtype=torch.bool, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with fastattn.use_backend("cuda"):
            fastattn.scaled_dot_product_attention(*inputs, mask).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(256)
    assert peak(4096) < 2.5 * peak(2048)
