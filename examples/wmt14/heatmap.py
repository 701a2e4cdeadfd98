"""Pictures of attention: the weights of every head of a layer, for every piece that was written of one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

_STYLE = """
body { font: 13px sans-serif; margin: 1.5em; color: #222 }
section { display: inline-block; margin: 0 2em 2em 0; vertical-align: top }
table { border-collapse: collapse }
th { font-weight: normal; white-space: nowrap; padding: 1px 4px; text-align: right }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left }
td { width: 18px; height: 18px; border: 1px solid #eee }
"""


def draw_attention(path: Path, weights: Tensor, source: Sequence[str], target: Sequence[str], title: str) -> None:
    """Writes one panel per head, as a picture (.png) or as a page whose cells tell their weights (.html).

    Args:
        path: file to write.
        weights: (heads, target, source), each in [0, 1].
        source, target: the pieces of the columns and of the rows.
        title: above all panels.

    Raises:
        ValueError: another ending than .png or .html, or pieces that are not as many as the weights.
    """
    draw = {".png": _draw_png, ".html": _draw_html}.get(path.suffix)
    if draw is None:
        raise ValueError(f"--attention: must end in .png or .html, got {path.name}")
    if weights.shape[1:] != (len(target), len(source)):
        rule = f"must be (heads, {len(target)} target, {len(source)} source pieces)"
        raise ValueError(f"weights: {rule}, got shape {tuple(weights.shape)}")
    draw(path, weights, source, target, title)


def _draw_png(path: Path, weights: Tensor, source: Sequence[str], target: Sequence[str], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heads = weights.shape[0]
    columns = math.ceil(heads**0.5)
    rows = -(-heads // columns)
    width, height = 0.26 * len(source) + 1.2, 0.26 * len(target) + 1.4
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(columns * width + 1, rows * height + 1), layout="constrained", squeeze=False
    )
    for head, axis in enumerate(axes.flat):
        if head >= heads:
            axis.axis("off")
            continue
        image = axis.imshow(weights[head].float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(source)), _readable(source), rotation=90)
        axis.set_yticks(range(len(target)), _readable(target))
        axis.set_title(f"head {head + 1}")
    figure.colorbar(image, ax=axes, shrink=0.5, label="attention weight")
    figure.suptitle(_readable([title])[0])
    figure.supxlabel("source piece that is looked at (▁ begins a word)")
    figure.supylabel("target piece being written")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _readable(texts: Sequence[str]) -> list[str]:
    """The texts as matplotlib shows them; bare dollar signs would begin formulas."""
    return [text.replace("$", r"\$") for text in texts]


def _draw_html(path: Path, weights: Tensor, source: Sequence[str], target: Sequence[str], title: str) -> None:
    panels = "\n".join(
        f"<section><h3>head {head}</h3>\n{_table(panel.tolist(), source, target)}</section>"
        for head, panel in enumerate(weights, start=1)
    )
    page = (
        f'<!doctype html>\n<html><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h2>{escape(title)}</h2>\n"
        "<p>Rows: the target piece being written. Columns: the source piece that is looked at (▁ begins a word).</p>\n"
        f"{panels}\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(weights: list[list[float]], source: Sequence[str], target: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(piece)}</th>" for piece in source)
    lines = [f"<table><thead><tr><th></th>{head}</tr></thead>"]
    for written, row in zip(target, weights, strict=True):
        cells = "".join(_cell(f"{written} ← {read}", weight) for read, weight in zip(source, row, strict=True))
        lines.append(f"<tr><th>{escape(written)}</th>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(label: str, weight: float) -> str:
    return f'<td style="background:rgba(8,81,156,{weight:.3f})" title="{escape(label)}: {weight:.3f}"></td>'
