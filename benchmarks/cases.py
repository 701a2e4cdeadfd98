"""The attention calls that are timed, as data, and their tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import lengths, published

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
DROPOUT_P = 0.1
ALONE = ("none", "causal", "padding", "bool", "bias", "bias-gradient", "dropout", "all")  # of MASKS, in every_case

# What a call has besides q, k and v. "padding" is a bool mask of keys, "bool" one of queries and keys of every
# sentence, a bias has the shape (1, nheads, seqlen_q, seqlen_k).
MASKS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "causal": frozenset({"causal"}),
    "padding": frozenset({"padding"}),
    "bool": frozenset({"bool"}),
    "bias": frozenset({"bias"}),
    "bias-gradient": frozenset({"bias", "gradient"}),
    "dropout": frozenset({"dropout"}),
    "padding-dropout": frozenset({"padding", "dropout"}),
    "causal-dropout": frozenset({"causal", "dropout"}),
    "all": frozenset({"causal", "bool", "bias", "gradient", "dropout"}),
}


@dataclass
class AttentionInputs:
    """The tensors of one call and its other arguments."""

    q: Tensor  # (batch, nheads, seqlen_q, head_dim)    packed: (total_q, nheads, head_dim)
    k: Tensor  # (batch, nheads, seqlen_k, head_dim)    packed: (total_k, nheads, head_dim)
    v: Tensor
    dout: Tensor  # like q
    mask: Tensor | None = None  # bool, True = may attend
    bias: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    cu_seqlens_q: Tensor | None = None  # (batch + 1,) int32; None when dense
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by the name of that gradient."""
        named = {"dq": self.q, "dk": self.k, "dv": self.v, "dbias": self.bias}
        return {name: x for name, x in named.items() if x is not None and x.requires_grad}

    def is_packed(self) -> bool:
        """True if sequences lie end to end, without padding."""
        return self.cu_seqlens_q is not None

    def bytes(self, which: str) -> int:
        """Bytes that any attention moves: its arguments, out and lse; backward dout and the gradients as well."""
        lse = 4 * self.q.numel() // self.q.shape[-1]
        read = [x for x in (self.q, self.k, self.v, self.mask, self.bias) if x is not None]
        forward = sum(x.nbytes for x in read) + self.q.nbytes + lse
        backward = forward + self.dout.nbytes + sum(x.nbytes for x in self.leaves().values())
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]


@dataclass(frozen=True)
class AttentionCase:
    """The sizes and features of one call: dense, or the sentences of an update, padded or packed."""

    suite: str
    workload: str
    batch: int
    nheads: int
    seqlen_q: int  # of the longest sentence
    seqlen_k: int
    head_dim: int
    mask: str
    dtype: torch.dtype
    layout: str = "dense"  # "padded", "packed"
    lengths_q: tuple[int, ...] = ()
    lengths_k: tuple[int, ...] = ()

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.nheads}x{self.seqlen_q}x{self.seqlen_k}x{self.head_dim}"
        return f"{self.suite} {self.workload} {sizes} {self.layout} {self.mask} {short(self.dtype)}"

    def columns(self) -> dict[str, object]:
        """The columns that describe the case in a table."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("lengths")}
        return named | {"dtype": short(self.dtype)}

    def batch_of(self) -> tuple[str, str, torch.dtype]:
        """A key that the padded and the packed batch of the same sentences have in common."""
        return self.suite, self.workload, self.dtype

    def make(self, device: torch.device) -> AttentionInputs:
        """The tensors, with the same values every time, and masks with a key in every row."""
        generator = torch.Generator(device).manual_seed(0)
        query, key = self._shapes()

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        q, k, v = (normal(shape).requires_grad_() for shape in (query, key, key))
        features = MASKS[self.mask]
        inputs = AttentionInputs(q, k, v, normal(query), is_causal="causal" in features)
        inputs.dropout_p = DROPOUT_P if "dropout" in features else 0.0
        if "padding" in features:
            inputs.mask = self._padding(generator)
        if "bool" in features:
            shape = (self.batch, 1, self.seqlen_q, self.seqlen_k)
            inputs.mask = torch.rand(shape, generator=generator, device=device) < 0.7
            inputs.mask[..., 0] = True
        if "bias" in features:
            inputs.bias = normal((1, self.nheads, self.seqlen_q, self.seqlen_k))
            inputs.bias.requires_grad_("gradient" in features)
        if self.layout == "packed":
            inputs.cu_seqlens_q, inputs.cu_seqlens_k = (
                F.pad(torch.tensor(sizes, device=device).cumsum(0), (1, 0)).int()
                for sizes in (self.lengths_q, self.lengths_k)
            )
            inputs.max_seqlen_q, inputs.max_seqlen_k = self.seqlen_q, self.seqlen_k
        return inputs

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.layout == "packed":
            totals = sum(self.lengths_q), sum(self.lengths_k)
            return (totals[0], self.nheads, self.head_dim), (totals[1], self.nheads, self.head_dim)
        start = self.batch, self.nheads
        return (*start, self.seqlen_q, self.head_dim), (*start, self.seqlen_k, self.head_dim)

    def _padding(self, generator: torch.Generator) -> Tensor:
        """A mask (batch, 1, 1, seqlen_k) by the sentences' lengths, or by random ones from half the longest on."""
        device = generator.device
        if self.lengths_k:
            filled = torch.tensor(self.lengths_k, device=device)
        else:
            filled = torch.rand(self.batch, generator=generator, device=device).add(1) / 2 * self.seqlen_k
        return torch.arange(self.seqlen_k, device=device) < filled[:, None, None, None]

    def flops(self, which: str) -> float:
        """Operations of two matrix products forward (half if causal) and five backward; a dense batch has padding."""
        pairs = zip(self.lengths_q, self.lengths_k, strict=True)
        scores = sum(q * k for q, k in pairs) if self.layout == "packed" else self.batch * self.seqlen_q * self.seqlen_k
        forward = 4.0 * scores * self.nheads * self.head_dim / (2 if "causal" in MASKS[self.mask] else 1)
        return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]


