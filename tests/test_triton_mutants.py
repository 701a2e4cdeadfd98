"""The tests of the Triton kernels must turn red for every one of these sabotaged kernels."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from cases import Case
from fastattn import triton_kernels
from triton_attention import DEVICE, check_once, on_triton

pytestmark = [pytest.mark.triton] if DEVICE == "cpu" else [pytest.mark.triton, pytest.mark.gpu]
KERNELS = Path(triton_kernels.__file__).parent
TILE = (16, 16)

PLAIN = Case(seqlens=(18, 37), dims=(24, 32), heads=(1, 1), batch=1)
MASKED = replace(PLAIN, mask="random", batch=2)
EMPTY_ROWS = replace(PLAIN, mask="empty-rows")
BIASED = replace(PLAIN, bias="full", heads=(2, 2))
PER_HEAD = replace(PLAIN, bias="per-head")
PER_KEY = replace(PLAIN, bias="per-key")
GROUPED = replace(PLAIN, heads=(4, 2))
PACKED = replace(PLAIN, packed=True, batch=2)
DROPPED = replace(PLAIN, dropout_p=0.3, heads=(2, 2))
WINDOW = replace(PLAIN, band="window-bottom-right", seqlens=(37, 41))
LEFT = replace(PLAIN, band="window", seqlens=(41, 37))


@dataclass(frozen=True)
class Mutant:
    """A text of the sources replaced by another, everywhere in the file, and the case that must notice."""

    file: str
    old: str
    new: str
    case: Case = PLAIN


MUTANTS = {
    "scale ignored": Mutant("scores.py", "qk * scale_log2", "qk * LOG2_E"),
    "scale of dq ignored": Mutant("attention.py", "dq * scale,", "dq,"),
    "scale of dk ignored": Mutant("attention.py", "dk * scale,", "dk,"),
    "mask inverted": Mutant("scores.py", "tl.load(mask_ptrs, inside, 0)", "tl.load(mask_ptrs, inside, 0) == 0", MASKED),
    "mask of the first row for all": Mutant("scores.py", "rows_64 * stride_maskm + ", "", MASKED),
    "mask of the first batch for all": Mutant("scores.py", "b * stride_maskb + ", "", MASKED),
    "bias of the first head for all": Mutant("scores.py", " + h * stride_biash", "", BIASED),
    "bias in the wrong base": Mutant("scores.py", ".to(tl.float32) * LOG2_E", ".to(tl.float32)", BIASED),
    "keys past the end attended": Mutant(
        "scores.py", "return tl.where(keys < seqlen_k, scores, -INF)", "return scores"
    ),
    "causal off by one": Mutant("scores.py", "keys - rows <= shift + right", "keys - rows < shift + right", WINDOW),
    "window off by one": Mutant("scores.py", "keys - rows >= shift - left", "keys - rows > shift - left", LEFT),
    "bottom-right ignored": Mutant("attention.py", "seqlen_k - seqlen_q if BOTTOM_RIGHT else 0", "0", WINDOW),
    "one key tile too few": Mutant(
        "scores.py", "seqlen_q) + shift + right,", "seqlen_q) + shift + right - 16,", WINDOW
    ),
    "one query tile too few": Mutant("scores.py", "seqlen_k) - shift + left,", "seqlen_k) - shift + left - 16,", LEFT),
    "a key tile too late": Mutant("scores.py", "i0 + shift - left, 0)", "i0 + shift - left + 16, 0)", LEFT),
    "a query tile too late": Mutant("scores.py", "j0 - shift - right, 0)", "j0 - shift - right + 16, 0)", WINDOW),
    "sum of weights not rescaled": Mutant("attention.py", "row_sum * rescale +", "row_sum +"),
    "out not rescaled": Mutant("attention.py", "out * rescale[:, None]", "out"),
    "a row without keys is NaN": Mutant(
        "attention.py", "tl.where(new_max == -INF, 0.0, new_max)", "new_max", EMPTY_ROWS
    ),
    "a row without keys in the backward": Mutant("scores.py", "tl.where(lse == -INF, INF, lse)", "lse", EMPTY_ROWS),
    "lse in base 2": Mutant("attention.py", "tl.log2(row_sum)) * LN_2", "tl.log2(row_sum))"),
    "dropout not rescaled": Mutant("attention.py", "dropout_rescale / row_sum", "1.0 / row_sum", DROPPED),
    "dropout not rescaled in dv": Mutant("attention.py", "dv * dropout_rescale", "dv", DROPPED),
    "dropout not rescaled in dP": Mutant("scores.py", "dp * dropout_rescale", "dp", DROPPED),
    "dropout missing in dv": Mutant("scores.py", "kept_weights = tl.where(keeps, weights, 0.0)", "pass", DROPPED),
    "dropout missing in dP": Mutant("scores.py", "dp = tl.where(keeps, dp * dropout_rescale, 0.0)", "pass", DROPPED),
    "dropout bits of the first head": Mutant("scores.py", "rows[:, None], h, b)", "rows[:, None], h * 0, b)", DROPPED),
    "dropout words in another order": Mutant("scores.py", "(word_0, word_2)", "(word_2, word_0)", DROPPED),
    "dropout words in another order in dK": Mutant("scores.py", "word_1[:, None, :]", "word_2[:, None, :]", DROPPED),
    "delta ignored": Mutant("scores.py", "weights * (dp - delta)", "weights * dp"),
    "gradient of lse ignored": Mutant("attention.py", "delta -= tl.load", "tl.load"),
    "dk of the first head of a group": Mutant("attention.py", "(h_k + 1) * group)", "h_k * group + 1)", GROUPED),
    "keys of another head": Mutant("attention.py", "h_k = h // group", "h_k = h * 0", GROUPED),
    "tokens of no sequence not cleared": Mutant(
        "scores.py", "row in range(seqlen + tile", "row in range(end + tile", PACKED
    ),
    "the neighbour's tokens": Mutant(
        "scores.py", "first = token(cu_seqlens_ptr, b,", "first = 1 + token(cu_seqlens_ptr, b,", PACKED
    ),
    "the first copy of the bias gradient lost": Mutant("attention.py", "partial.sum(0)", "partial[1:].sum(0)", PER_KEY),
    "bias gradient of one tile for all": Mutant("attention.py", "own_j0 + n % sum_keys * BLOCK_N", "own_j0", PER_HEAD),
    "bias gradient not summed over keys": Mutant("attention.py", "if KEYS_BROADCAST:", "if False:", PER_HEAD),
    "bias gradient not summed over rows": Mutant("attention.py", "if ROWS_BROADCAST:", "if False:", PER_KEY),
}  # fmt: skip


@contextmanager
def sabotaged(mutant: Mutant, folder: Path) -> Iterator[str]:
    """A copy of the kernels with the mutation, as a package of fastattn; its name as seen from there."""
    name = f"mutant_{folder.parent.name}_{folder.name}"
    copy = folder / name
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / mutant.file
    text = file.read_text()
    assert mutant.old in text, f"{mutant.file} has no {mutant.old!r} any more"
    file.write_text(text.replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(f"fastattn.{name}", copy / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        yield f".{name}"
    finally:
        for module in [m for m in sys.modules if m == spec.name or m.startswith(f"{spec.name}.")]:
            del sys.modules[module]


@pytest.mark.parametrize("name", MUTANTS)
def test_sabotaged_kernels_are_caught(name: str, tmp_path: Path, poisoned: None) -> None:
    mutant = MUTANTS[name]
    with sabotaged(mutant, tmp_path) as kernels, on_triton(*TILE, kernels=kernels), pytest.raises(AssertionError):
        check_once(mutant.case)


@pytest.mark.parametrize("case", dict.fromkeys(m.case for m in MUTANTS.values()), ids=str)
def test_sound_kernels_pass(case: Case, poisoned: None) -> None:
    with on_triton(*TILE):
        check_once(case)
