"""The arithmetic of a training step on a P100, part by part; the time of its attention comes from the cycle model.

Products of matrices run at a published rate of cuBLAS for as many operations. Everything between them runs at the rate
of the memory: `traffic` counts how often torch's kernels, forward and backward, read or write each tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from examples.wmt14 import estimate
from fastattn import TransformerConfig
from fastattn.nmt import losses

from . import chip, sgemm

# TFLOP/s of cuBLAS on a P100 by the rows, columns and terms of a product, from github.com/baidu-research/DeepBench.
SINGLE = {
    (1024, 700, 512): 5.21,
    (4096, 128, 4096): 7.00,
    (3072, 7435, 1024): 8.60,
    (2560, 7000, 2560): 8.87,
}
# Those with as few outputs and as many tokens as a model has, by outputs, tokens and terms: as they are, and with the
# first matrix transposed.
MANY_TOKENS = {
    (512, 24000, 1530): (8.62, 8.52),
    (512, 24000, 2048): (8.69, 8.58),
    (512, 24000, 2560): (8.69, 8.62),
    (512, 24000, 2816): (8.71, 8.63),
    (512, 48000, 1530): (8.82, 8.62),
    (512, 48000, 2048): (8.98, 8.60),
    (512, 48000, 2560): (8.78, 8.94),
    (512, 48000, 2816): (8.72, 8.95),
    (1024, 24000, 1530): (8.83, 8.71),
    (1024, 24000, 2048): (8.92, 8.59),
    (1024, 24000, 2560): (8.90, 8.94),
    (1024, 24000, 2816): (8.72, 8.95),
    (1024, 48000, 1530): (8.96, 8.87),
    (1024, 48000, 2048): (9.03, 8.89),
    (1024, 48000, 2560): (9.03, 8.96),
    (1024, 48000, 2816): (9.04, 8.96),
}
DEEPBENCH = SINGLE | {sizes: sum(rates) / len(rates) for sizes, rates in MANY_TOKENS.items()}
SQUARES = {(size, size, size): rate for size, rate in sgemm.CUBLAS.items()}
PRODUCTS_OF_LAYER = 3  # of a linear layer: the result, the gradient of its input, that of its weight

# Reads and writes of each element of a tensor, forward and backward; a byte of a dropout mask counts as a quarter.
LAYER_NORM = 2 + 5  # backward reads both tensors once more for the gradients of scale and bias
DROPOUT = 2 * 2.25
RESIDUAL_SUM = 2 * 3  # the sum, and that of the two gradients of its input
RELU = 2 + 3
JOINED = 2  # the gradients of q, k and v become one tensor
EMBEDDED = 2 + 2 + 1 + 3 + DROPOUT + 2 + 2  # look-up, scale, positions, their sum; backward scale and scatter
SPACE = 2 + 1  # the vector of the target language, added to the source
SHARED_MATRIX = 2 + 2 + 1 + 2 + 2 + 2 * 3  # its copy without padding, and the three gradients that are summed
ADAM, NORM, ACCUMULATE = 28, 4, 12  # bytes per parameter


class Product(NamedTuple):
    """A product of matrices that a step computes `times` times, the last time perhaps in part."""

    part: str
    tokens: float
    inputs: int
    outputs: int
    times: float = 1

    @property
    def flops(self) -> float:
        """The operations of computing it once."""
        return 2.0 * self.tokens * self.inputs * self.outputs


@dataclass(frozen=True)
class StepAssumptions:
    """Assumptions about everything in a step but attention, to be changed one at a time."""

    cublas: str = "DeepBench"  # or "squares"
    product_rate: float = 1.0  # factor on the rates of cuBLAS
    dram_rate: float = 1.0  # factor on the bandwidth of DRAM

    def product_flops(self, flops: float) -> float:
        """FLOP/s of a product of so many operations, interpolated between the published ones on a logarithmic scale."""
        alike: dict[int, list[float]] = {}  # by the number of operations
        for sizes, rate in {"DeepBench": DEEPBENCH, "squares": SQUARES}[self.cublas].items():
            alike.setdefault(2 * math.prod(sizes), []).append(rate)
        known = sorted(alike)
        rates = [sum(alike[n]) / len(alike[n]) for n in known]
        return float(np.interp(math.log(flops), np.log(known), rates)) * 1e12 * self.product_rate


@dataclass(frozen=True)
class Work:
    """The work of one GPU for one update.

    Args:
        model: the model that is trained.
        tokens: the number of tokens on each side.
        steps: the number of steps into which they are divided, whose gradients are added up.
    """

    model: TransformerConfig
    tokens: float
    steps: int = 1

    @property
    def flops(self) -> float:
        """The operations of all products, without those of attention."""
        return sum(product.times * product.flops for product in products(self.model, self.tokens))

    @property
    def kernels(self) -> int:
        """The number of kernels that are started."""
        encoder = estimate.ENCODER_KERNELS * self.model.num_encoder_layers
        return self.steps * (encoder + estimate.DECODER_KERNELS * self.model.num_decoder_layers)

    @property
    def host_seconds(self) -> float:
        """The time that the host takes to start the kernels."""
        return self.kernels * estimate.LAUNCH_SECONDS

    def parts(
        self, attention: float, card: chip.Card, assumed: StepAssumptions = StepAssumptions()
    ) -> dict[str, float]:
        """Seconds of each part.

        Args:
            attention: seconds per token that attention takes, all layers, forward and backward.
            card: the card on which it runs.
            assumed: the assumptions about the rest.
        """
        tokens_per_step = self.tokens / self.steps
        seconds = {"attention": attention * self.tokens}
        for product in products(self.model, tokens_per_step):
            spent = self.steps * product.times * product.flops / assumed.product_flops(product.flops)
            seconds[product.part] = seconds.get(product.part, 0.0) + spent
        bandwidth = card.dram_share * card.dram_bytes_per_s * assumed.dram_rate
        moved = {name: self.steps * n for name, n in traffic(self.model, tokens_per_step).items()}
        parameters = estimate.count_parameters(self.model)
        moved["Adam and the gradient's norm"] = (ADAM + NORM) * parameters
        moved["adding up gradients"] = ACCUMULATE * parameters * (self.steps - 1)
        seconds |= {name: n / bandwidth for name, n in moved.items()}
        return seconds | {"gaps between kernels": self.kernels * chip.LAUNCH_SECONDS}


def needed_tflops(work: Work, tokens_per_second: float, rest: float) -> float:
    """The TFLOP/s of the products that an aim needs.

    Args:
        work: that of an update.
        tokens_per_second: the aim.
        rest: seconds of everything else.
    """
    return work.flops / (work.tokens / tokens_per_second - rest) * 1e-12


def _widths(model: TransformerConfig) -> tuple[int, int, int]:
    """The widths of all heads together: of queries, of keys with values, of the result."""
    default = model.d_model // model.num_heads
    head_dim, v_head_dim = model.head_dim or default, model.v_head_dim or default
    heads = model.num_heads
    return heads * head_dim, heads * (head_dim + v_head_dim), heads * v_head_dim


def products(model: TransformerConfig, tokens: float) -> list[Product]:
    """The products of a step with so many tokens on each side, without those of attention."""
    d, (q, kv, out) = model.d_model, _widths(model)
    encoders, decoders = (PRODUCTS_OF_LAYER * n for n in (model.num_encoder_layers, model.num_decoder_layers))
    projections, feed_forward = "products: projections", "products: feed-forward"
    chunk = min(tokens, losses.default_chunk_size(torch.device("cuda"), model.vocab_size))
    return [
        Product(projections, tokens, d, q + kv, encoders + decoders),
        Product(projections, tokens, out, d, encoders + 2 * decoders),
        Product(projections, tokens, d, q, decoders),  # of the attention to the source,
        Product(projections, tokens, d, kv, decoders),
        Product(feed_forward, tokens, d, model.d_ff, 2 * (encoders + decoders)),
        Product("products: logits", chunk, d, model.vocab_size, PRODUCTS_OF_LAYER * tokens / chunk),
    ]


def traffic(model: TransformerConfig, tokens: float) -> dict[str, float]:
    """Bytes that a step with so many tokens on each side reads and writes outside the products and attention."""
    d, ff, (q, kv, _) = model.d_model, model.d_ff, _widths(model)
    encoders, decoders = model.num_encoder_layers, model.num_decoder_layers
    sublayers = 2 * encoders + 3 * decoders
    per_token = {
        "LayerNorm": sublayers * LAYER_NORM * d,
        "dropout": sublayers * DROPOUT * d,
        "residual sums": sublayers * RESIDUAL_SUM * d + (decoders - 1) * 3 * d,  # the encoder's result is used so often
        "ReLU": (encoders + decoders) * RELU * ff,
        "gradients of biases": (encoders + 2 * decoders) * (q + kv + d) + (encoders + decoders) * (ff + d),
        "joining gradients of q, k, v": JOINED * ((encoders + decoders) * (q + kv) + decoders * kv),
        "embeddings": (2 * EMBEDDED + (SPACE if model.num_target_spaces else 0)) * d,
        "loss": estimate.LOSS_PASSES * model.vocab_size,
    }
    return {
        **{name: 4.0 * elements * tokens for name, elements in per_token.items()},
        "shared matrix": 4.0 * SHARED_MATRIX * model.vocab_size * d,
    }


# ---- memory


def stored_weights_bytes(model: TransformerConfig, source: int, target: int) -> float:
    """The bytes of a sentence pair's attention weights, stored for a batch padded to these lengths."""
    scores = model.num_encoder_layers * source**2 + model.num_decoder_layers * target * (target + source)
    return 4.0 * model.num_heads * scores


