"""The calibration of the cycle model: its table, the band that comes of it, and public kernels replayed again."""

from __future__ import annotations

import math
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import published
from benchmarks.p100 import chip
from benchmarks.p100.machine import nvdisasm, wheels
from benchmarks.p100.page import Band

pytest.importorskip("fastattn.cuda_kernels.attention", reason="the native part is not built", exc_type=ImportError)

from benchmarks.p100 import calibration, public_kernels
from benchmarks.p100.calibration import Calibrated
from benchmarks.p100.passes import Pass

TABLE = calibration.read(calibration.PAGE.with_suffix(".csv"))


def ratios(direction: str, dtype: torch.dtype, only_kept_out: bool = False) -> list[float]:
    """Predicted / published of a group, the backward's of whole tiles."""
    rows = [row for row in TABLE if (row.pass_.direction, row.pass_.dtype) == (direction, dtype)]
    return [
        row.ratio for row in rows if (row.is_even or direction == "forward") and not (only_kept_out and row.is_fitted)
    ]


# ---- the committed table and page


def test_every_published_row_is_calibrated() -> None:
    wanted = [(pass_, pytest.approx(us, abs=0.06), is_fitted) for pass_, us, is_fitted in calibration.passes()]
    assert [(row.pass_, row.published_us, row.is_fitted) for row in TABLE] == wanted
    assert {True, False} == {row.is_fitted for row in TABLE}
    assert all(0 < row.error < public_kernels.TOLERANCE[row.pass_.dtype] for row in TABLE)


@pytest.mark.parametrize("only_kept_out", [False, True], ids=["all rows", "kept out"])
@pytest.mark.parametrize(
    ("direction", "dtype", "off", "spread"),
    [
        ("forward", torch.float32, 0.04, 0.05),
        ("forward", torch.float16, 0.04, 0.05),
        ("backward", torch.float32, 0.10, 0.10),
        ("backward", torch.float16, 0.10, 0.10),
    ],
)
def test_the_model_is_as_near_as_it_should_be(
    direction: str, dtype: torch.dtype, off: float, spread: float, only_kept_out: bool
) -> None:
    found = ratios(direction, dtype, only_kept_out)
    assert len(found) >= 4
    assert abs(math.log(calibration.geometric_mean(found))) <= off
    assert calibration.spread(found) <= spread


