"""Label-smoothed cross entropy whose logits never exist for all tokens at once.

The gradient of a sum over tokens does not depend on what comes after the loss, save for one scalar factor. So each
chunk of tokens computes its logits, its part of the loss and its part of both gradients, and the logits are dropped:
three matrix products in all, as many as without chunks, and memory for one chunk of logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of a chunk, 128 MB in float32. Larger chunks are no faster, and smaller ones add to the weight's gradient more
# often.
_CHUNK_LOGITS = 2**25
# On the CPU a chunk's logits, 4 MB, stay in the cache; read from memory, they would cost more than the matrix products.
_CPU_CHUNK_LOGITS, _MIN_CPU_CHUNK_TOKENS = 2**20, 256


class LossSums(NamedTuple):
    """Sums over the tokens that are not padding; divide by `num_tokens` for means."""

    loss: Tensor  # () float32 (float64 for float64 inputs), differentiable
    nll: Tensor  # () negative log-likelihood in nats, without smoothing or gradient; exp(nll / num_tokens): perplexity
    num_tokens: Tensor  # () int64


def label_smoothed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float = 0.1,
    pad_id: int = 0,
    chunk_size: int | None = None,
) -> LossSums:
    """Cross entropy of hidden @ weight.T against 1 - eps on the true id and eps / (V - 1) on every other.

    Equivalent to::

        log_p = torch.log_softmax(hidden.float() @ weight.float().T, dim=-1)
        smooth = torch.full_like(log_p, eps / (V - 1)).scatter(-1, target[..., None], 1 - eps)
        loss = -(smooth * log_p).sum(-1)[target != pad_id].sum()

    The softmax and the sums are taken in float32 whatever the dtype of the inputs; under autocast the matrix
    products run in its dtype. The result does not depend on `chunk_size` but for rounding.

    Args:
        hidden: (..., d_model) float, the decoder's states.
        weight: (V, d_model) float, the output matrix.
        target: (...) int64, the true ids.
        label_smoothing: eps, in [0, 1).
        pad_id: tokens with this target count nothing.
        chunk_size: tokens whose logits exist at a time; by default as many as make 128 MB of float32 logits, on the
            CPU 4 MB, but at least 256.

    Raises:
        ValueError: shapes that do not match, `label_smoothing` outside [0, 1), a vocabulary of fewer than two
            ids, a non-positive `chunk_size`, or (on the CPU) a target outside the vocabulary.

    Source: "Attention Is All You Need", section 5.4; Szegedy et al., "Rethinking the Inception Architecture".
    """
    vocab_size = weight.shape[0]
    _check(hidden, weight, target, label_smoothing, chunk_size)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.device, vocab_size)
    loss, nll = _ChunkedLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1), label_smoothing, pad_id, chunk_size
    )
    return LossSums(loss, nll, (target != pad_id).sum())


def _check(hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, chunk_size: int | None) -> None:
    if hidden.shape[:-1] != target.shape:
        raise ValueError(f"target: shape {tuple(target.shape)} must be that of hidden {tuple(hidden.shape)} but for d")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: shape {tuple(weight.shape)} must be (V, {hidden.shape[-1]})")
    if weight.shape[0] < 2:
        raise ValueError(f"weight: the vocabulary must have at least 2 ids, got {weight.shape[0]}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")
    if target.device.type == "cpu" and target.numel() and not 0 <= target.min() <= target.max() < weight.shape[0]:
        raise ValueError(f"target: ids {target.min()} ... {target.max()} must lie in [0, {weight.shape[0]})")


def default_chunk_size(device: torch.device, vocab_size: int) -> int:
    """Tokens whose logits `label_smoothed_cross_entropy` computes at a time unless it is told how many."""
    if device.type == "cpu":
        return max(_MIN_CPU_CHUNK_TOKENS, _CPU_CHUNK_LOGITS // vocab_size)
    return max(1, _CHUNK_LOGITS // vocab_size)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, pad_id: int, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        nll = torch.zeros_like(loss)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(compute_dtype)
            for start in range(0, target.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                states = hidden[rows].to(compute_dtype)
                logits = F.linear(states, matrix).to(sum_dtype)
                chunk_loss, chunk_nll = _loss_and_dlogits_(logits, target[rows], label_smoothing, pad_id)
                loss += chunk_loss
                nll += chunk_nll
                dlogits = logits.to(compute_dtype)
                if dhidden is not None:
                    dhidden[rows] = dlogits @ matrix
                if dweight is not None:
                    _add_product_(dweight, dlogits.t(), states)
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dnll: Tensor) -> tuple[Tensor | None, ...]:
        # Without a dimension the factor would not make a float16 gradient float32, and as float16 a loss scale of 2^16
        # is infinite.
        factor = dloss.view(1)
        dhidden, dweight = (None if grad is None else (grad * factor).to(grad.dtype) for grad in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None


def _loss_and_dlogits_(logits: Tensor, target: Tensor, label_smoothing: float, pad_id: int) -> tuple[Tensor, Tensor]:
    """Sums of loss and nll over the rows; overwrites `logits` (rows, V) with the gradient of the loss."""
    vocab_size = logits.shape[1]
    off = label_smoothing / (vocab_size - 1)
    on = 1.0 - label_smoothing
    counted = target != pad_id
    column = target[:, None]
    true_logit = logits.gather(1, column).squeeze(1)
    sum_logits = logits.sum(1)

    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    lse = (largest + total.log()).squeeze(1)
    nll = lse - true_logit
    loss = (on - off) * nll + off * (vocab_size * lse - sum_logits)

    # The gradient is softmax minus the smoothed target distribution.
    logits.div_(total).sub_(off)
    logits.scatter_(1, column, logits.gather(1, column) - (on - off))
    logits.masked_fill_(~counted[:, None], 0.0)
    return loss.masked_fill(~counted, 0.0).sum(), nll.masked_fill(~counted, 0.0).sum()


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