def tokens_that_fit(model: TransformerConfig, bytes_per_token: float) -> float:
    """The number of tokens whose activations fit into 16 GB beside weights, gradients and Adam."""
    usable = estimate.USABLE_MEMORY * estimate.GPUS["P100 SXM2"].memory - estimate.OVERHEAD_BYTES
    return (usable - 16.0 * estimate.count_parameters(model)) / bytes_per_token


# ---- sources

SOURCES = (
    (
        "one of eight: 3,125 source and 3,125 target tokens of an update; alone: all 25,000, in as few steps as memory "
        "allows; float32; 37,000 subwords; no padding",
        "Vaswani et al. 2017, sections 5.1 and 5.2; `examples/wmt14/configs.py`",
    ),
    (
        "products run as cuBLAS did: "
        + ", ".join(f"{rate:.2f} TFLOP/s for {' x '.join(map(str, sizes))}" for sizes, rate in SINGLE.items())
        + f" (rows x columns x terms), {min(map(min, MANY_TOKENS.values())):.2f} to "
        + f"{max(map(max, MANY_TOKENS.values())):.2f} for the {2 * len(MANY_TOKENS)} rows of 512 and 1024 outputs and "
        + "24,000 and 48,000 columns, and between these by the logarithm of the number of operations",
        "github.com/baidu-research/DeepBench, results/train/DeepBench_NV_P100.xlsx: CUDA 8, the mean of 400 calls. It "
        "does not say which P100, but its mainboard takes the PCIe card (9.3 TFLOP/s); an SXM2 card (10.6) could be "
        "faster",
    ),
    (
        "the gradient of a weight, few outputs and sums over all tokens, is as fast as other products of as many "
        "operations; biases are added by the products",
        "assumed; no such size is published",
    ),
    (
        "the slower published rates: "
        + ", ".join(f"{rate:.2f} TFLOP/s for {sizes[0]}" for sizes, rate in SQUARES.items())
        + " (square matrices)",
        "github.com/hma02/cublasHgemm-P100; ten calls with the first one, which DeepBench leaves out",
    ),
    (
        "everything else runs at 0.78 of 732 GB/s; each of torch's kernels reads and writes its tensors once, and the "
        "caches keep nothing between two kernels",
        "`docs/p100_report.md`; how often each tensor is read or written is counted in "
        "`benchmarks/p100/training_step.py`",
    ),
    (
        "the loss passes 14 times over the logits, in chunks of 128 MB",
        "`fastattn/nmt/losses.py`, counted in `examples/wmt14/estimate.py`",
    ),
    (
        "Adam moves 28 bytes per parameter, the norm of the gradient 4, adding a gradient to another 12",
        "four tensors read and three written by torch's fused Adam; `examples/wmt14/trainer.py`",
    ),
    (
        "attention: six updates from short to long sentences, each sentence as long as the longest of its update, "
        "about a tenth too long; as many keys as queries; packed, but for the decoder's causal attention; its "
        "weights are not dropped; per token as on one of eight cards",
        "the model of `docs/p100_report.md`; `benchmarks/data/sentence_pairs.csv`; Vaswani et al., section 5.4",
    ),
    (
        "vanilla attention runs at its rate at 82 tokens, whatever the length, without padding",
        "`benchmarks/data/README.md`, a Quadro GP100; shorter sentences are expected to be slower",
    ),
    (
        "4 us between two kernels, 10 us of the host to start one, 80 and 120 kernels in an encoder and a decoder "
        "layer; the host works ahead, so it counts only where it is slower than the card",
        "`docs/p100_report.md` and `examples/wmt14/estimate.py`, where they are assumed",
    ),
    (
        "1.5 GB for the context, libraries and a chunk of logits; 0.9 of 16 GB can be used; activations",
        "`examples/wmt14/estimate.py`; a test compares the activations with what autograd keeps",
    ),
    (
        "free of charge: throttling of the clock, reading data, validation and checkpoints",
        "not modelled",
    ),
)
