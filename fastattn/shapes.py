"""How the shapes of query, key and value fit together: broadcasting as in torch's function, without a copy of keys.

All dimensions before the last two broadcast. A broadcast batch dimension, and a broadcast head of the query, has stride
0; one head of key and value serves all heads of the query as it does with grouped queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUT = "(..., heads, seqlen, head_dim)"


def dense(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
    """Query, key and value of one batch dimension, and seqlen_q, seqlen_k, head_dim.

    Nothing here compares a length of query with one of key: an exported program takes any two.

    Returns:
        (batch, nheads, seqlen_q, head_dim), (batch, nheads_k, seqlen_k, head_dim), (batch, nheads_k, seqlen_k,
        head_dim_v); nheads is a multiple of nheads_k.
    """
    q, k, v = _shapes(query, key, value)
    if len(q) == len(k) == 4 and (k == v or (len(v) == 4 and k[:3] == v[:3])):
        batch, nheads, seqlen_q, head_dim = q
        batch_k, nheads_k, seqlen_k, head_dim_k = k
        is_grouped = nheads == nheads_k or (enable_gqa and nheads_k and nheads % nheads_k == 0)
        if is_grouped and batch == batch_k and head_dim == head_dim_k != 0:
            return query, key, value, (seqlen_q, seqlen_k, head_dim)  # so that the usual calls pay for no more
    for name, x in (("query", q), ("key", k), ("value", v)):
        if len(x) < 2:
            raise ValueError(f"{name}: must be {LAYOUT}, got shape {tuple(x)}")
    _check_lengths(q, k, v, "seqlen", -2)
    if q[:-2] != k[:-2] or k[:-2] != v[:-2]:
        dims = _batch(q, k, v)
        nheads, nheads_k = _heads(q, k, v, enable_gqa, -3)
        query = _expanded(query, dims, nheads)
        key, value = (_expanded(_repeated(x, nheads_k, -3), dims, nheads_k) for x in (key, value))
    return _to_4d(query), _to_4d(key), _to_4d(value), (q[-2], k[-2], q[-1])


def packed(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(total_q, nheads, head_dim), (total_k, nheads_k, head_dim) and (total_k, nheads_k, head_dim_v)."""
    q, k, v = _shapes(query, key, value)
    for name, x in (("query", q), ("key", k), ("value", v)):
        if len(x) != 3:
            raise ValueError(f"{name}: must be (total_tokens, heads, head_dim), got shape {tuple(x)}")
    _check_lengths(q, k, v, "total_tokens", -3)
    if q[1] == k[1] == v[1]:
        return query, key, value
    nheads, nheads_k = _heads(q, k, v, enable_gqa, -2)
    key, value = (_repeated(x, nheads_k, -2).expand(-1, nheads_k, -1) for x in (key, value))
    return query.expand(-1, nheads, -1), key, value


