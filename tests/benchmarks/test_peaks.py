"""A GPU is found by its name, the more special name first."""

from __future__ import annotations

import pytest
import torch

from fastattn.peaks import peak_tflops


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("Tesla P100-PCIE-16GB", torch.float32, 9.3),
        ("Tesla P100-SXM2-16GB", torch.float32, 10.6),
        ("Tesla P100-SXM2-16GB", torch.float16, 10.6),
        ("Tesla P100-PCIE-16GB", torch.float16, 9.3),
        ("Tesla P100-SXM2-16GB", torch.bfloat16, 10.6),
        ("Tesla V100-PCIE-32GB", torch.float16, 112.0),
        ("Tesla T4", torch.float16, 65.0),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312.0),
        ("NVIDIA H100 PCIe", torch.float16, 756.0),
        ("NVIDIA H200", torch.float32, 66.9),
        ("NVIDIA H200", torch.float64, None),
        ("CPU x86_64", torch.float32, None),
    ],
)
def test_peak(name, dtype, peak):
    assert peak_tflops(name, dtype) == peak
