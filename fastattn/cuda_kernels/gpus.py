"""The NVIDIA GPUs of this machine, asked of the driver; the build of the kernels asks where there is no torch."""

from __future__ import annotations

import ctypes

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def capabilities(library: str = "libcuda.so.1") -> tuple[int, ...]:
    """The compute capabilities of the visible GPUs, 75 for 7.5, each once, in order; none if there is no driver."""
    try:
        libcuda = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if libcuda.cuInit(0) != 0 or libcuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    devices = range(count.value)
    return tuple(sorted({10 * _attribute(libcuda, MAJOR, n) + _attribute(libcuda, MINOR, n) for n in devices}))


def _attribute(libcuda: ctypes.CDLL, attribute: int, ordinal: int) -> int:
    value, device = ctypes.c_int(), ctypes.c_int()
    libcuda.cuDeviceGet(ctypes.byref(device), ordinal)
    libcuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
