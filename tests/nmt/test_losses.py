"""The chunked label-smoothed loss against its formula, and the learning rate against the paper's numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.schedule import linear_learning_rate, noam_learning_rate, noam_schedule

PAD = 0


def formula(hidden, weight, target, eps):
    """The loss by its definition, with all logits at once."""
    log_p = torch.log_softmax(hidden @ weight.T, dim=-1)
    smooth = torch.full_like(log_p, eps / (weight.shape[0] - 1)).scatter(-1, target[..., None], 1 - eps)
    counted = target != PAD
    loss = -(smooth * log_p).sum(-1)[counted].sum()
    nll = -log_p.gather(-1, target[..., None]).squeeze(-1)[counted].sum()
    return loss, nll, counted.sum()


def problem(tokens=13, vocab=11, d_model=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, d_model, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, d_model, generator=generator, dtype=dtype)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def test_loss_computed_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    sums = label_smoothed_cross_entropy(probabilities.log(), torch.eye(3, dtype=torch.float64), torch.tensor([1]), 0.1)
    expected = -(0.9 * math.log(0.3) + 0.05 * math.log(0.5) + 0.05 * math.log(0.2))
    assert sums.loss.item() == pytest.approx(expected, rel=1e-12)
    assert sums.nll.item() == pytest.approx(-math.log(0.3), rel=1e-12)
    assert sums.num_tokens.item() == 1


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 20),
    vocab=st.integers(2, 30),
    eps=st.sampled_from([0.0, 0.1, 0.9]),
    chunk_size=st.sampled_from([None, 1, 3, 7, 100]),
    upstream=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_the_formula(tokens, vocab, eps, chunk_size, upstream, seed):
    hidden, weight, target = problem(tokens, vocab, seed=seed)
    expected = formula(hidden, weight, target, eps)
    expected_grads = torch.autograd.grad(expected[0] * upstream, (hidden, weight))
    actual = label_smoothed_cross_entropy(hidden, weight, target, eps, PAD, chunk_size)
    actual_grads = torch.autograd.grad(actual.loss * upstream, (hidden, weight))
    for x, y in zip((*actual, *actual_grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    hidden, weight, target = problem()
    assert torch.autograd.gradcheck(lambda h, w: label_smoothed_cross_entropy(h, w, target, 0.2).loss, (hidden, weight))


def test_without_smoothing_it_is_torchs_cross_entropy():
    hidden, weight, target = problem(dtype=torch.float32)
    sums = label_smoothed_cross_entropy(hidden, weight, target, 0.0)
    expected = F.cross_entropy(hidden @ weight.T, target, ignore_index=PAD, reduction="sum")
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(sums.nll, expected.detach())


def test_batches_of_sentences_and_padding():
    hidden, weight, _ = problem(tokens=12)
    target = torch.tensor([[3, 1, PAD, PAD], [2, 5, 4, 1], [PAD] * 4])
    poisoned = hidden.detach().view(3, 4, 5).masked_fill((target == PAD)[..., None], torch.nan).requires_grad_()
    sums = label_smoothed_cross_entropy(poisoned, weight, target, chunk_size=3)
    real = target.flatten() != PAD
    expected = label_smoothed_cross_entropy(hidden[real], weight, target.flatten()[real])
    torch.testing.assert_close(sums.loss, expected.loss)
    assert sums.num_tokens == 6
    sums.loss.backward()
    assert poisoned.grad[target == PAD].eq(0).all()
    assert poisoned.grad[target != PAD].ne(0).all()


def test_only_what_requires_grad_gets_one():
    hidden, weight, target = problem()
    expected = torch.autograd.grad(formula(hidden, weight, target, 0.1)[0], (hidden, weight))
    for_hidden = torch.autograd.grad(label_smoothed_cross_entropy(hidden, weight.detach(), target).loss, hidden)
    for_weight = torch.autograd.grad(label_smoothed_cross_entropy(hidden.detach(), weight, target).loss, weight)
    torch.testing.assert_close((*for_hidden, *for_weight), expected)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation returned."""

    numel = 0
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("chunk_size", [10, 64])
def test_logits_of_one_chunk_only_exist(chunk_size):
    hidden, weight, target = problem(tokens=640, vocab=1000, d_model=4, dtype=torch.float32)
    with LargestTensor() as largest:
        label_smoothed_cross_entropy(hidden, weight, target, chunk_size=chunk_size).loss.backward()
    assert largest.numel == chunk_size * 1000


def test_default_chunk_does_not_grow_with_the_batch():
    hidden, weight, target = problem(tokens=1000, vocab=37_000, d_model=2, dtype=torch.float32)
    with LargestTensor() as largest:
        sums = label_smoothed_cross_entropy(hidden, weight, target)
        sums.loss.backward()
    assert largest.numel == 256 * 37_000 < hidden.shape[0] * weight.shape[0]
    torch.testing.assert_close(sums.loss, formula(hidden.detach(), weight.detach(), target, 0.1)[0])


