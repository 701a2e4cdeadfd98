"""Peak arithmetic throughput of GPUs, from NVIDIA's data sheets."""

from __future__ import annotations

import torch

# TFLOP/s of dense matrix products with float32 (without TF32), float16 and bfloat16 operands; bfloat16 without tensor
# cores for it is computed in float32. So is float16 on the P100: its 21.2 TFLOP/s are those of sums in float16, which
# torch does not ask cuBLAS for below compute capability 7.0, whatever allow_fp16_accumulation says (CUDABlas.cpp). The
# first name that is part of a device's name counts.
PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    "P100-PCIE": (9.3, 9.3, 9.3),
    "P100": (10.6, 10.6, 10.6),
    "V100-PCIE": (14.0, 112.0, 14.0),
    "V100": (15.7, 125.0, 15.7),
    "T4": (8.1, 65.0, 8.1),
    "A100": (19.5, 312.0, 312.0),
    "H100 PCIe": (51.0, 756.0, 756.0),
    "H100": (66.9, 989.4, 989.4),
    "H200": (66.9, 989.4, 989.4),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def peak_tflops(name: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s that matrix products of a GPU cannot exceed.

    Args:
        name: of the GPU, as `torch.cuda.get_device_name` gives it, or a part of it.
        dtype: of the operands: float32, float16 or bfloat16.

    Returns:
        None where it is not known.
    """
    if dtype not in _DTYPES:
        return None
    for known, peaks in PEAK_TFLOPS.items():
        if known in name:
            return peaks[_DTYPES.index(dtype)]
    return None