def precisions(device: torch.device) -> list[torch.dtype]:
    """float32 and, on a GPU, the half precision that it is good at."""
    if device.type == "cpu":
        return [torch.float32]
    return [torch.float32, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16]


def short(dtype: torch.dtype) -> str:
    """The dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


# ---- suites ----


def of_updates(
    chosen: Sequence[lengths.Lengths], dtypes: Iterable[torch.dtype], nheads: int = 8
) -> Iterator[AttentionCase]:
    """The three attentions of a Transformer on updates of sentence pairs, padded and packed."""
    for dtype, update, layout in product(dtypes, chosen, ("padded", "packed")):
        source, target = update
        for kind, queries, keys, mask in (
            ("encoder", source, source, "padding"),
            ("decoder", target, target, "causal"),
            ("cross", target, source, "padding"),
        ):
            yield AttentionCase(
                "wmt", f"{kind} {max(queries)}", len(queries), nheads, max(queries), max(keys), 64,
                "none" if layout == "packed" and mask == "padding" else mask, dtype, layout, queries, keys,
            )  # fmt: skip


def square(
    suite: str, batch: int, nheads: int, seqlen: int, head_dim: int, mask: str, dtype: torch.dtype
) -> AttentionCase:
    """Self-attention of sequences of one length."""
    return AttentionCase(suite, "self", batch, nheads, seqlen, seqlen, head_dim, mask, dtype)


def every_case() -> list[AttentionCase]:
    """All suites: WMT updates, short sequences, masks, long sequences (16k tokens, width 2048), the published table."""
    cases = list(of_updates(lengths.updates(3), DTYPES))
    for dtype, mask, n in product(DTYPES, ("none", "padding", "causal"), (16, 32, 64, 82, 128)):
        cases.append(square("short", 512, 8, n, 64, mask, dtype))
    for dtype, (batch, n), mask in product(DTYPES, ((400, 64), (200, 128), (16, 512)), ALONE):
        cases.append(square("masks", batch, 8, n, 64, mask, dtype))
    for dtype, head_dim, mask, n in product(DTYPES, (64, 128), ("none", "causal"), [512 << i for i in range(7)]):
        if dtype != torch.float32 or n <= 4096:
            cases.append(square("long", max(1, 16_384 // n), 2048 // head_dim, n, head_dim, mask, dtype))
    for shape, dtype in published.shapes():
        cases.append(square("published", *shape, "none", dtype))
    return cases


def quick_cases() -> list[AttentionCase]:
    """Few cases of every suite, yet each length up to 8192, width, mask, workload and dtype in one of them.

    A batch of sentences comes in both layouts.
    """
    every = [case for case in every_case() if case.seqlen_k <= 8192]
    kept: list[AttentionCase] = []
    times_seen: Counter[tuple[object, ...]] = Counter()

    def gain(case: AttentionCase) -> tuple[int, int]:
        counts = [times_seen[value] for value in _shown(case)]
        return counts.count(0), -sum(counts)

    while gain(best := max(every, key=gain))[0]:
        times_seen.update(_shown(best))
        kept += [case for case in every if case is best or (case.lengths_q and case.batch_of() == best.batch_of())]
    return kept


def _shown(case: AttentionCase) -> set[tuple[object, ...]]:
    """The values by which a case differs from others of its suite."""
    described = case.columns()
    return {
        (case.suite, name, described[name])
        for name in ("workload", "seqlen_k", "head_dim", "dtype", *(["mask"] if case.suite != "wmt" else []))
    }


def smoke_cases() -> list[AttentionCase]:
    """Tiny cases, with every mask and layout."""
    tiny = [lengths.Lengths((3, 9, 5), (4, 2, 7))]
    cases = [square("masks", 2, 2, 9, 16, mask, torch.float32) for mask in MASKS]
    return [*of_updates(tiny, [torch.float32], nheads=2), *cases]
