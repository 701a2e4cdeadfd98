"""Attention worked out by hand-sized numbers: three inputs, every matrix printed, each step computed by fastattn.

    python examples/worked_example.py --out worked_example.png

Read beside "Attention Is All You Need" (Vaswani et al., 2017); sections and equation numbers are that paper's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastattn
from fastattn.nmt.transformer import sinusoidal_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

X = torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]])  # (seqlen, d_model)
W_Q = torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 1]])  # (d_model, head_dim)
W_K = torch.tensor([[0.0, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 0]])
W_V = torch.tensor([[0.0, 2, 0], [0, 3, 0], [1, 0, 3], [1, 1, 0]])
HEAD_DIM = W_K.shape[1]


def single_head(x: Tensor = X) -> dict[str, Tensor]:
    """One head without the scaling: projections, scores, weights, output.

    Args:
        x: (seqlen, d_model) float32.
    """
    q, k, v = x @ W_Q, x @ W_K, x @ W_V
    return {
        "q": q,
        "k": k,
        "v": v,
        "scores": q @ k.T,
        "weights": weights_of(q, k, scale=1.0),
        "out": attend(q, k, v, scale=1.0),
    }


def variants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The same head with the causal mask, and with the paper's scale."""
    return {
        "causal weights": weights_of(q, k, scale=1.0, is_causal=True),
        "causal out": attend(q, k, v, scale=1.0, is_causal=True),
        "scaled weights": weights_of(q, k),
        "scaled out": attend(q, k, v),
    }


def two_heads(x: Tensor = X) -> tuple[fastattn.MultiHeadAttention, Tensor, Tensor]:
    """Two heads: the one above, and one that looks through the same projections with their rows reversed.

    Args:
        x: (seqlen, d_model) float32.

    Returns:
        The module, its output (seqlen, d_model) and its weights (num_heads, seqlen, seqlen).
    """
    attention = fastattn.MultiHeadAttention(X.shape[1], 2, bias=False, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM)
    rows = [weight.T for pair in (W_Q, W_K, W_V) for weight in (pair, pair.flip(0))]
    output = torch.eye(HEAD_DIM, X.shape[1])  # W^O adds head 2, shifted by one column, to head 1
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat(rows))
        attention.out_proj.weight.copy_(torch.cat([output, output.roll(1, 1)]).T)
        out, weights = attention(x, x, x, average_attn_weights=False)
    return attention, out, weights


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False) -> Tensor:
    """fastattn.scaled_dot_product_attention of one head: (seqlen, head_dim) in and out."""
    return fastattn.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, is_causal=is_causal)[0]


def weights_of(q: Tensor, k: Tensor, scale: float | None = None, is_causal: bool = False) -> Tensor:
    """The softmax weights (seqlen, seqlen) of one head."""
    return fastattn.attention_weights(q, k, scale=scale, is_causal=is_causal)


# ---- the text ----


def lines() -> Iterator[str]:
    """The worked example, paragraph by paragraph."""
    step = single_head()
    yield from projections(step)
    yield from attention_steps(step)
    yield from masks_and_scale(step)
    yield from multi_head(step)
    yield from positions()


def projections(step: dict[str, Tensor]) -> Iterator[str]:
    yield "1. Inputs and projections (section 3.2.2)\n"
    yield "Three tokens, each a row of d_model = 4 numbers. Each is projected three times: the query asks, the key"
    yield "answers, the value is what is handed over.\n"
    yield show("x", X)
    for name, weight in (("q", W_Q), ("k", W_K), ("v", W_V)):
        yield show(f"W^{name.upper()}", weight)
        yield show(f"{name} = x W^{name.upper()}", step[name])


def attention_steps(step: dict[str, Tensor]) -> Iterator[str]:
    first = step["scores"][0]
    yield "2. Scores: q k^T (equation 1, without the scale)\n"
    yield "Entry (i, j) says how well the query of token i fits the key of token j.\n"
    yield show("scores", step["scores"])
    yield "3. Softmax of every row (equation 1)\n"
    powers = " + ".join(f"e^{score:g}" for score in first)
    yield f"Weights are positive and sum to 1 in every row. First row, first entry: e^{first[0]:g} / ({powers})"
    yield f"= {step['weights'][0, 0]:.4f}.\n"
    yield show("weights", step["weights"], 3)
    yield "4. Output: weights times v (equation 1)\n"
    pairs = step["weights"][0], step["v"]
    terms = " + ".join(f"{weight:.3f} * {vector.tolist()}" for weight, vector in zip(*pairs, strict=True))
    yield f"Every output is an average of the values. First row: {terms}.\n"
    yield show("out", step["out"], 3)
    difference = (step["weights"] @ step["v"] - step["out"]).abs().max().item()
    yield "fastattn.scaled_dot_product_attention(q, k, v, scale=1.0) gave this without storing the weights; it differs"
    yield f"from weights times v by at most {difference:.0e}.\n"


def masks_and_scale(step: dict[str, Tensor]) -> Iterator[str]:
    masked = variants(step["q"], step["k"], step["v"])
    yield "5. The causal mask (section 3.2.3)\n"
    yield "A decoder must not look at words it has yet to write: scores above the diagonal become -infinity, so their"
    yield "weights are 0. The first token can only attend to itself; the last row is unchanged. (is_causal=True)\n"
    yield show("causal weights", masked["causal weights"], 3)
    yield show("causal out", masked["causal out"], 3)
    yield f"6. The scale 1 / sqrt(d_k) (equation 1), here 1 / sqrt({HEAD_DIM}) = {HEAD_DIM**-0.5:.3f}\n"
    yield "Smaller scores make a flatter softmax: the largest weight of row 2 falls from"
    yield f"{step['weights'][1].max():.4f} to {masked['scaled weights'][1].max():.4f}. (scale=None, the default)\n"
    yield show("scaled weights", masked["scaled weights"], 3)
    yield show("scaled out", masked["scaled out"], 3)
    yield "Why: for independent components of variance 1 the variance of q . k is d_k (footnote 4). With d_k = 512 and"
    yield "8 random keys the largest weight is, on average over 1000 queries:\n"
    without, with_scale = mean_largest_weights()
    yield f"  without scale {without:.2f}    with scale {with_scale:.2f}    (1/8 would be no preference)\n"


