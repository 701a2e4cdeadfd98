"""The PTX that NVRTC emits, on the CPU executor: the numbers of the source, and its defects at their source lines."""

from __future__ import annotations

import pytest
import torch

from fastattn.cuda_kernels import nvrtc
from tests.simt import selftest
from tests.simt.executor import SCHEDULES, SimtError, load
from tests.simt.ptx import load_ptx
from tests.simt.selftest import DEFECTS, KERNELS, needs_nvrtc

ARCHITECTURES = pytest.mark.parametrize("arch", ["compute_60", "compute_80"])
BUILDS = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])


# ---- kernels of the executor's own tests


@needs_nvrtc
@ARCHITECTURES
@BUILDS
@pytest.mark.parametrize("run", selftest.CORRECT)
def test_numbers_of_the_source(run, checked, arch):
    from_ptx = selftest.check_correct(load_ptx(KERNELS / "correct.cu", arch=arch, checked=checked), run, SCHEDULES)
    from_source = selftest.check_correct(load(KERNELS / "correct.cu", checked=checked), run, SCHEDULES[:1])
    for actual, expected in zip(from_ptx, from_source, strict=True):
        if run is selftest.run_online_softmax:  # NVRTC makes exp a product and ex2, and fuses what g++ does not
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(actual, expected)


@needs_nvrtc
@ARCHITECTURES
def test_shuffles_votes_and_bits(arch):
    selftest.check_lanes(load_ptx(KERNELS / "builtins.cu", arch=arch, checked=True))


@needs_nvrtc
def test_float_functions():
    selftest.check_float_functions(load_ptx(KERNELS / "builtins.cu"), rtol=1e-6)


@needs_nvrtc
@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types_round_like_torch(dtype, arch):
    selftest.check_rounding(load_ptx(KERNELS / "builtins.cu", arch=arch), dtype)


def broken(defect: str, checked: bool = True):
    return load_ptx(KERNELS / "broken.cu", checked=checked, defines=(f"DEFECT={defect}",))


@needs_nvrtc
@BUILDS
def test_kernel_without_defect(checked):
    for schedule in SCHEDULES:
        selftest.check_without_defect(broken("none", checked), schedule)


@needs_nvrtc
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_reported_at_its_source_line(defect):
    # In PTX there is no index to check, but the gap behind the array is seen.
    address = r"shared tile\+256" if defect == "shared_read" else None
    for schedule in SCHEDULES:
        with pytest.raises(SimtError) as caught:
            selftest.run_broken(broken(defect), schedule)
        selftest.check_reports(caught.value, defect, address)


@needs_nvrtc
def test_kernels_are_listed():
    assert load_ptx(KERNELS / "correct.cu").kernels == ("matmul", "row_sum", "online_softmax")


@needs_nvrtc
def test_compile_errors_say_what_is_wrong(tmp_path):
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void kernel() { undeclared(); }\n')
    with pytest.raises(nvrtc.CompileError, match=r'wrong\.cu\(1\): error: identifier "undeclared" is undefined'):
        load_ptx(tmp_path / "wrong.cu")
