"""The columns of the table of attention."""

from __future__ import annotations

from typing import Any

from benchmarks import published
from benchmarks.cases import AttentionCase
from benchmarks.roofline import Roofline
from benchmarks.timing import PassTime

CASE_COLUMNS = ("suite", "workload", "layout", "batch", "nheads", "seqlen_q", "seqlen_k", "head_dim", "mask", "dtype")
COLUMNS = (
    *CASE_COLUMNS,
    *("provider", "pass", "p50_ms", "p20_ms", "p80_ms", "tflops", "percent_of_peak", "gb_s", "percent_of_copy"),
    *("percent_of_roofline", "host_ms", "peak_memory_mib", "published_fused_ms", "published_vanilla_ms", "note"),
    "no_numbers_because",
)


def numbers(
    case: AttentionCase, moved: int, which: str, time: PassTime, roof: Roofline, peak: float | None
) -> dict[str, Any]:
    """The columns of one pass; none but the reason if it seems faster than the device can be.

    Args:
        case: what was timed.
        moved: bytes.
        which: the pass.
        time: that it took.
        roof: the device's measured rates.
        peak: TFLOP/s that nothing on the device can exceed; None where they are not known.
    """
    flops = case.flops(which)
    tflops = flops / time.p50_ms * 1e-9
    if peak is not None and tflops > peak:
        return {"no_numbers_because": f"wrong: {tflops:.1f} TFLOP/s, the device's peak is {peak}"}
    gb_s = moved / time.p50_ms * 1e-6
    theirs = published.times(which, (case.batch, case.nheads, case.seqlen_q, case.head_dim), case.dtype)
    published_ms = {} if theirs is None or case.suite != "published" else theirs._asdict()
    return {
        **{name: f"{milliseconds:.4f}" for name, milliseconds in time._asdict().items()},
        "tflops": f"{tflops:.3f}",
        "percent_of_peak": None if peak is None else f"{100 * tflops / peak:.1f}",
        "gb_s": f"{gb_s:.1f}",
        "percent_of_copy": f"{100 * gb_s / roof.copy_gb_s:.1f}",
        "percent_of_roofline": f"{100 * roof.share(flops, moved, case.dtype, time.p50_ms):.1f}",
        **{f"published_{name}": milliseconds for name, milliseconds in published_ms.items()},
    }


def of_host(host_ms: float, p50_ms: float, note: str) -> dict[str, str]:
    """The columns about the host: its time and, if that is more than the device's, a note that says so."""
    if host_ms > p50_ms:
        note = "; ".join(filter(None, (note, "the host takes longer than the device")))
    return {"host_ms": f"{host_ms:.4f}", "note": note}


def line(measured: list[dict[str, Any]]) -> str:
    """The rows of one provider for the terminal."""
    timed = [
        f"{row['pass']} {row['p50_ms']} ms ({row['percent_of_roofline']} %)" for row in measured if "p50_ms" in row
    ]
    return "  ".join([*timed, measured[0].get("note", "")]) if timed else measured[0]["no_numbers_because"]