def test_evaluation_computes_no_gradients():
    hidden, weight, target = problem(tokens=64, vocab=8)
    with LargestTensor() as training:
        expected = label_smoothed_cross_entropy(hidden, weight, target, chunk_size=4)
    with torch.no_grad(), LargestTensor() as evaluation:
        sums = label_smoothed_cross_entropy(hidden, weight, target, chunk_size=4)
    assert not sums.loss.requires_grad
    assert evaluation.calls <= training.calls - 2 * 16
    assert torch.equal(sums.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_sums_in_float32(dtype):
    hidden, weight, target = problem(tokens=400, vocab=50, d_model=16, dtype=torch.float32)
    expected = torch.autograd.grad(formula(hidden, weight, target, 0.1)[0], (hidden, weight))
    with torch.autocast("cpu", dtype=dtype):
        sums = label_smoothed_cross_entropy(hidden, weight, target, chunk_size=64)
    assert sums.loss.dtype == sums.nll.dtype == torch.float32
    grads = torch.autograd.grad(sums.loss, (hidden, weight))
    torch.testing.assert_close(
        sums.loss, formula(hidden, weight, target, 0.1)[0], rtol=4 * torch.finfo(dtype).eps, atol=0
    )
    for actual, exact in zip(grads, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
        assert (actual - exact).norm() > 0.01 * torch.finfo(dtype).eps * exact.norm(), "products ran in float32"


def test_half_inputs_and_a_loss_scale_that_is_no_float16():
    hidden, weight, target = problem(tokens=40, vocab=50, dtype=torch.float64)
    hidden, weight = ((0.01 * x.detach()).half().requires_grad_() for x in (hidden, weight))
    (label_smoothed_cross_entropy(hidden, weight, target).loss * 2.0**17).backward()
    exact = torch.autograd.grad(formula(hidden.double(), weight.double(), target, 0.1)[0], (hidden, weight))
    for actual, expected in zip((hidden.grad, weight.grad), exact, strict=True):
        assert actual.dtype == torch.float16
        assert (actual.double() / 2**17 - expected).norm() < 1e-2 * expected.norm()


def test_backward_twice_gives_the_same():
    hidden, weight, target = problem()
    loss = label_smoothed_cross_entropy(hidden, weight, target).loss
    first = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: shape \(3,\) must be"),
        ({"weight": torch.randn(11, 4)}, r"weight: shape \(11, 4\) must be \(V, 5\)"),
        ({"weight": torch.randn(1, 5)}, "weight: the vocabulary must have at least 2 ids, got 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing: must be in \[0, 1\), got 1.0"),
        ({"chunk_size": 0}, "chunk_size: must be at least 1, got 0"),
        ({"target": torch.full((13,), 11)}, r"target: ids 11 ... 11 must lie in \[0, 11\)"),
        ({"target": torch.full((13,), -1)}, r"target: ids -1 ... -1 must lie in \[0, 11\)"),
    ],
)
def test_errors(changes, message):
    hidden, weight, target = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        label_smoothed_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target, **changes})


# ---- schedule ----


@pytest.mark.parametrize(("d_model", "peak"), [(512, "6.99e-04"), (1024, "4.94e-04")])
def test_peak_of_the_papers_models(d_model, peak):
    rates = {step: noam_learning_rate(step, d_model) for step in (1, 2, 3999, 4000, 4001, 16000)}
    assert f"{rates[4000]:.2e}" == peak
    assert max(rates.values()) == rates[4000]
    assert rates[2] == pytest.approx(2 * rates[1])
    assert rates[16000] == pytest.approx(rates[4000] / 2)
    assert noam_learning_rate(77, d_model, 10, factor=2.0) == pytest.approx(2 * d_model**-0.5 * 77**-0.5)


def test_scheduler_sets_the_rate_of_each_step_and_resumes():
    def optimizer():
        return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.98), eps=1e-9)

    def rates(optimizer, scheduler, steps):
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    first = optimizer()
    scheduler = noam_schedule(first, 64, warmup_steps=4)
    seen = rates(first, scheduler, 5)
    second = optimizer()
    second.load_state_dict(first.state_dict())
    resumed = noam_schedule(second, 64, warmup_steps=4)
    resumed.load_state_dict(scheduler.state_dict())
    second.load_state_dict(first.state_dict())
    seen += rates(second, resumed, 4)
    assert seen == pytest.approx([noam_learning_rate(step, 64, 4) for step in range(1, 10)])


def test_linear_schedule_rises_to_its_peak_and_ends_above_zero():
    rates = [linear_learning_rate(step, 0.6, warmup_steps=3, total_steps=6) for step in range(1, 9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.45, 0.3, 0.15, 0.0, 0.0])


def test_schedule_errors():
    with pytest.raises(ValueError, match="step: must be at least 1, got 0"):
        linear_learning_rate(0, 0.1, 1, 2)
    with pytest.raises(ValueError, match="total_steps: must be at least warmup_steps 3, got 2"):
        linear_learning_rate(1, 0.1, 3, 2)
    with pytest.raises(ValueError, match="step: must be at least 1, got 0"):
        noam_learning_rate(0, 512)
    with pytest.raises(ValueError, match="warmup_steps: must be at least 1, got 0"):
        noam_learning_rate(1, 512, warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="optimizer: its own learning rate must be 1, got 0.1"):
        noam_schedule(optimizer, 512)
