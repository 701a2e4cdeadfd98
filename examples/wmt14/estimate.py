"""Predictions for a training run before it is started: parameters, memory, arithmetic, and hours on any GPU.

The hours are predictions. An update's time on a GPU is the time of its matrix products plus that of the memory traffic
between them and of Adam, or the time in which the host starts the kernels, whichever is longer; then the part of the
gradients' ring all-reduce that nothing hides. The shares of peak speed are chosen such that the prediction for the big
model meets what NVIDIA published of its own training of one: 8,742 target tokens/s on a V100 in fp32, and 32,942 and
82,059 on a V100 and an A100 with half-precision tensor cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fastattn import Transformer, TransformerConfig
from fastattn.peaks import peak_tflops

from .configs import Config
from .throughput import DTYPES, training_flops

SOURCE_LENGTH, TARGET_LENGTH = 28, 31  # mean ids of a sentence of WMT14
MATRIX_SHARE = {False: 0.75, True: 0.45}  # share of peak FLOP/s that matrix products reach, without, with tensor cores
BANDWIDTH_SHARE = 0.8  # share of the data sheet's bandwidth that memory and links reach
LAUNCH_SECONDS = 10e-6  # host time to launch a kernel
ENCODER_KERNELS, DECODER_KERNELS = 80, 120  # kernels launched per layer, forward and backward
LOSS_PASSES = 14  # float32 reads and writes of every logit
USABLE_MEMORY = 0.9  # share of a GPU's memory that a run may fill
OVERHEAD_BYTES = 1.5e9  # memory of the CUDA context, libraries and one chunk of logits
NETWORK_BYTES = 12.5e9  # bytes per second of a machine's network, 100 Gbit/s


@dataclass(frozen=True)
class DataSheet:
    """A GPU by its data sheet; its peak FLOP/s are in `fastattn.peaks`.

    Args:
        peaks: its name there.
        memory: bytes.
        bandwidth: bytes per second, of its memory.
        link: bytes per second that it sends to its neighbour, by NVLink or PCIe.
        has_tensor_cores: half-precision products run on them.
        has_bf16: so do products of bf16.
        sustained: share of the peak clock that its power allows.
    """

    peaks: str
    memory: float
    bandwidth: float
    link: float
    has_tensor_cores: bool = True
    has_bf16: bool = True
    sustained: float = 1.0


GPUS = {
    "P100 PCIe": DataSheet("P100-PCIE", 16e9, 732e9, 15.75e9, has_tensor_cores=False, has_bf16=False),
    "P100 SXM2": DataSheet("P100", 16e9, 732e9, 80e9, has_tensor_cores=False, has_bf16=False),
    "V100": DataSheet("V100", 16e9, 900e9, 150e9, has_bf16=False),
    "T4": DataSheet("T4", 16e9, 320e9, 15.75e9, has_bf16=False, sustained=0.55),
    "A100": DataSheet("A100", 40e9, 1555e9, 300e9),
    "H100": DataSheet("H100", 80e9, 3350e9, 450e9),
    "H200": DataSheet("H200", 141e9, 4800e9, 450e9),
}

# The paper's hours on 8 P100 by rows of its Table 2 (section 5.2), and the FLOP/s it credits a P100 with (footnote 5).
PAPER_HOURS = {"base_en_de": 12.0, "base_en_fr": 12.0, "big_en_de": 84.0, "big_en_fr": 84.0}
PAPER_GPUS, PAPER_FLOPS = 8, 9.5e12


@dataclass(frozen=True)
class Estimate:
    """A predicted training run; times in seconds, sizes in bytes."""

    parameters: int
    flops_per_update: float  # of all GPUs together
    tokens_per_gpu: float  # target tokens of an update
    accumulation: int  # steps into which an update is divided to fit into memory
    memory: float  # per GPU
    products: float  # time of the matrix products
    traffic: float  # time of the memory traffic between them
    host: float  # time to launch the kernels, while the GPU computes
    all_reduce: float  # time to all-reduce the gradients
    exposed: float  # the part of it that the backward pass does not hide
    updates: int
    peak: float  # FLOP/s of a GPU

    @property
    def update_seconds(self) -> float:
        return max(self.products + self.traffic, self.host) + self.exposed

    @property
    def hours(self) -> float:
        return self.update_seconds * self.updates / 3600

    @property
    def tokens_per_second(self) -> float:
        """Target tokens per second and GPU."""
        return self.tokens_per_gpu / self.update_seconds

    def share_of_peak(self, n_gpus: int) -> float:
        return self.flops_per_update / n_gpus / self.update_seconds / self.peak


@lru_cache
def count_parameters(model: TransformerConfig) -> int:
    """The number of parameters of the model itself, built on the meta device, without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(model).parameters())


