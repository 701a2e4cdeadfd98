"""Kernels for the executor's own tests, as CUDA C++ or as PTX: those of simt/kernels, what their numbers must be,
and where the report of each planted defect must point."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from fastattn.cuda_kernels import nvrtc
from tests.simt.executor import SimtError, guarded
from tests.simt.ptx.library import compiler

KERNELS = Path(__file__).parent / "kernels"


def why_no_nvrtc() -> str:
    try:
        compiler()
    except nvrtc.NotFound as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(why_no_nvrtc()), reason=why_no_nvrtc() or "-")


def struct(**fields: torch.Tensor | int) -> ctypes.Structure:
    """The argument struct of a kernel: a pointer for each tensor, an int for each number."""
    kinds = [(name, ctypes.c_int if isinstance(value, int) else ctypes.c_void_p) for name, value in fields.items()]
    layout = type("Params", (ctypes.Structure,), {"_fields_": kinds})
    return layout(*(value if isinstance(value, int) else value.data_ptr() for value in fields.values()))


def launch(library, kernel, grid, block, inputs, outputs, *, schedule="in-order", dynamic_smem=0, **sizes):
    """Launches with guarded copies of the inputs; returns the outputs, in guarded memory."""
    inputs = {name: guarded(tensor) for name, tensor in inputs.items()}
    outputs = {name: guarded(tensor) for name, tensor in outputs.items()}
    buffers = [(tensor, name, False) for name, tensor in inputs.items()]
    buffers += [(tensor, name, True) for name, tensor in outputs.items()]
    params = struct(**inputs, **outputs, **sizes)
    library.launch(kernel, grid, block, params, buffers=buffers, schedule=schedule, dynamic_smem=dynamic_smem)
    return tuple(outputs.values())


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


# ---- correct kernels


def run_matmul(library, schedule):
    a, b = torch.randn(37, 53), torch.randn(53, 29)
    sizes = {"rows": 37, "inner": 53, "columns": 29}
    (c,) = launch(
        library, "matmul", (2, 3), (16, 16), {"a": a, "b": b}, {"c": nans(37, 29)}, schedule=schedule, **sizes
    )
    return [(c, a.double() @ b.double())]


def run_row_sum(library, schedule):
    x = torch.randn(5, 4 * 70)
    outputs = {"sums": nans(5), "total": torch.zeros(1, dtype=torch.int32)}
    sums, total = launch(
        library, "row_sum", (5,), (96,), {"x": x}, outputs, schedule=schedule, dynamic_smem=12, columns4=70
    )
    return [(sums, x.double().sum(1)), (total, (x > 0).sum().view(1))]


def run_online_softmax(library, schedule):
    scores, v = 5 * torch.randn(11, 75), torch.randn(75, 32)
    outputs = {"out": nans(11, 32), "lse": nans(11)}
    out, lse = launch(
        *(library, "online_softmax", (3,), (32, 4), {"scores": scores, "v": v}, outputs),
        **{"schedule": schedule, "rows": 11, "keys": 75},
    )
    return [(out, scores.double().softmax(1) @ v.double()), (lse, scores.double().logsumexp(1))]


CORRECT = (run_matmul, run_row_sum, run_online_softmax)


def check_correct(library, run, schedules):
    """Asserts that the kernel's numbers are right, and the same in every schedule; returns them."""
    first = None
    for schedule in schedules:
        torch.manual_seed(0)
        results = run(library, schedule)
        for actual, expected in results:
            torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)
        first = first or results
        assert all(torch.equal(actual, once) for (actual, _), (once, _) in zip(results, first, strict=True))
    return [actual for actual, _ in first]


def check_lanes(library):
    """Shuffles, votes and bit functions of builtins.cu."""
    (out,) = launch(library, "lanes", (1,), (32,), {}, {"out": torch.zeros(18, 32, dtype=torch.int32)})
    votes = sum(1 << t for t in range(0, 32, 3))
    expected = [
        lambda t: 5,
        lambda t: t // 8 * 8 + 1,
        lambda t: t - 3 if t >= 3 else t,
        lambda t: t + 3 if t % 16 < 13 else t,
        lambda t: t ^ 9,
        lambda t: votes,
        lambda t: 1,
        lambda t: 0,
        lambda t: 10,
        lambda t: 0,
        lambda t: 1,
        lambda t: t ^ (1 if t < 16 else 2),
        lambda t: (0x80000000 + t) * 6 >> 32,
        lambda t: t.bit_count(),
        lambda t: 32 - t.bit_length(),
        lambda t: (t & -t).bit_length(),
        lambda t: torch.tensor(float(t)).view(torch.int32).item(),
        lambda t: max(min(t, 20), 10),
    ]
    assert out.tolist() == [[value(t) for t in range(32)] for value in expected]


def check_float_functions(library, rtol=3e-7):
    x = torch.rand(1000) * 8 + 0.01
    (out,) = launch(library, "math", (8,), (128,), {"x": x}, {"out": nans(5, 1000)}, n=1000)
    wide = x.double()
    expected = torch.stack([wide.exp(), wide.exp2(), wide.log(), wide.rsqrt(), 1 / wide])
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=3e-7)


SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.0, 65520.0, 1e-7, 6e-8, 2.9e-8, 1.0 + 2**-11]


