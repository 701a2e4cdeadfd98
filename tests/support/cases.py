"""The table of attention problems that every backend is held to."""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from allpairspy import AllPairs
from torch import Tensor

# Every axis of the contract. Sizes are (seqlen_q, seqlen_k); heads (nheads, nheads_k); dims (head_dim, head_dim_v).
AXES: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "mask": ["none", "padding", "random", "empty-rows", "all-false"],
    "bias": ["none", "full", "per-head", "per-key", "dominating", "infinite"],
    "band": ["none", "causal", "causal-bottom-right", "window", "window-bottom-right", "wide-window", "causal-window"],
    "dropout_p": [0.0, 0.3],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "packed": [False, True],
    "return_lse": [False, True],
    "layout": ["heads-outer", "heads-inner", "expanded", "strided", "odd-rows"],
    "scale": [None, 0.3, -0.5, 0.0],
    "softcap": [None, 3.0],
    "sinks": [False, True],
    "used": [False, True],
    "seqlens": [(17, 63), (64, 65), (63, 17), (128, 127), (1, 129), (129, 1), (0, 5), (5, 0), (1, 1), (150, 200)],
    "dims": [
        (8, 8),
        (16, 16),
        (32, 32),
        (40, 40),
        (64, 64),
        (128, 128),
        (24, 8),
        (8, 40),
        (1, 1),
        (72, 200),
        (256, 256),
    ],
}
# What the full table multiplies out; the other axes are drawn for every case.
CROSSED = ("dtype", "mask", "bias", "band", "dropout_p", "heads", "packed", "return_lse")

BANDS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True, "causal_align": "top-left"},
    "causal-bottom-right": {"is_causal": True, "causal_align": "bottom-right"},
    "window": {"window": (5, 3), "causal_align": "top-left"},
    "window-bottom-right": {"window": (0, 9), "causal_align": "bottom-right"},
    "wide-window": {"window": (40, 35), "causal_align": "bottom-right"},  # some tiles are wholly inside
    "causal-window": {"is_causal": True, "window": (7, None), "causal_align": "bottom-right"},
}


