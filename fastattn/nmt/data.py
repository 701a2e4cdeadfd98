"""Sentence pairs as token files: written in one pass, read through memory maps.

A folder holds, for every split and side, `{split}.{side}.tokens.npy`, the ids of all sentences end to end, and
`{split}.{side}.offsets.npy`, int64, where each sentence starts, and the end of the last. The ids are uint16 where the
vocabulary allows it, else int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from .layout import PackedTokens

_HEADER_BYTES = 128
_SIDES = ("source", "target")


def _files(folder: str | PathLike[str], split: str, side: str) -> tuple[Path, Path]:
    folder = Path(folder)
    return folder / f"{split}.{side}.tokens.npy", folder / f"{split}.{side}.offsets.npy"


# ---- writing ----


class _GrowingArray:
    """A one-dimensional .npy file that is appended to; `close` writes the header, without which it cannot be read."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += values.size

    def close(self, is_complete: bool = True) -> None:
        if is_complete:
            header = BytesIO()
            description = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
            np.lib.format.write_array_header_1_0(header, description)
            assert len(header.getvalue()) == _HEADER_BYTES, "numpy leaves room for any length in its headers"
            self._file.seek(0)
            self._file.write(header.getvalue())
        self._file.close()


class TokenWriter:
    """A context manager that streams the sentences of one side of a split into its files, in constant memory.

    The files can be read once the `with` block has ended without an exception.

    Args:
        folder: where the files go; must exist.
        split: "train", "valid", "test" ...
        side: "source" or "target".
        vocab_size: ids lie in [0, vocab_size).
    """

    def __init__(self, folder: str | PathLike[str], split: str, side: str, vocab_size: int) -> None:
        if side not in _SIDES:
            raise ValueError(f"side: must be 'source' or 'target', got {side!r}")
        self.vocab_size = vocab_size
        tokens, offsets = _files(folder, split, side)
        self._tokens = _GrowingArray(tokens, np.uint16 if vocab_size <= 2**16 else np.int32)
        self._offsets = _GrowingArray(offsets, np.int64)
        self._offsets.append(np.zeros(1, np.int64))

    def write(self, ids: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append sentences.

        Args:
            ids: (total,) integers, the sentences end to end.
            lengths: (sentences,) ids of each; they add up to `total`.

        Raises:
            ValueError: ids outside the vocabulary, or lengths that do not add up.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids: {ids.min()} ... {ids.max()} must lie in [0, {self.vocab_size})")
        if lengths.sum() != ids.size:
            raise ValueError(f"lengths: must add up to the {ids.size} ids, got {lengths.sum()}")
        self._offsets.append(self._tokens.length + lengths.cumsum())
        self._tokens.append(ids)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        for array in (self._tokens, self._offsets):
            array.close(is_complete=kind is None)


# ---- reading ----


class _Side:
    """The sentences of one side of a split."""

    def __init__(self, folder: str | PathLike[str], split: str, side: str) -> None:
        files = _files(folder, split, side)
        self.tokens, self.offsets = (_read(file) for file in files)
        if self.offsets.size == 0 or self.offsets[-1] != self.tokens.size:
            raise ValueError(f"folder: the offsets of {files[0]} do not end at its {self.tokens.size} ids")

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        lengths = np.empty(self.offsets.size - 1, np.int32)
        return np.subtract(self.offsets[1:], self.offsets[:-1], out=lengths, casting="same_kind")

    def sentence(self, index: int) -> NDArray[Any]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def gather(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The ids of some sentences end to end, and their `cu_seqlens`, both int64."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        ends = lengths.cumsum()
        places = np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())
        return torch.from_numpy(self.tokens[places].astype(np.int64)), torch.from_numpy(np.append(0, ends))


def _read(file: Path) -> NDArray[Any]:
    """A memory map as a plain array, whose slices are cheap."""
    try:
        return np.asarray(np.load(file, mmap_mode="r"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"folder: {file} does not exist; was this folder prepared, and with this split?"
        ) from None
    except ValueError as error:
        raise ValueError(f"folder: {file} is no complete token file ({error})") from None


class ParallelTokens:
    """The sentence pairs of one split, read where they lie on disk.

    Args:
        folder: what `TokenWriter` wrote.
        split: "train", "valid", "test" ...

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that was not written to its end, or sides of different numbers of sentences.
    """

    def __init__(self, folder: str | PathLike[str], split: str) -> None:
        self._source, self._target = (_Side(folder, split, side) for side in _SIDES)
        sizes = [side.offsets.size - 1 for side in (self._source, self._target)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"folder: {folder} holds {sizes[0]} source and {sizes[1]} target sentences of {split!r}")
        self._size = sizes[0]

    def __len__(self) -> int:
        return self._size

    @property
    def source_lengths(self) -> NDArray[np.int32]:
        """Lengths (pairs,) int32 of the source sentences in ids, their ends included."""
        return self._source.lengths

    @property
    def target_lengths(self) -> NDArray[np.int32]:
        """Lengths (pairs,) int32 of the target sentences in ids, their ends included."""
        return self._target.lengths

    def pair(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The ids of source and target sentence `index`, read-only views of the files."""
        if not 0 <= index < self._size:
            raise IndexError(f"index: must lie in [0, {self._size}), got {index}")
        return self._source.sentence(index), self._target.sentence(index)

    def batch(
        self, indices: Sequence[int] | NDArray[np.integer], packed: bool, pad_id: int = 0
    ) -> tuple[Tensor, Tensor] | tuple[PackedTokens, PackedTokens]:
        """Source and target of some pairs, as `Transformer.hidden` takes them.

        Args:
            indices: (batch,) numbers of the pairs, in any order.
            packed: `PackedTokens`, else int64 tensors (batch, length) padded on the right.
            pad_id: the id of padding.

        Raises:
            IndexError: an index outside [0, pairs).
        """
        chosen = np.asarray(indices, np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self._size:
            raise IndexError(f"indices: {chosen.min()} ... {chosen.max()} must lie in [0, {self._size})")
        source, target = (side.gather(chosen) for side in (self._source, self._target))
        if packed:
            return _packed(*source), _packed(*target)
        return _padded(*source, pad_id), _padded(*target, pad_id)


def _packed(tokens: Tensor, cu_seqlens: Tensor) -> PackedTokens:
    return PackedTokens(tokens, cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0)


def _padded(tokens: Tensor, cu_seqlens: Tensor, pad_id: int) -> Tensor:
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    is_token = torch.arange(longest) < lengths[:, None]
    return torch.full(is_token.shape, pad_id).masked_scatter_(is_token, tokens)
