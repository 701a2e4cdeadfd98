"""Multi-head attention (Vaswani et al. 2017, section 3.2.2) as a drop-in for torch.nn.MultiheadAttention."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments, functional, masks, overrides


class MultiHeadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose attention is fastattn's fused function.

    Arguments, state_dict, initial values drawn from a seed and the meaning of masks (True = blocked) are torch's;
    outputs, weights and gradients are so too wherever torch's are finite. The differences:

    - a query that may attend to no key has attention 0, so its output is `out_proj.bias`; it is never NaN;
    - asking for the weights does not change the output: both come from the same scores and dropout bits;
    - `is_causal=True` needs no `attn_mask`, and keeps the fused causal route when there is padding too;
    - a bool and a float mask may be combined; arguments that do not fit raise ValueError;
    - an attn_mask may also be given for each sequence, (batch, seqlen_q, seqlen_k), or with four dimensions; heads that
      share one are served from it without copies;
    - nested tensors and torch.jit.script are not supported: use `forward_packed` and torch.compile;
    - nn.TransformerEncoderLayer never runs its own kernel on the weights in place of forward, and nn.TransformerEncoder
      does not turn padded tensors into nested ones.

    Args:
        embed_dim: features of the query and of the output.
        num_heads: number of heads.
        dropout: probability of dropping an attention weight, in training only.
        bias: add a bias in all four projections.
        add_bias_kv: append one learned key and value to every sequence.
        add_zero_attn: append one key and value of zeros to every sequence, after the learned ones.
        kdim, vdim: features of key and value; None for embed_dim.
        batch_first: tensors are (batch, seqlen, features) instead of (seqlen, batch, features).
        device, dtype: of the parameters.
        head_dim: features per head of projected queries and keys (the paper's d_k); None for embed_dim // num_heads.
        v_head_dim: features per head of projected values (the paper's d_v); None for head_dim.

    With head_dim or v_head_dim, `in_proj_weight` has num_heads * (2 * head_dim + v_head_dim) rows in the order q, k, v,
    and `out_proj` num_heads * v_head_dim columns; otherwise all parameters have torch's shapes.

    Raises:
        ValueError: a size is not positive, or embed_dim is not divisible by num_heads while head_dim is None.

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    head_dim: int
    v_head_dim: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not the parent's, which knows one head_dim only
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
        for name, size in sizes.items():
            if size is not None and size <= 0:
                raise ValueError(f"{name}: must be positive, got {size}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim: {embed_dim} is not divisible by num_heads {num_heads}; give head_dim")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.need_weights: bool | None = None  # False: forward returns no weights, whatever the caller asks

        q_rows, k_rows, v_rows = rows = self._rows()
        is_fused = self.kdim == self.vdim == embed_dim
        shapes = {
            "in_proj_weight": (sum(rows), embed_dim) if is_fused else None,
            "q_proj_weight": None if is_fused else (q_rows, embed_dim),
            "k_proj_weight": None if is_fused else (k_rows, self.kdim),
            "v_proj_weight": None if is_fused else (v_rows, self.vdim),
            "in_proj_bias": (sum(rows),) if bias else None,
            "bias_k": (1, 1, k_rows) if add_bias_kv else None,
            "bias_v": (1, 1, v_rows) if add_bias_kv else None,
        }
        for name, shape in shapes.items():
            empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, empty)
        out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear
        self.out_proj = out_proj(v_rows, embed_dim, bias=bias, device=device, dtype=dtype)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for learned in (self.bias_k, self.bias_v):
            if learned is not None:
                nn.init.xavier_normal_(learned)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Accepts the state of an nn.MultiheadAttention, of any version, as well as its own."""
        defaults = {"v_head_dim": state["head_dim"], "batch_first": False, "need_weights": None}
        super().__setstate__({**defaults, **state})

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether in_proj_weight is laid out as torch's functions expect; torch's encoder always hears that it is not.

        Torch's name, which others read: PEFT and torch.ao find the weights by it, as does whoever gives them to
        F.multi_head_attention_forward. But in eval mode nn.TransformerEncoderLayer, if it heard the truth, would run a
        kernel of its own on the weights and never call forward, and nn.TransformerEncoder would turn padded tensors
        into nested ones. Nothing else that they ask could be answered for them alone: batch_first, num_heads,
        in_proj_bias and the class of the weights are everybody's, the switch in torch.backends.mha is every model's,
        and a hook would cost every call and not keep the encoder from nesting. So the answer depends on who asks.
        """
        if torch.compiler.is_compiling():  # which does not tell who asks
            return False
        asker = sys._getframe(1)
        while asker.f_code.co_name == "_qkv_same_embed_dim" and asker.f_back is not None:  # a wrapper that passes it on
            asker = asker.f_back
        if asker.f_globals.get("__name__") == nn.TransformerEncoderLayer.__module__:
            return False
        return self.kdim == self.vdim == self.embed_dim and self._rows() == (self.embed_dim,) * 3

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value.

        One tensor given as query, key and value, or as key and value, is projected in one matrix product.

        Args:
            query: (seqlen_q, batch, embed_dim); (batch, seqlen_q, embed_dim) if batch_first; or (seqlen_q, embed_dim).
            key: likewise with seqlen_k and kdim.
            value: likewise with seqlen_k and vdim.
            key_padding_mask: (batch, seqlen_k), unbatched (seqlen_k,): bool, True = this key is blocked; or float,
                added to the scores with this key.
            need_weights: return the weights too, at a cost of batch * num_heads * seqlen_q * seqlen_k in memory.
            attn_mask: (seqlen_q, seqlen_k); (batch, seqlen_q, seqlen_k); (batch * num_heads, seqlen_q, seqlen_k); or
                (batch or 1, num_heads or 1, seqlen_q, seqlen_k); without batch as with a batch of 1. bool, True =
                blocked, or float, added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: query i attends to keys 0 ... i only, and to the appended ones. An attn_mask given with it is
                promised to be this same mask, and is not read unless it requires grad or keys are appended.

        Returns:
            out: shaped like query.
            weights: (batch, seqlen_q, seqlen_k), not averaged (batch, num_heads, seqlen_q, seqlen_k), unbatched without
                batch; after dropout; seqlen_k counts the appended keys. None if not needed.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
            return overrides.record_in_fx(
                self, query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights,
                attn_mask=attn_mask, average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        self._check_inputs(query, key, value)
        is_batched = query.dim() == 3
        q, k, v = (self._heads_first(x, is_batched) for x in self._in_projection(query, key, value))
        batch, nheads, seqlen_q, _ = q.shape
        seqlen_k = k.size(2)
        masks.check("key_padding_mask", key_padding_mask, (batch, seqlen_k) if is_batched else (seqlen_k,))
        attn_mask = masks.broadcast_over_heads(attn_mask, (batch, nheads, seqlen_q, seqlen_k))
        appended = (self.bias_k is not None) + self.add_zero_attn
        mask_arguments = masks.of_function(
            attn_mask, key_padding_mask, is_causal, (seqlen_q, seqlen_k), appended, q.device
        )
        k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        params = arguments.attention_params(q, k, v, dropout_p=self.dropout if self.training else 0.0, **mask_arguments)
        params = arguments.draw_seed(params)
        out = functional.attend(params)[0].transpose(1, 2)
        if not is_batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        out = self.project_output(out)
        if not need_weights or self.need_weights is False:
            return out, None
        weights = functional.weights_of(params)
        if average_attn_weights:
            weights = weights.mean(1)
        return out, weights if is_batched else weights.squeeze(0)

    def forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend within each of many sequences laid end to end, without padding.

        Equal to forward on the padded sequences, dropout bits included, at every token.

        Args:
            query: (total_q, embed_dim).
            key: (total_k, kdim).
            value: (total_k, vdim).
            cu_seqlens_q: (batch + 1,) int32: sequence i is query[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].
            cu_seqlens_k: likewise for key and value.
            max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
            is_causal: query i of a sequence attends to its keys 0 ... i only.

        Returns:
            (total_q, embed_dim).

        Raises:
            ValueError: shapes that do not fit; a module with add_bias_kv or add_zero_attn.
        """
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("forward_packed: not defined with add_bias_kv or add_zero_attn")
        if query.dim() != 2:
            raise ValueError(f"query: forward_packed takes (total_q, embed_dim), got shape {tuple(query.shape)}")
        self._check_inputs(query, key, value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._in_projection(query, key, value))
        params = arguments.varlen_attention_params(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal, causal_align="top-left",
        )  # fmt: skip
        return self.project_output(functional.attend(arguments.draw_seed(params))[0])

    def project_query(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., num_heads, head_dim)."""
        return self._project(0, x)

    def project_key(self, x: Tensor) -> Tensor:
        """(..., kdim) -> (..., num_heads, head_dim)."""
        return self._project(1, x)

    def project_value(self, x: Tensor) -> Tensor:
        """(..., vdim) -> (..., num_heads, v_head_dim)."""
        return self._project(2, x)

    def project_output(self, out: Tensor) -> Tensor:
        """(..., num_heads, v_head_dim) -> (..., embed_dim)."""
        return self.out_proj(out.flatten(-2))

    # ---- projections ----

    def _rows(self) -> tuple[int, int, int]:
        """Features of all heads together: of query, key, value."""
        return self.num_heads * self.head_dim, self.num_heads * self.head_dim, self.num_heads * self.v_head_dim

    def _in_proj_parameters(self, rows: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of consecutive groups of rows of the input projection."""
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = self.in_proj_weight.split_with_sizes(rows)
        biases = [None] * len(rows) if self.in_proj_bias is None else self.in_proj_bias.split_with_sizes(rows)
        return list(zip(weights, biases, strict=True))

    def _project(self, index: int, x: Tensor) -> Tensor:
        weight, bias = self._in_proj_parameters(self._rows())[index]
        return F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1))

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Projected query, key and value, heads side by side in the last dimension."""
        q_rows, k_rows, v_rows = rows = self._rows()
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).split_with_sizes(rows, -1)
        if self.in_proj_weight is not None and key is value:
            (w_q, b_q), (w_kv, b_kv) = self._in_proj_parameters((q_rows, k_rows + v_rows))
            return F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).split_with_sizes((k_rows, v_rows), -1)
        inputs = zip((query, key, value), self._in_proj_parameters(rows), strict=True)
        return tuple(F.linear(x, weight, bias) for x, (weight, bias) in inputs)

    def _heads_first(self, x: Tensor, is_batched: bool) -> Tensor:
        """A projected tensor as a view (batch, num_heads, seqlen, features per head)."""
        if not is_batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _append(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """Keys or values, heads first, followed by the learned one and by zeros, where the module has them."""
        extra = []
        if learned is not None:
            extra.append(learned.view(1, self.num_heads, 1, -1).expand(x.size(0), -1, -1, -1))
        if self.add_zero_attn:
            extra.append(x.new_zeros(x.size(0), self.num_heads, 1, x.size(3)))
        return torch.cat([x, *extra], dim=2) if extra else x

    # ---- checks ----

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        inputs = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, features) in inputs.items():
            if x.is_nested:
                raise ValueError(
                    f"{name}: nested tensors are not supported; use forward_packed, or set use_nested_tensor = False on"
                    " an nn.TransformerEncoder around this module (replace_attention does)"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"{name}: query, key and value must all be 3-D, or 2-D without batch, got shapes"
                    f" {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
                )
            if x.size(-1) != features:
                raise ValueError(f"{name}: the last dimension must be {features}, got shape {tuple(x.shape)}")