def activation_bytes(model: TransformerConfig, precision: str) -> float:
    """Bytes of activations kept for the backward pass, per target token and its share of the source."""
    d, heads = model.d_model, model.num_heads
    head_dims = (model.head_dim or d // heads) + (model.v_head_dim or d // heads)
    attended = heads * head_dims  # q and v, or k and out
    # Attention keeps q, k, v and out, its input and the residual sum, and a byte per element for the dropout.
    attention, feed_forward = 2 * attended + 2.25 * d, model.d_ff + 2.25 * d
    encoder = model.num_encoder_layers * (attention + feed_forward)
    decoder = model.num_decoder_layers * (2 * attention + feed_forward)
    return (encoder * SOURCE_LENGTH / TARGET_LENGTH + decoder) * (4 if precision == "fp32" else 2.5)


def _check(gpu: str, n_gpus: int, machines: int, precision: str) -> None:
    if gpu not in GPUS:
        raise ValueError(f"gpu: must be one of {', '.join(GPUS)}, got {gpu!r}")
    if precision not in ("fp32", "fp16", "bf16"):
        raise ValueError(f"precision: must be 'fp32', 'fp16' or 'bf16', got {precision!r}")
    if min(n_gpus, machines) < 1 or n_gpus % machines:
        raise ValueError(f"n_gpus: must be a positive multiple of machines {machines}, got {n_gpus}")


def estimate(
    config: Config, gpu: str, n_gpus: int, machines: int, precision: str, vocab_size: int = 37_000
) -> Estimate:
    """The predicted training run.

    Args:
        config: the recipe.
        gpu: a name of `GPUS`.
        n_gpus: in all.
        machines: over which they are spread evenly.
        precision: "fp32", "fp16" or "bf16".
        vocab_size: of the data.

    Raises:
        ValueError: a GPU or precision that is not known, or GPUs that cannot be spread evenly.
    """
    _check(gpu, n_gpus, machines, precision)
    model, card = config.model(vocab_size), GPUS[gpu]
    parameters, tokens = count_parameters(model), config.tokens_per_update / n_gpus
    tflops = peak_tflops(card.peaks, DTYPES[precision])
    assert tflops is not None  # known of every card in GPUS
    peak = tflops * 1e12 * card.sustained
    on_tensor_cores = card.has_tensor_cores and (precision == "fp16" or (precision == "bf16" and card.has_bf16))
    pairs = config.tokens_per_update / TARGET_LENGTH
    flops = pairs * training_flops(model, np.array([SOURCE_LENGTH]), np.array([TARGET_LENGTH]))

    states = 16.0 * parameters  # weights, gradients, and Adam's two means, in float32
    free = USABLE_MEMORY * card.memory - OVERHEAD_BYTES - states
    kept = tokens * activation_bytes(model, precision)
    accumulation = math.ceil(kept / free) if free > 0 else 0
    if not accumulation:
        raise ValueError(f"gpu: {gpu} has not the memory for {parameters:,} parameters and Adam")

    bandwidth = card.bandwidth * BANDWIDTH_SHARE
    # Kept activations are written and read twice; those that are not kept make about as much traffic again.
    traffic = 4 * kept + tokens * vocab_size * 4 * LOSS_PASSES + 28 * parameters + 8 * parameters * accumulation
    products = flops / n_gpus / (peak * MATRIX_SHARE[on_tensor_cores])
    kernels = ENCODER_KERNELS * model.num_encoder_layers + DECODER_KERNELS * model.num_decoder_layers
    computing = products + traffic / bandwidth
    embedding = vocab_size * model.d_model
    link = BANDWIDTH_SHARE * (card.link if machines == 1 else min(card.link, NETWORK_BYTES))
    ring = 2 * (n_gpus - 1) / n_gpus * 4 / link  # seconds per parameter
    # The backward pass, two thirds of the time, hides the others, but completes the shared embedding's gradient last.
    exposed = ring * embedding + max(0.0, ring * (parameters - embedding) - computing / accumulation * 2 / 3)
    return Estimate(
        parameters, flops, tokens, accumulation, OVERHEAD_BYTES + states + kept / accumulation, products,
        traffic / bandwidth, kernels * accumulation * LAUNCH_SECONDS, ring * parameters, exposed, config.updates, peak,
    )  # fmt: skip


def print_estimate(config: Config, vocab_size: int) -> None:
    """A table over GPUs, their number and precision, with what it assumes."""
    model = config.model(vocab_size)
    first = estimate(config, "H200", 1, 1, "fp32", vocab_size)
    total = first.flops_per_update * config.updates
    print(
        f"{config.name}: {first.parameters:,} parameters, {vocab_size:,} subwords\n"
        f"{config.updates:,} updates of {config.tokens_per_update:,} source and target tokens: "
        f"{first.flops_per_update:.2e} FLOPs each, {total:.2e} in all\n"
        f"memory: {16 * first.parameters / 1e9:.2f} GB of weights, gradients and Adam, "
        f"{activation_bytes(model, 'fp32') / 1e3:.0f} kB of activations per target token in fp32\n"
    )
    print(f"PREDICTED{'':20}tokens/s  share of  accumu-   memory        hours with n GPUs")
    print(f"GPU        precision    {'per GPU':>13}     peak   lation   per GPU{'1':>9}{'8':>9}{'2 x 8':>9}")
    for name, card in GPUS.items():
        for precision in ("fp32", "bf16" if card.has_bf16 else "fp16"):
            runs = [estimate(config, name, *where, precision, vocab_size) for where in ((1, 1), (8, 1), (16, 2))]
            alone = runs[0]
            hours = "".join(f"{run.hours:9.3g}" for run in runs)
            print(
                f"{name:10} {precision:9} {alone.tokens_per_second:16,.0f} {alone.share_of_peak(1):8.0%} "
                f"{alone.accumulation:8} {alone.memory / 1e9:6.1f} GB{hours}"
            )
    if config.name in PAPER_HOURS:
        paper_hours = PAPER_HOURS[config.name]
        nominal, reached = paper_hours * 3600 * PAPER_GPUS * PAPER_FLOPS, total / (paper_hours * 3600 * PAPER_GPUS)
        print(
            f"\nThe paper: {paper_hours:g} hours on {PAPER_GPUS} P100, counted as {nominal:.1e} FLOPs at "
            f"{PAPER_FLOPS / 1e12:g} TFLOP/s each; the model's\nown are {total:.1e}, {reached / 1e12:.1f} TFLOP/s each."
        )
    print(
        f"\nAssumed: pairs of {SOURCE_LENGTH} and {TARGET_LENGTH} tokens, packed; matrix products at "
        f"{MATRIX_SHARE[False]:.0%} of peak, {MATRIX_SHARE[True]:.0%} on tensor cores;\n"
        f"{BANDWIDTH_SHARE:.0%} of the data sheet's bandwidth; {LAUNCH_SECONDS * 1e6:g} us of host time per kernel; "
        f"a ring all-reduce of float32 gradients,\nbehind the backward pass but for the embedding's; "
        f"{NETWORK_BYTES * 8e-9:g} Gbit/s between machines; no validation or checkpoints.\n"
        "Nothing in this table was measured."
    )