def mean_largest_weights(head_dim: int = 512, keys: int = 8, queries: int = 1000) -> tuple[float, float]:
    """Mean of each random query's largest weight, without and with the scale 1 / sqrt(head_dim)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, head_dim, generator=generator)
    k = torch.randn(keys, head_dim, generator=generator)
    without, with_scale = (weights_of(q, k, scale).amax(1).mean().item() for scale in (1.0, head_dim**-0.5))
    return without, with_scale


def multi_head(step: dict[str, Tensor]) -> Iterator[str]:
    attention, out, weights = two_heads()
    yield "7. Several heads (section 3.2.2)\n"
    yield "MultiHead(Q, K, V) = Concat(head_1, head_2) W^O. Head 1 is the head above, with its scale; head 2 reads the"
    yield "input through the same matrices with their rows reversed, and prefers other tokens."
    yield "(fastattn.MultiHeadAttention(4, 2, bias=False, head_dim=3, v_head_dim=3))\n"
    yield show("weights, head 1", weights[0], 3)
    yield show("weights, head 2", weights[1], 3)
    yield show("W^O", attention.out_proj.weight.detach().T)
    yield show("out", out, 3)


def positions() -> Iterator[str]:
    table = sinusoidal_positions(*X.shape)
    order = [2, 0, 1]
    moved = single_head(X[order])["out"] - single_head()["out"][order]
    placed = single_head(X[order] + table)["out"] - single_head(X + table)["out"][order]
    yield "8. Positions (section 3.5)\n"
    yield "Attention does not know the order of its inputs: move the three tokens around and the same outputs come out,"
    yield f"moved (largest difference {moved.abs().max():.1e}). So a code of the position is added to each input:"
    yield "PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos of the same.\n"
    yield show("PE", table, 3)
    yield show("x + PE", X + table, 3)
    yield show("out", single_head(X + table)["out"], 3)
    yield f"Moved around, the tokens now give different outputs (largest difference {placed.abs().max():.2f}).\n"


def show(name: str, matrix: Tensor, digits: int = 0) -> str:
    """`name = matrix`, one row per line."""
    rows = ["  ".join(f"{value:{digits + 4}.{digits}f}" for value in row) for row in matrix.tolist()]
    label = f"  {name} = "
    return label + ("\n" + " " * len(label)).join(rows) + "\n"


# ---- the picture ----


def draw(path: Path) -> None:
    """Draws every matrix of the text as a heat map with its numbers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = single_head()
    masked = variants(step["q"], step["k"], step["v"])
    _, out, head_weights = two_heads()
    panels = [
        ("1. inputs x", X, "token", "dimension"),
        ("1. queries q = x $W^Q$", step["q"], "token", "dimension"),
        ("1. keys k = x $W^K$", step["k"], "token", "dimension"),
        ("1. values v = x $W^V$", step["v"], "token", "dimension"),
        ("2. scores q $k^T$", step["scores"], "query", "key"),
        ("3. weights softmax(q $k^T$)", step["weights"], "query", "key"),
        ("4. output weights · v", step["out"], "token", "dimension"),
        ("5. causal weights", without_future(masked["causal weights"]), "query", "key"),
        ("6. scaled weights = head 1", masked["scaled weights"], "query", "key"),
        ("7. weights of head 2", head_weights[1], "query", "key"),
        ("7. output of two heads", out, "token", "dimension"),
        ("8. positions PE", sinusoidal_positions(*X.shape), "position", "dimension"),
    ]
    figure, axes = plt.subplots(3, 4, figsize=(13, 8.4), layout="constrained")
    for axis, (title, matrix, rows, columns) in zip(axes.flat, panels, strict=True):
        axis.set(title=title, ylabel=rows, xlabel=columns)
        draw_matrix(axis, matrix, is_weights="weights" in title and rows == "query")
    figure.suptitle('Attention by hand: x → q, k, v → softmax(q $k^T$) v ("Attention Is All You Need", equation 1)')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def without_future(weights: Tensor) -> Tensor:
    """The weights with NaN above the diagonal, to be drawn as masked."""
    return weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), torch.nan)


def draw_matrix(axis: Axes, matrix: Tensor, is_weights: bool) -> None:
    """One matrix: colour by value, every number written into its cell."""
    low, high = (0.0, 1.0) if is_weights else (min(0.0, matrix.min().item()), matrix.max().item())
    axis.imshow(matrix.numpy(), cmap="Blues", vmin=low, vmax=high * 1.25)
    axis.set_xticks(range(matrix.shape[1]), map(str, range(1, matrix.shape[1] + 1)))
    first = 0 if axis.get_ylabel() == "position" else 1
    axis.set_yticks(range(matrix.shape[0]), map(str, range(first, first + matrix.shape[0])))
    is_whole = bool((matrix == matrix.round()).all())
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            is_dark = (value - low) / (high * 1.25 - low) > 0.5
            text = "masked" if value != value else f"{value:.0f}" if is_whole else f"{value:.3f}"
            axis.text(j, i, text, ha="center", va="center", color="white" if is_dark else "black")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("worked_example.png"), help="where the picture goes (PNG)")
    args = parser.parse_args()
    for line in lines():
        print(line)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(args.out)
    print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
