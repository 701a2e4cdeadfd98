"""fastattn's fastest backend against the fastest of all others, case by case: who wins."""

from __future__ import annotations

import statistics
from typing import NamedTuple

Row = dict[str, str]
# threads and instruction set are columns of a CPU's table alone.
CASE = (
    "suite",
    "workload",
    "layout",
    "batch",
    "nheads",
    "seqlen_q",
    "seqlen_k",
    "head_dim",
    "mask",
    "dtype",
    "threads",
    "isa",
)


class Comparison(NamedTuple):
    """Both sides' times of one case and pass."""

    suite: str
    case: str
    which: str
    ours: str
    ours_ms: float
    peer: str
    peer_ms: float

    def speedup(self) -> float:
        """The peer's time over fastattn's: above 1 where fastattn is the faster one."""
        return self.peer_ms / self.ours_ms


def is_ours(name: str) -> bool:
    """True for the providers that are fastattn's own; fastattn-torch is torch's kernel."""
    return name.startswith("fastattn") and name != "fastattn-torch"


def comparisons(rows: list[Row]) -> list[Comparison]:
    """The comparison of every case and pass in which both sides have a time.

    On neither side are fastattn-torch, which is torch's own kernel, and fastattn, which chooses among those. Who has
    no packed attention has to pad: the padded batch of the same sentences is a peer of the packed one.
    """
    timed = [row for row in rows if row["p50_ms"] and row["provider"] not in ("fastattn-torch", "fastattn")]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in timed:
        groups.setdefault((*(row.get(name, "") for name in CASE), row["pass"]), []).append(row)
    found = []
    for key, group in groups.items():
        padded = [row for row in timed if is_padded_form(row, group[0])]
        ours = [row for row in group if is_ours(row["provider"])]
        peers = [row for row in [*group, *padded] if not is_ours(row["provider"])]
        if ours and peers:
            best, peer = (min(side, key=lambda row: float(row["p50_ms"])) for side in (ours, peers))
            name = peer["provider"] + (" (padded)" if peer["layout"] != best["layout"] else "")
            times = float(best["p50_ms"]), float(peer["p50_ms"])
            found.append(Comparison(key[0], described(best), best["pass"], best["provider"], times[0], name, times[1]))
    return found


def is_padded_form(row: Row, other: Row) -> bool:
    """True if the row is of the padded batch of the sentences that are packed in the other's."""
    names = ("suite", "workload", "dtype", "pass", "threads", "isa")
    same = all(row.get(name) == other.get(name) for name in names)
    return same and (row["layout"], other["layout"]) == ("padded", "packed")


def described(row: Row) -> str:
    """The case of a row in words."""
    sizes = "x".join(row[name] for name in ("batch", "nheads", "seqlen_q", "seqlen_k", "head_dim"))
    where = "".join(f" {row[name]}{unit}" for name, unit in (("isa", ""), ("threads", "t")) if row.get(name))
    return f"{row['workload']} {sizes} {row['layout']} {row['mask']} {row['dtype']}{where}"


def medians(found: list[Comparison]) -> dict[str, tuple[float, int, int]]:
    """The median speedup, cases and lost cases of each suite, for forward and backward together."""
    both: dict[str, list[float]] = {}
    for c in found:
        if c.which == "both":
            both.setdefault(c.suite, []).append(c.speedup())
    return {s: (statistics.median(x), len(x), sum(value < 1 for value in x)) for s, x in both.items()}


def print_comparisons(found: list[Comparison]) -> None:
    """Prints every case, then the medians of the suites."""
    if not found:
        print("\nno case has times of both fastattn's kernels and another's: nothing to compare")
        return
    print(f"\nforward and backward, ms\n{'case':<62}{'fastattn':>10}{'best peer':>11}{'speedup':>9}")
    for c in sorted((c for c in found if c.which == "both"), key=Comparison.speedup):
        verdict = "" if c.speedup() >= 1 else "  LOST"
        print(
            f"{c.suite + ' ' + c.case:<62}{c.ours_ms:>10.4f}{c.peer_ms:>11.4f}{c.speedup():>8.2f}x  {c.peer}{verdict}"
        )
    print("\nmedian speedup by suite")
    for suite, (median, count, lost) in medians(found).items():
        print(f"{suite:<12}{median:>6.2f}x of {count} cases, {lost} lost")