def leading(q: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The dimensions before the last two of the result.

    Args:
        q: query as `dense` gives it, or what is shaped like that.
        query, key, value: as the caller gives them.
    """
    if query.dim() == key.dim() == value.dim() == 4:
        return q.shape[0], q.shape[1]
    ndim = max(query.dim(), key.dim(), value.dim())
    if ndim > 4:
        return *_batch(query.shape, key.shape, value.shape), q.shape[1]
    return tuple(q.shape[4 - ndim : 2])


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[torch.Size, torch.Size, torch.Size]:
    try:
        return query.shape, key.shape, value.shape
    except RuntimeError as error:  # of one that is nested and not jagged, which has no shape
        rule = "nested tensors must be of layout torch.jagged, or packed for varlen_attention"
        layouts = query.layout, key.layout, value.layout
        raise ValueError(f"query, key, value: {rule}, got {layouts}") from error


def _check_lengths(q: torch.Size, k: torch.Size, v: torch.Size, keys: str, dim: int) -> None:
    """head_dim is one of query and key, and key and value have the same number of keys, at `dim`."""
    if q[-1] == 0:
        raise ValueError("query: head_dim must be at least 1, got 0")
    if k[-1] != q[-1]:
        raise ValueError(f"key: head_dim {k[-1]} differs from query's {q[-1]}")
    if v[dim] != k[dim]:
        raise ValueError(f"value: shape {tuple(v)} differs from key's {tuple(k)} in {keys}")


# ---- batch dimensions ----


def _batch(q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[int, ...]:
    """The batch dimensions that all broadcast to."""
    batch = tuple(q[:-3])
    for name, x in (("key", tuple(k[:-3])), ("value", tuple(v[:-3]))):
        both = _broadcast(batch, x)
        if both is None:
            others = "query's" if name == "key" else "query's and key's"
            raise ValueError(f"{name}: batch dimensions {x} do not broadcast with {others} {batch}")
        batch = both
    return batch


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    a, b = (1,) * (len(b) - len(a)) + a, (1,) * (len(a) - len(b)) + b
    pairs = list(zip(a, b, strict=True))
    if not all([x == y or x == 1 or y == 1 for x, y in pairs]):
        return None
    return tuple([y if x == 1 else x for x, y in pairs])


def _expanded(x: Tensor, batch: tuple[int, ...], nheads: int) -> Tensor:
    """(*batch, nheads, seqlen, head_dim)."""
    leading = *batch, nheads
    return x if tuple(x.shape[:-2]) == leading else x.expand(*leading, *x.shape[-2:])


def _to_4d(x: Tensor) -> Tensor:
    """The batch dimensions made one, which copies where only some of several broadcast."""
    ndim = x.dim()
    if ndim == 4:
        return x
    return x.flatten(0, -4) if ndim > 4 else _with_leading_ones(x, 4)


def _with_leading_ones(x: Tensor, ndim: int) -> Tensor:
    for _ in range(ndim - x.dim()):  # and not x[None], for which a fake tensor's device has to be there
        x = x.unsqueeze(0)
    return x


# ---- heads ----


def _heads(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool, dim: int) -> tuple[int, int]:
    """The heads of query, and those of key and value, in the call that these shapes make; they stand at `dim`."""
    nheads, heads_k, heads_v = (x[dim] if len(x) >= -dim else 1 for x in (q, k, v))
    for name, heads in (("key", heads_k), ("value", heads_v)):
        if enable_gqa and heads != nheads and (heads == 0 or nheads % heads):
            rule = f"enable_gqa needs query heads to be a multiple of {name} heads"
            raise ValueError(f"{name}: {rule}, got {nheads} and {heads}{_layout_hint(q, k, v)}")
        if not enable_gqa and heads != nheads and heads != 1:
            if nheads != 1:
                counts = f"has {heads} heads, query has {nheads} (enable_gqa=True groups query heads)"
                raise ValueError(f"{name}: {counts}{_layout_hint(q, k, v)}")
            nheads = heads
    if heads_k == heads_v:
        return nheads, heads_k
    larger, smaller = max(heads_k, heads_v), min(heads_k, heads_v)
    return nheads, larger if smaller and larger % smaller == 0 else nheads


def _repeated(x: Tensor, nheads: int, dim: int) -> Tensor:
    """Keys or values of several heads, each of them as often as it takes to be `nheads`: a copy, if there are more."""
    heads = x.shape[dim] if x.dim() >= -dim else 1
    return x if heads in (1, nheads) else x.repeat_interleave(nheads // heads, dim=dim)


def _layout_hint(q: torch.Size, k: torch.Size, v: torch.Size) -> str:
    """What to say of 4-D tensors whose heads do not fit, but would fit if they were the third dimension."""
    if not (len(q) == len(k) == len(v) == 4 and k[2] == v[2] != 0 and q[2] % k[2] == 0):
        return ""
    return f"; the layout is {LAYOUT}, FlashAttention's (batch, seqlen, heads, head_dim) takes transpose(1, 2)"


# ---- mask and bias ----


def broadcast_to_4d(argument: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x as a 4-D view that broadcasts to `shape` with its leading dimensions made one; broadcast dimensions stay 1.

    Args:
        shape: (..., nheads, seqlen_q, seqlen_k).
    """
    missing = len(shape) - x.dim()
    if missing < 0 or not all([size in (1, wanted) for size, wanted in zip(x.shape, shape[missing:], strict=True)]):
        given = tuple(x.shape)
        is_padding = len(shape) > 3 and given == (shape[0], shape[-1])
        hint = f"; a mask of padding is {argument}[:, None, None, :]" if is_padding else ""
        raise ValueError(f"{argument}: shape {given} does not broadcast to {tuple(shape)}{hint}")
    x = _with_leading_ones(x, max(4, len(shape)))
    if x.dim() == 4:
        return x
    if any(size != 1 for size in x.shape[:-3]):
        x = x.expand(*shape[:-3], *x.shape[-3:])
    return x.flatten(0, -4)