def test_the_page_is_that_of_its_table() -> None:
    assert calibration.PAGE.read_text() == calibration.text(TABLE)


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    calibration.write(TABLE, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == calibration.PAGE.with_suffix(".csv").read_text()


def test_statistics() -> None:
    assert calibration.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert calibration.spread([0.5, 2.0]) == pytest.approx(math.log(2))
    assert calibration.spread([0.7] * 3) == pytest.approx(0.0)


def test_expected_share_of_a_prediction() -> None:
    of_float32 = [row for row in TABLE if (row.pass_.direction, row.pass_.dtype) == ("forward", torch.float32)]
    forward = [row.ratio for row in of_float32 if row.pass_.head_dim >= 64]
    assert min(forward) > 0.9 and max(forward) < 1.05
    on_quadro, on_sxm2 = (calibration.expected("forward", card) for card in (chip.QUADRO, chip.SXM2))
    assert (on_quadro.low, on_quadro.high) == (min(forward), max(forward))
    assert on_quadro.centre == pytest.approx(calibration.geometric_mean(forward))
    assert on_sxm2.high == on_quadro.high
    assert on_sxm2.low == pytest.approx(on_quadro.low * 1.443 / 1.5)
    assert on_sxm2.centre == pytest.approx(on_quadro.centre * math.sqrt(1.443 / 1.5))
    backward = ratios("backward", torch.float32) + ratios("backward", torch.float16)
    expected = calibration.expected("backward", chip.QUADRO)
    assert (expected.low, expected.high) == (min(backward), max(backward))


def test_delta_is_computed_beforehand_in_float32_only() -> None:
    card = chip.Card("card", 1e9, 1e6, dram_share=0.5)
    single = Pass("backward", 1, 2, 3, 4)
    assert calibration.delta_us(single, card) == pytest.approx(4 * 4 * 24 / 0.5 + 12)
    assert calibration.delta_us(single._replace(dtype=torch.float16), card) == 0
    assert calibration.delta_us(single._replace(direction="forward"), card) == 0


# ---- the published times


def test_the_second_reading_of_vanilla() -> None:
    assert published.vanilla_on_the_card_ms("backward", (16, 16, 128, 64), torch.float32) == pytest.approx(1.590 / 4)
    assert published.vanilla_on_the_card_ms("backward", (64, 16, 128, 64), torch.float32) is None
    assert published.vanilla_on_the_card_ms("forward", (16, 16, 128, 64), torch.float32) is None


# ---- the public kernels


@pytest.mark.parametrize(
    ("pass_", "name", "block_m"),
    [
        (Pass("forward", 1, 1, 9, 64), "KernelIfN7cutlass4arch4Sm50ELb1ELi64ELi64ELb1E", 64),
        (Pass("forward", 1, 1, 9, 65, torch.float16), "half_tENS1_4arch4Sm50ELb1ELi32ELi128ELb1E", 32),
        (Pass("backward", 1, 1, 9, 40), "BackwardKernelIN7cutlass4arch4Sm50EfLb1ELi64E", 64),
        (Pass("backward", 1, 1, 9, 128, torch.float16), "Sm50ENS1_6half_tELb1ELi128E", 64),
    ],
)
def test_kernel_that_xformers_takes(pass_: Pass, name: str, block_m: int) -> None:
    kernel = public_kernels.kernel_of(pass_)
    assert name in kernel.name and kernel.block_m == block_m
    with pytest.raises(ValueError, match="head_dim: must be at most 128, got 129"):
        public_kernels.kernel_of(pass_._replace(head_dim=129))


def test_a_wheel_with_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "xformers-0.0.16-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("xformers/_C.so", "other code")
        file.writestr("xformers-0.0.16.dist-info/METADATA", "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.16\n")
        file.writestr("xformers-0.0.16.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    program = tmp_path / "cuobjdump"
    program.touch()
    monkeypatch.setenv("FASTATTN_NVDISASM", str(tmp_path / "nvdisasm"))
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(public_kernels, "WHEEL", str(wheel))
    with pytest.raises(wheels.NotFound, match="(?i)hash"):
        public_kernels.folder()
    assert [*(tmp_path / "cache").iterdir()] == []


def test_without_the_wheel_the_table_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise wheels.NotFound("no network")

    before = calibration.PAGE.read_text()
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(wheels, "download", refuse)
    monkeypatch.setattr(nvdisasm, "cuobjdump", lambda: tmp_path / "cuobjdump")
    assert calibration.main([]) == 0
    assert "the committed table stays: no network" in capsys.readouterr().out
    assert calibration.PAGE.read_text() == before


REPLAYED = [
    Pass("forward", 8192, 1, 82, 64),
    Pass("forward", 256, 1, 128, 16, torch.float16),
    Pass("backward", 16, 16, 128, 16),
    Pass("backward", 16, 16, 128, 32, torch.float16),
]


@pytest.mark.slow
@pytest.mark.parametrize("pass_", REPLAYED, ids=str)
def test_public_kernels_are_replayed_as_the_table_says(pass_: Pass) -> None:
    try:
        public_kernels.folder()
        nvdisasm.path()
    except (nvdisasm.NotFound, subprocess.CalledProcessError) as error:
        pytest.skip(f"the public kernels cannot be had here: {error}")
    (row,) = calibration.calibrate([known for known in calibration.passes() if known[0] == pass_])
    (noted,) = (row for row in TABLE if row.pass_ == pass_)
    assert isinstance(row, Calibrated)
    assert row.predicted_us == pytest.approx(noted.predicted_us, rel=2e-3), "if this is meant: make kernel-report"
    assert (row.touched_kb, row.error) == pytest.approx((noted.touched_kb, noted.error), rel=0.1)
    assert 0.85 < row.ratio < 1.15


# ---- bands


def test_bands() -> None:
    band = Band(0.8, 0.9, 1.0)
    assert band.times(10) == (8, 9, 10)
    assert band.under(9) == pytest.approx((9, 10, 11.25))  # the least share takes the longest time
    assert band.plus(Band(1, 2, 3)) == pytest.approx((1.8, 2.9, 4.0))
    assert band.shown() == "**0.90** (0.80 - 1.00)" and Band(8, 9, 10).shown(0) == "**9** (8 - 10)"
