"""The curve of the training, and the attention of a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType

from torch import Tensor

WINDOW = 50  # steps of the running mean, half of them before and half after


@dataclass(frozen=True)
class Attention:
    """Where a translation looked: (heads, target, source) weights, with the pieces of both sides and their texts."""

    weights: Tensor
    source: list[str]
    target: list[str]
    source_text: str
    target_text: str


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of the values around each, `window` to both sides together, fewer at the ends."""
    sums = [0.0, *accumulate(values)]
    spans = [(max(0, i - window // 2), min(len(values), i + window // 2 + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def draw_history(path: Path, nll: Sequence[float], learning_rate: Sequence[float]) -> None:
    """Training loss (logarithmic) with its running mean, and the learning rate, over the steps."""
    figure, axis = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    steps = range(1, len(nll) + 1)
    rate = axis.twinx()
    rate.plot(steps, learning_rate, color="tab:gray", linewidth=1, linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color="tab:gray")
    rate.set_ylim(bottom=0)
    axis.set_zorder(rate.get_zorder() + 1)  # the loss is what is looked at
    axis.patch.set_visible(False)
    axis.semilogy(steps, nll, color="tab:blue", linewidth=0.6, alpha=0.35, label="each step")
    axis.semilogy(steps, running_mean(nll), color="tab:blue", linewidth=2, label=f"mean over {WINDOW} steps")
    axis.set(xlabel="step", ylabel="nats per German piece", title="Training loss (negative log-likelihood)")
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def draw_attention(path: Path, attention: Attention) -> None:
    """Writes one panel per head."""
    source, target = attention.source, attention.target
    size = 0.3 * max(len(source), len(target)) + 1.2
    figure, axes = pyplot().subplots(2, 2, figsize=(2 * size, 2 * size), layout="constrained")
    for head, axis in enumerate(axes.flat):
        image = axis.imshow(attention.weights[head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(source)), source, rotation=90)
        axis.set_yticks(range(len(target)), target)
        axis.set_title(f"head {head + 1}")
    figure.colorbar(image, ax=axes, shrink=0.4, label="attention weight")
    figure.suptitle(f"{attention.source_text}\n→ {attention.target_text}")
    figure.supxlabel("source piece that is looked at (▁ begins a word)")
    figure.supylabel("target piece being written")
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing into files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
