"""What the CPU kernels have to reach: ratios of torch's time to theirs on the same batch, and what was reached."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.cases import MASKS
from benchmarks.comparison import CASE, Row, described, is_padded_form

OURS = "fastattn-cpu"
MISSED, REACHED, GOAL = "missed", "reached", "reached, the goal too"


class Target(NamedTuple):
    """The least ratio to a peer of every float32 case of a kind; a packed batch meets its peer's padded one."""

    name: str
    suite: str
    peer: str
    ratio: float
    goal: float | None = None  # more than has to be reached
    threads: int = 1
    layouts: tuple[str, ...] = ("dense", "padded", "packed")
    masks: tuple[str, ...] = tuple(MASKS)
    seqlen: int | None = None  # None: any
    which: str = "both"

    def covers(self, row: Row) -> bool:
        """True if the row, of whatever provider, is a time of such a case."""
        return (
            (row["suite"], row["dtype"], row["pass"]) == (self.suite, "float32", self.which)
            and row["threads"] == str(self.threads)
            and row["layout"] in self.layouts
            and row["mask"] in self.masks
            and self.seqlen in (None, int(row["seqlen_k"]))
            and bool(row["p50_ms"])
        )


PADDED, PACKED = ("padded",), ("packed",)
PLAIN = ("none", "causal")
TARGETS = (
    Target("packed", "wmt", "torch-flash", 1.7, 1.8, layouts=PACKED),
    Target("packed, plain products", "wmt", "torch-products", 1.3, layouts=PACKED),
    Target("padded", "wmt", "torch-flash", 1.6, 1.7, layouts=PADDED),
    Target("padded", "masks", "torch-flash", 1.6, 1.7, masks=("padding",)),
    Target("mask or bias of all scores", "masks", "torch-flash", 1.3, masks=("bool", "bias")),
    Target("dropout", "wmt-dropout", "torch-math", 2.0, 2.2),
    Target("dropout, plain products", "wmt-dropout", "torch-products", 1.6),
    Target("long", "long", "torch-flash", 1.0, 1.1, masks=("none",)),
    Target("long, causal", "long", "torch-flash", 1.7, masks=("causal",), seqlen=512),
    Target("long, causal", "long", "torch-flash", 1.2, masks=("causal",), seqlen=2048),
    Target("long, dropout", "long", "torch-math", 2.3, masks=("dropout",), seqlen=512),
    Target("long, dropout", "long", "torch-math", 3.4, masks=("dropout",), seqlen=2048),
    Target("two threads", "wmt", "torch-flash", 1.2, threads=2),
    Target("two threads", "masks", "torch-flash", 1.2, threads=2, masks=("padding", "bool", "bias")),
    Target("two threads, dropout", "wmt-dropout", "torch-math", 1.2, threads=2),
    Target("two threads, long", "long", "torch-flash", 1.2, threads=2, masks=PLAIN),
    Target("two threads, long, dropout", "long", "torch-math", 1.2, threads=2, masks=("dropout",)),
    Target("AVX2, packed", "wmt-avx2", "torch-flash", 1.5, layouts=PACKED),
    Target("a search's few queries", "decode", "torch-default", 1.0, which="forward"),
    Target("two threads, few queries", "decode", "torch-default", 1.0, threads=2, which="forward"),
)


class Verdict(NamedTuple):
    """One case, its ratio and whether that is enough."""

    target: str
    case: str
    threads: str
    isa: str
    peer: str
    unit: str
    ours: str
    theirs: str
    ratio: str
    wanted: float
    goal: float | None
    verdict: str


COLUMNS = Verdict._fields


def verdicts(rows: list[Row], targets: Iterable[Target] = TARGETS) -> list[Verdict]:
    """The verdict on every case that has a target and times of both sides."""
    found = []
    for target in targets:
        ours = [row for row in rows if row["provider"] == OURS and target.covers(row)]
        peers = [row for row in rows if row["provider"] == target.peer and row["p50_ms"]]
        found += [_verdict(target, row, peer) for row in ours for peer in peers if _is_the_same(peer, row)]
    return found


def _is_the_same(peer: Row, ours: Row) -> bool:
    """True if both computed the same, or the peer the padded form of it."""
    same = all(peer[name] == ours[name] for name in (*CASE, "pass"))
    return same or (ours["layout"] == "packed" and is_padded_form(peer, ours))


def _verdict(target: Target, ours: Row, peer: Row) -> Verdict:
    ratio = float(peer["p50_ms"]) / float(ours["p50_ms"])
    verdict = MISSED if ratio < target.ratio else GOAL if ratio >= (target.goal or math.inf) else REACHED
    return Verdict(
        target.name, described(ours), ours["threads"], ours["isa"], peer["provider"], "ms", ours["p50_ms"],
        peer["p50_ms"], f"{ratio:.2f}", target.ratio, target.goal, verdict,
    )  # fmt: skip


def memory_verdicts(rows: list[Row]) -> list[Verdict]:
    """The verdicts on memory: a pass takes less than a matrix of all scores would."""
    measured = [row for row in rows if row["provider"] == OURS and row["peak_memory_mib"]]
    return [_memory_verdict(row) for row in measured]


def _memory_verdict(ours: Row) -> Verdict:
    scores = 4 * math.prod(int(ours[name]) for name in ("batch", "nheads", "seqlen_q", "seqlen_k")) / 2**20
    ratio = scores / max(float(ours["peak_memory_mib"]), 0.1)
    return Verdict(
        "no matrix of all scores", described(ours), ours["threads"], ours["isa"], "all scores", "MiB",
        ours["peak_memory_mib"], f"{scores:.0f}", f"{ratio:.2f}", 1.0, None, REACHED if ratio >= 1 else MISSED,
    )  # fmt: skip


def print_verdicts(found: list[Verdict]) -> None:
    """Prints every verdict, what was missed last."""
    if not found:
        print("\nno case has a target and times of both sides")
        return
    print(f"\n{'target':<28}{'case':<66}{'peer':<16}{'ratio':>7}{'wanted':>8}{'goal':>6}")
    for v in sorted(found, key=lambda v: v.verdict == MISSED):
        print(f"{v.target:<28}{v.case:<66}{v.peer:<16}{v.ratio:>7}{v.wanted:>8}{v.goal or '':>6}  {v.verdict}")
    missed = sum(v.verdict == MISSED for v in found)
    print(f"{len(found) - missed} reached, {missed} missed")
