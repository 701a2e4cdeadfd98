"""Floating-point operations of an update, and the most per second that a device can do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fastattn import TransformerConfig
from fastattn.peaks import peak_tflops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def training_flops(
    config: TransformerConfig, source_lengths: NDArray[np.integer], target_lengths: NDArray[np.integer]
) -> float:
    """Floating-point operations of forward and backward for some pairs, a multiply-add counted as two.

    Matrix products only, padding and recomputation not counted; the backward is twice the forward.

    Args:
        config: of the model.
        source_lengths, target_lengths: (pairs,) ids of each sentence.
    """
    d, heads = config.d_model, config.num_heads
    head_dim, v_head_dim = config.head_dim or d // heads, config.v_head_dim or d // heads
    query_and_out, key_and_value = d * heads * (head_dim + v_head_dim), d * heads * (head_dim + v_head_dim)
    feed_forward = 2 * d * config.d_ff
    per_score = heads * (head_dim + v_head_dim)
    s, t = source_lengths.astype(np.float64), target_lengths.astype(np.float64)
    encoder = s.sum() * (query_and_out + key_and_value + feed_forward) + (s * s).sum() * per_score
    decoder = t.sum() * (2 * query_and_out + key_and_value + feed_forward) + s.sum() * key_and_value
    decoder += ((t * (t + 1) / 2).sum() + (s * t).sum()) * per_score
    output = t.sum() * d * config.vocab_size
    forward = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder + output
    return float(3 * 2 * forward)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s the device's data sheet promises for "fp32", "fp16" or "bf16" operands; None where it is not known."""
    if device.type != "cuda":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device), DTYPES[precision])
    return None if peak is None else peak * 1e12
