"""The arithmetic of an update against a count by hand, and the peaks of known devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.wmt14.throughput import peak_flops, training_flops
from fastattn import TransformerConfig


def test_flops_counted_by_hand():
    config = TransformerConfig(
        vocab_size=7, d_model=4, d_ff=5, num_heads=2, head_dim=3, v_head_dim=1, num_encoder_layers=1,
        num_decoder_layers=2,
    )  # fmt: skip
    # Sentences of 3 and 2 ids; multiply-adds of a layer: projections, scores and values, feed-forward.
    encoder = 3 * (4 * 6 + 4 * 6 + 4 * 2 + 2 * 4) + 3 * 3 * (6 + 2) + 3 * (4 * 5 + 5 * 4)
    own = 2 * (4 * 6 + 4 * 6 + 4 * 2 + 2 * 4) + (1 + 2) * (6 + 2)
    cross = 2 * (4 * 6 + 2 * 4) + 3 * (4 * 6 + 4 * 2) + 2 * 3 * (6 + 2)
    decoder = own + cross + 2 * (4 * 5 + 5 * 4)
    expected = 3 * 2 * (encoder + 2 * decoder + 2 * 4 * 7)
    assert training_flops(config, np.array([3]), np.array([2])) == expected
    assert training_flops(config, np.array([3, 3]), np.array([2, 2])) == 2 * expected


def test_peak_of_known_devices(monkeypatch):
    assert peak_flops(torch.device("cpu"), "fp32") is None
    names = {"Tesla P100-PCIE-16GB": 9.3, "Tesla P100-SXM2-16GB": 10.6, "NVIDIA H200": 66.9, "Some GPU": None}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = peak_flops(torch.device("cuda"), "fp32")
        assert peak == (expected and pytest.approx(expected * 1e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(torch.device("cuda"), "bf16") == pytest.approx(312e12)
