"""Token files: what is written is what is read, padded or packed, and a file not written to its end is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastattn.nmt.data import ParallelTokens, TokenWriter
from fastattn.nmt.layout import PackedTokens, pack

SOURCES = [[5, 6, 7, 1], [1], [900, 2, 1], [3, 4, 5, 6, 7, 8, 1]]
TARGETS = [[8, 1], [9, 10, 11, 1], [1], [12, 1]]


def write(folder, sources, targets, split="train", vocab_size=1000, chunk=2):
    for side, sentences in (("source", sources), ("target", targets)):
        with TokenWriter(folder, split, side, vocab_size) as writer:
            for start in range(0, len(sentences), chunk):
                part = sentences[start : start + chunk]
                writer.write(np.array(sum(part, []), np.int64), np.array([len(s) for s in part]))


@pytest.fixture
def tokens(tmp_path):
    write(tmp_path, SOURCES, TARGETS)
    return ParallelTokens(tmp_path, "train")


def test_pairs_come_back(tokens):
    assert len(tokens) == 4
    for i, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        assert [side.tolist() for side in tokens.pair(i)] == [source, target]
    assert tokens.source_lengths.tolist() == [4, 1, 3, 7]
    assert tokens.target_lengths.tolist() == [2, 4, 1, 2]


def test_padded_batch_in_the_order_asked_for(tokens):
    source, target = tokens.batch([2, 0], packed=False, pad_id=99)
    assert source.dtype == target.dtype == torch.int64
    assert source.tolist() == [[900, 2, 1, 99], [5, 6, 7, 1]]
    assert target.tolist() == [[1, 99], [8, 1]]


def test_packed_batch_is_the_padded_one_without_padding(tokens):
    indices = np.array([3, 1, 2])
    for packed, padded in zip(tokens.batch(indices, True), tokens.batch(indices, False), strict=True):
        assert isinstance(packed, PackedTokens)
        expected = pack(padded)
        assert packed.tokens.tolist() == expected.tokens.tolist()
        assert packed.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
        assert packed.cu_seqlens.dtype == torch.int32
        assert packed.max_seqlen == expected.max_seqlen


@pytest.mark.parametrize("packed", [False, True])
def test_empty_batch(tokens, packed):
    source, _ = tokens.batch([], packed)
    assert (source.tokens if packed else source).numel() == 0
    assert source.cu_seqlens.tolist() == [0] if packed else source.shape == (0, 0)


def test_what_is_on_disk(tmp_path):
    write(tmp_path, SOURCES, TARGETS)
    ids, offsets = (np.load(tmp_path / f"train.source.{kind}.npy") for kind in ("tokens", "offsets"))
    assert ids.dtype == np.uint16 and ids.tolist() == sum(SOURCES, [])
    assert offsets.dtype == np.int64 and offsets.tolist() == [0, 4, 5, 8, 15]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_width_of_ids(tmp_path, vocab_size, dtype):
    write(tmp_path, [[vocab_size - 1]], [[0]], vocab_size=vocab_size)
    assert np.load(tmp_path / "train.source.tokens.npy").dtype == dtype
    assert ParallelTokens(tmp_path, "train").batch([0], False)[0].item() == vocab_size - 1


def test_files_do_not_depend_on_the_chunks(tmp_path):
    for chunk in (1, 4):
        (tmp_path / str(chunk)).mkdir()
        write(tmp_path / str(chunk), SOURCES, TARGETS, chunk=chunk)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "4" / file.name).read_bytes()


def test_split_without_sentences(tmp_path):
    write(tmp_path, [], [], "test")
    assert len(ParallelTokens(tmp_path, "test")) == 0


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(tmp_path):
    script = """
import resource, sys
import numpy as np
from fastattn.nmt.data import TokenWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with TokenWriter(sys.argv[1], "train", "source", 30_000) as writer:
    ids, lengths = np.arange(25_000), np.full(1000, 25)
    writer.write(ids, lengths)
    before = peak()
    for _ in range(1000):
        writer.write(ids, lengths)
print(peak() - before)
"""
    grown = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "train.source.tokens.npy").stat().st_size > 50_000_000
    assert int(grown) < 10


# ---- what is refused ----


def test_files_not_written_to_their_end_are_refused(tmp_path):
    write(tmp_path, SOURCES, TARGETS)
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path, "train", "target", 1000) as writer:
        writer.write(np.array([1]), np.array([1]))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"train\.target\.tokens\.npy is no complete token file"):
        ParallelTokens(tmp_path, "train")


def test_sides_must_match(tmp_path):
    write(tmp_path, SOURCES, TARGETS[:3])
    with pytest.raises(ValueError, match="4 source and 3 target sentences of 'train'"):
        ParallelTokens(tmp_path, "train")


def test_offsets_must_match_ids(tmp_path):
    write(tmp_path, SOURCES, TARGETS)
    np.save(tmp_path / "train.source.tokens.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="do not end at its 3 ids"):
        ParallelTokens(tmp_path, "train")


def test_missing_split(tmp_path):
    write(tmp_path, SOURCES, TARGETS)
    with pytest.raises(FileNotFoundError, match=r"valid\.source\.tokens\.npy does not exist"):
        ParallelTokens(tmp_path, "valid")


@pytest.mark.parametrize("index", [-1, 4])
def test_index_outside(tokens, index):
    with pytest.raises(IndexError, match=rf"must lie in \[0, 4\), got {index}"):
        tokens.pair(index)
    with pytest.raises(IndexError, match=r"must lie in \[0, 4\)"):
        tokens.batch([0, index], packed=True)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [([10], [1], r"10 \.\.\. 10 must lie in \[0, 10\)"), ([-1], [1], r"-1 .* must lie in"), ([1, 2], [1], "add up to")],
)
def test_writer_refuses(tmp_path, ids, lengths, message):
    with pytest.raises(ValueError, match=message), TokenWriter(tmp_path, "train", "source", 10) as writer:
        writer.write(np.array(ids), np.array(lengths))


def test_writer_refuses_other_sides(tmp_path):
    with pytest.raises(ValueError, match="side: must be 'source' or 'target', got 'src'"):
        TokenWriter(tmp_path, "train", "src", 10)