def check_rounding(library, dtype):
    torch.manual_seed(0)
    ties = 1 + torch.arange(512) * 2.0**-12  # half-way cases of both types among them
    x = torch.cat([torch.randn(4096) * torch.logspace(-9, 6, 4096), ties, torch.tensor(SPECIAL * 2)])
    y, z = torch.randn(2, len(x))
    narrow = {name: nans(len(x), dtype=dtype) for name in ("rounded", "sum", "product")}
    inputs, kernel = {"x": x, "y": y}, "bfloat16_pairs"
    if dtype == torch.float16:
        inputs, kernel, narrow = inputs | {"z": z}, "half_pairs", narrow | {"fused": nans(len(x), dtype=dtype)}
    outputs = narrow | {"widened": nans(len(x))}
    actual = launch(library, kernel, (len(x) // 64 + 1,), (32,), inputs, outputs, n=len(x))
    actual = dict(zip(outputs, actual, strict=True))
    x16, y16, z16 = (v.to(dtype) for v in (x, y, z))
    expected = {"rounded": x16, "sum": x16 + y16, "product": x16 * y16, "widened": x16.float()}
    if dtype == torch.float16:
        expected["fused"] = (x16.double() * y16.double() + z16.double()).to(torch.float16)
    for name, values in expected.items():
        assert torch.equal(actual[name].isnan(), values.isnan()), name
        assert torch.equal(actual[name].nan_to_num(7.0), values.nan_to_num(7.0)), name


# ---- broken kernels

# defect: (kind, address, text of the source line where it was found, text of the other line of a race or meeting)
DEFECTS = {
    "missing_barrier": ("race", r"shared tile\+\d+", "tile[63 - thread]", "tile[thread] = value"),
    "missing_syncwarp": ("race", r"dynamic shared\+\d+", "exchange[thread ^ 1]", "= sum;"),
    "shuffle_for_syncwarp": ("race", r"dynamic shared\+\d+", "exchange[thread ^ 1]", "= sum;"),
    "divergent_barrier": ("divergent-barrier", "", "// one half here", "// the other half here"),
    "early_return": ("exited-thread", "", "__syncthreads()", None),
    "uninitialised_shared": ("uninitialised", r"shared tile\+28", "tile[63 - thread]", None),
    "global_read": ("out-of-bounds", r"x\+[45]\d\d \(size 400\)", "p.x[i]", None),
    "global_write": ("out-of-bounds", r"y\+[45]\d\d \(size 400\)", "p.y[", None),
    "shared_read": ("out-of-bounds", "", "tile[64 - thread]", None),
    "shared_read_by_pointer": ("out-of-bounds", r"shared tile\+\d+", "last_part[lane]", None),
    "shared_write": ("out-of-bounds", r"dynamic shared\+256 \(size 256\)", "thread + 1", None),
    "race_between_blocks": ("race", r"y\+\d+", "p.y[", "p.y["),
    "plain_against_atomic": ("race", r"counter\+0", "*p.counter += 1", "atomicAdd"),
    "write_to_const": ("write-to-const", r"x\+0", "const_cast", None),
    "misaligned": ("misaligned", r"x\+4", "float4", None),
    "lane_returned": ("missing-lane", "", "__shfl_xor_sync", None),
    "lane_elsewhere": ("deadlock", "", "__shfl_xor_sync", "// the lane that is elsewhere"),
    "lane_not_in_mask": ("missing-lane", "", "__shfl_xor_sync", None),
    "source_not_in_mask": ("missing-lane", "", "__shfl_xor_sync", None),
}


def run_broken(library, schedule):
    outputs = {"y": nans(100), "counter": torch.zeros(1, dtype=torch.int32)}
    inputs = {"x": torch.arange(100.0)}
    return launch(library, "reverse", (2,), (64,), inputs, outputs, schedule=schedule, dynamic_smem=256, n=100)


def check_without_defect(library, schedule):
    y, counter = run_broken(library, schedule)
    x = torch.cat([torch.arange(100.0), torch.zeros(28)]).view(2, 64).flip(1).view(-1, 2).sum(1)
    assert torch.equal(y, (x.view(-1, 2).sum(1).repeat_interleave(4))[:100])
    assert counter.item() == 2


def source_line(site: str) -> str:
    name, line = site.split(":")
    assert name == "broken.cu", site
    return (KERNELS / name).read_text().splitlines()[int(line) - 1]


def check_reports(error: SimtError, defect: str, address: str | None = None) -> None:
    """Asserts that the error holds the defect's report, at its lines, and nothing else."""
    kind, usual_address, *lines = DEFECTS[defect]
    # Without the barrier, some threads read before anybody has written.
    also = {"uninitialised"} if defect in ("missing_barrier", "missing_syncwarp") else set()
    assert kind in error.kinds <= {kind} | also, error
    # Which of two accesses comes first is the schedule's choice.
    wanted = {text for text in lines if text is not None}
    for report in error.reports:
        if report.kind == kind:
            found = [source_line(site) for site in report.sites]
            assert re.fullmatch(usual_address if address is None else address, report.address), report
            assert all(any(text in line for line in found) for text in wanted), report
            assert len(found) == len([text for text in lines if text is not None]), report