@dataclass(frozen=True)
class Case:
    """One problem; `make` builds its tensors."""

    dtype: torch.dtype = torch.float32
    mask: str = "none"
    bias: str = "none"
    band: str = "none"
    dropout_p: float = 0.0
    heads: tuple[int, int] = (2, 2)
    packed: bool = False
    return_lse: bool = True
    layout: str = "heads-outer"
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    used: bool = False  # of some sequences not all keys, by seqused_k
    seqlens: tuple[int, int] = (17, 23)
    dims: tuple[int, int] = (16, 16)
    batch: int = 3

    def __str__(self) -> str:
        default = Case()
        changed = [f for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in changed) or "default"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that prints as this text, as in a test's name.

        Raises:
            ValueError: there is no such field, or no such value of it.
        """
        changes = {}
        for part in () if text == "default" else text.split(","):
            name, _, value = part.partition("=")
            if name not in AXES and name != "batch":
                raise ValueError(f"case: fields are {', '.join((*AXES, 'batch'))}, got {name!r}")
            changes[name] = _value(name, value)
        return cls(**changes)

    def make(self, device: str = "cpu") -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Tensors (q, k, v, bias or None) in the case's dtype, and the other arguments of the public function."""
        generator = torch.Generator().manual_seed(hash_of(self))
        (nheads, nheads_k), (seqlen_q, seqlen_k), (head_dim, head_dim_v) = self.heads, self.seqlens, self.dims
        arguments: dict[str, Any] = dict(BANDS[self.band])
        arguments |= {"dropout_p": self.dropout_p, "scale": self.scale, "enable_gqa": nheads != nheads_k}
        arguments |= {"return_lse": self.return_lse, "softcap": self.softcap}
        arguments["sinks"] = torch.randn(nheads, generator=generator) * 3 if self.sinks else None
        arguments["seqused_k"] = self._used(seqlen_k)
        arguments["attn_mask"] = self._mask(generator)
        lengths_q, lengths_k = self._lengths(seqlen_q), self._lengths(seqlen_k)
        sizes = [(nheads, seqlen_q, head_dim), (nheads_k, seqlen_k, head_dim), (nheads_k, seqlen_k, head_dim_v)]
        if self.packed:
            # Some tokens past the last sequence belong to none.
            arguments["cu_seqlens_q"], arguments["cu_seqlens_k"] = cumulative(lengths_q), cumulative(lengths_k)
            arguments["max_seqlen_q"], arguments["max_seqlen_k"] = seqlen_q, seqlen_k
            totals = (sum(lengths_q) + 2, sum(lengths_k) + 3, sum(lengths_k) + 3)
            shapes = [(total, heads, dim) for total, (heads, _, dim) in zip(totals, sizes, strict=True)]
        else:
            shapes = [(self.batch, *size) for size in sizes]
        q, k, v = (self._adversarial(shape, generator) for shape in shapes)
        bias = self._bias(generator)
        tensors = [None if x is None else x.to(device) for x in (q, k, v, bias)]
        return tuple(tensors), {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}

    def _lengths(self, longest: int) -> list[int]:
        return [longest, longest // 2, 0, (longest + 1) // 2][: self.batch]

    def _used(self, longest: int) -> Tensor | None:
        """All keys of the first sequence, part of those of the others, none of those of the last."""
        lengths = self._lengths(longest) if self.packed else [longest] * self.batch
        used = [n * (self.batch - 1 - b) // max(1, self.batch - 1) for b, n in enumerate(lengths)]
        return torch.tensor(used, dtype=torch.int32) if self.used else None

    def _adversarial(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Normal values with rows of very different size, in the layout of the case."""
        x = torch.randn(shape, generator=generator) * torch.exp(torch.randn((*shape[:-1], 1), generator=generator))
        x = x.to(self.dtype)
        rows, heads = (0, 1) if self.packed else (2, 1)
        if self.layout == "heads-inner":
            return x.transpose(rows, heads).contiguous().transpose(rows, heads)
        if self.layout == "expanded":
            return x.narrow(heads, 0, 1).expand(shape)
        if self.layout == "strided":
            return torch.stack([x, x], -1)[..., 0]
        if self.layout == "odd-rows":
            return torch.nn.functional.pad(x, (0, 1 + x.size(-1) % 2))[..., : x.size(-1)]
        return x

    def _scores_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads[0], *self.seqlens)

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        batch, nheads, seqlen_q, seqlen_k = self._scores_shape()
        if self.mask == "none":
            return None
        if self.mask == "padding":
            lengths = torch.tensor([max(1, n) for n in self._lengths(seqlen_k)])
            return (torch.arange(seqlen_k) < lengths[:, None])[:, None, None, :]
        if self.mask == "all-false":
            return torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
        mask = torch.rand(batch, nheads, seqlen_q, seqlen_k, generator=generator) > 0.4
        if self.mask == "empty-rows":
            mask[:, :, ::3] = False
            mask[1:2] = False
        return mask

    def _bias(self, generator: torch.Generator) -> Tensor | None:
        batch, nheads, seqlen_q, seqlen_k = self._scores_shape()
        shapes = {"per-head": (nheads, 1, 1), "per-key": (batch, 1, 1, seqlen_k)}
        if self.bias == "none":
            return None
        bias = torch.randn(shapes.get(self.bias, self._scores_shape()), generator=generator)
        if self.bias == "dominating":
            bias[..., :1] = 40.0
        if self.bias == "infinite":
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -torch.inf)
            bias[:, :, 1::4] = -torch.inf
        return bias.to(self.dtype)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def _value(name: str, text: str) -> Any:
    """A value of the table, or else a number or a tuple of whole numbers."""
    for value in AXES.get(name, ()):
        if _text(value) == text:
            return value
    if isinstance(getattr(Case(), name), tuple):
        return tuple(map(int, text.split("x")))
    try:
        return int(text) if name == "batch" else float(text)
    except ValueError:
        raise ValueError(f"{name}: must be one of {', '.join(map(_text, AXES[name]))}, got {text!r}") from None


def cumulative(lengths: list[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def hash_of(case: Case) -> int:
    """The same seed for the same case in every process."""
    return zlib.crc32(str(case).encode())


def pairwise() -> list[Case]:
    """Cases in which every two values of every two axes meet at least once."""
    return [Case(**dict(zip(AXES, row, strict=True))) for row in AllPairs(list(AXES.values()))]


def full() -> list[Case]:
    """Every combination of the crossed axes; the remaining axes are drawn."""
    rest = {name: values for name, values in AXES.items() if name not in CROSSED}
    crossed = itertools.product(*(AXES[name] for name in CROSSED))
    draw = random.Random(0).choice
    return [Case(**dict(zip(CROSSED, row, strict=True)), **{n: draw(v) for n, v in rest.items()}) for row in crossed]


# A backward kernel whose tile has all keys of a row takes delta from the tile: one case for each tile it may have.
WITHIN_ONE_TILE = [
    Case(seqlens=(70, 30), dims=(32, 32), heads=(4, 2), mask="empty-rows", bias="per-key", dropout_p=0.3),
    Case(seqlens=(70, 31), dims=(64, 64), dtype=torch.float16, band="causal", packed=True, mask="random"),
    Case(seqlens=(82, 90), dims=(40, 64), heads=(2, 1), layout="strided", mask="padding"),
    Case(seqlens=(128, 60), dims=(64, 40), heads=(3, 1), packed=True, bias="full"),
    Case(seqlens=(70, 32), dims=(128, 100), dtype=torch.bfloat16, return_lse=False, dropout_p=0.3),
    Case(seqlens=(40, 20), dims=(200, 256), layout="odd-rows", band="causal-bottom-right", mask="padding"),
]
# What else pairs do not promise: a half type in several tiles of two slices; tiles wholly inside a band, and masks and
# biases whose rows are aligned; rows without keys, of a tile without any, that a tile of the bias's gradient has beside
# others; the tiles that only some lengths take.
SEVERAL_TILES = [
    Case(seqlens=(70, 40), dims=(128, 100), dtype=torch.float16, heads=(2, 1), bias="full", dropout_p=0.3, batch=2),
    Case(seqlens=(150, 200), dims=(16, 16), band="wide-window", packed=True, mask="random", bias="full"),
    Case(seqlens=(138, 90), dims=(64, 64), heads=(1, 1), bias="full", band="causal-bottom-right"),
    Case(seqlens=(82, 270), dims=(64, 64), heads=(2, 1), bias="per-head", dropout_p=0.3, batch=1),
    Case(seqlens=(82, 270), dims=(40, 64), heads=(1, 1), dtype=torch.bfloat16, batch=1),
    Case(seqlens=(150, 90), dims=(64, 40), heads=(2, 1), mask="padding"),
    Case(seqlens=(150, 90), dims=(64, 64), heads=(1, 1), dtype=torch.float16, bias="full", packed=True),
    Case(seqlens=(270, 280), dims=(64, 64), heads=(1, 1), dropout_p=0.3, batch=1),
    Case(seqlens=(270, 280), dims=(64, 40), heads=(1, 1), dtype=torch.float16, mask="random", batch=1),
    Case(seqlens=(380, 384), dims=(32, 32), heads=(1, 1), band="causal", batch=1),
    Case(seqlens=(384, 384), dims=(64, 64), heads=(1, 1), band="causal-bottom-right", batch=1),
    Case(seqlens=(128, 120), dims=(24, 32), heads=(2, 1), dtype=torch.float16, mask="padding", packed=True),
    Case(seqlens=(128, 127), dims=(64, 64), heads=(1, 1), dtype=torch.float16, softcap=3.0, batch=1),
    Case(seqlens=(70, 75), dims=(128, 100), heads=(1, 1), band="causal", batch=1),
    Case(seqlens=(70, 75), dims=(200, 256), heads=(1, 1), softcap=3.0, batch=1),
]
# Keys that no query may see: excluded by a mask that is the same for all queries (that of a single query is), on either
# side of the band, by the length of a packed sequence, by seqused_k; in rows of one tile and of several, and in every
# copy of a half type.
UNSEEN_KEYS = [
    Case(seqlens=(70, 75), dims=(24, 32), heads=(4, 2), mask="padding", bias="per-key", dropout_p=0.3),
    Case(seqlens=(82, 90), dims=(64, 64), dtype=torch.float16, mask="padding", bias="per-head", packed=True),
    Case(seqlens=(70, 30), dims=(7, 9), heads=(2, 1), mask="padding", layout="heads-inner"),
    Case(seqlens=(17, 63), band="window", bias="full", packed=True),
    Case(seqlens=(17, 63), dims=(32, 32), band="causal", mask="padding"),
    Case(seqlens=(40, 90), dims=(100, 128), band="window-bottom-right", heads=(1, 1)),
    Case(seqlens=(1, 129), dims=(64, 64), heads=(4, 2), mask="random"),
    Case(seqlens=(70, 75), dims=(24, 32), heads=(4, 2), used=True, softcap=3.0, bias="per-key", dropout_p=0.3),
    Case(seqlens=(82, 90), dims=(64, 64), dtype=torch.float16, used=True, band="window-bottom-right", packed=True),
]
