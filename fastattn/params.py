"""The arguments of every backend, forward and backward; csrc/attention.h holds their twin."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

UNBOUNDED = 2**31 - 1  # a band edge beyond every key, so that no kernel needs a case for "no edge"


class AttentionParams(NamedTuple):
    """One attention problem: checked, four-dimensional (dense) or packed.

    Key j is allowed for query i iff -left <= j - (i + shift) <= right, where shift is seqlen_k - seqlen_q of that
    sequence if bottom_right, else 0, and iff the mask is True there. seqlen_k is what seqused_k leaves of it.
    """

    # The tensors come first.
    q: Tensor  # (batch, nheads, seqlen_q, head_dim)    packed: (total_q, nheads, head_dim)
    k: Tensor  # (batch, nheads_k, seqlen_k, head_dim)  packed: (total_k, nheads_k, head_dim)
    v: Tensor  # (batch, nheads_k, seqlen_k, head_dim_v)
    mask: Tensor | None  # bool, True = may attend; broadcasts to (batch, nheads, seqlen_q, seqlen_k), 4-D
    bias: Tensor | None  # float, added to the scaled scores; broadcasts like the mask
    seed: Tensor | None  # (1,) int64; None without dropout
    cu_seqlens_q: Tensor | None  # (batch + 1,) int32; None when dense
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None  # (batch,) int32, how many keys of each sequence there are; None: all
    max_seqlen_q: int  # bounds every length; when dense, the length
    max_seqlen_k: int
    scale: float
    softcap: float  # the scaled scores become softcap * tanh(scores / softcap); 0: they do not
    dropout_p: float
    left: int
    right: int
    bottom_right: bool

    def replace(self, **changes: Any) -> AttentionParams:
        """A copy with other fields; torch.compile traces it in every supported torch, which is not true of _replace."""
        fields: list[Any] = [changes.get(name, value) for name, value in zip(_FIELDS, self, strict=True)]
        return AttentionParams(*fields)

    def batch_size(self) -> int:
        """The number of sequences."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def is_packed(self) -> bool:
        """Whether sequences lie one behind the other, without padding."""
        return self.cu_seqlens_q is not None


_FIELDS = AttentionParams._fields
TENSORS = _FIELDS.index("max_seqlen_q")  # how many there are


class Forward(NamedTuple):
    """The results that a forward pass fills."""

    out: Tensor  # (batch, nheads, seqlen_q, head_dim_v)  packed: (total_q, nheads, head_dim_v)
    lse: Tensor  # (batch, nheads, seqlen_q) float32      packed: (nheads, total_q)


class Backward(NamedTuple):
    """The tensors that a backward pass reads besides the problem, and the gradients that it fills."""

    out: Tensor  # as the forward pass filled them
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None  # None: 0
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None  # the bias's own shape; None: not wanted

    def fill_zero(self) -> None:
        """Set all gradients to 0, those of a problem without a (batch, head)."""
        for grad in (self.dq, self.dk, self.dv, self.dbias):
            if grad is not None:
                grad.zero_()


class Buffers(NamedTuple):
    """The tensors that C++ kernels fill or read besides the problem's own; None: those that one does not need."""

    out: Tensor
    lse: Tensor
    dout: Tensor | None = None
    dlse: Tensor | None = None
    delta: Tensor | None = None  # as lse
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dq_sum: Tensor | None = None  # (*lse.shape, head_dim) float32
    dbias_partial: Tensor | None = None  # (copies, *bias.shape) float32
    dbias: Tensor | None = None
