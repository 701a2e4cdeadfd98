"""The downloads of each preparation, and the reading of their text out of the archives, one line at a time."""

from __future__ import annotations

import gzip
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

MAX_LINE_BYTES = 2**16  # a longer line is cut here, where it is still too long for every `Cleaner`
_File = IO[bytes] | gzip.GzipFile
_SEGMENT = re.compile(rb"<seg[^>]*>(.*)</seg>")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Download:
    """A file on the network; `checksum` is "sha256:..." or "md5:...", of `size` bytes where that is known."""

    url: str
    checksum: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Text:
    """One side of a corpus: a plain or .gz file, or a member of a .tar, .tgz or .zip archive.

    The lines of an .sgm file are its segments.
    """

    file: Download | Path
    member: str | None = None

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.member}" if self.member else self.file.name


@dataclass(frozen=True)
class Corpus:
    """Two texts whose lines translate one another; `lines` where their number is known."""

    name: str
    source: Text
    target: Text
    lines: int | None = None


# ---- where the paper's data is ----

_STATMT = "https://www.statmt.org"
_EUROPARL = Download(
    f"{_STATMT}/wmt13/training-parallel-europarl-v7.tgz",
    "sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7", 657_632_379,
)  # fmt: skip
_COMMON_CRAWL = Download(
    f"{_STATMT}/wmt13/training-parallel-commoncrawl.tgz",
    "sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5", 918_311_367,
)  # fmt: skip
_NEWS_COMMENTARY = Download(
    f"{_STATMT}/wmt14/training-parallel-nc-v9.tgz",
    "sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485", 80_418_416,
)  # fmt: skip
_UN = Download(
    f"{_STATMT}/wmt13/training-parallel-un.tgz",
    "sha256:29141b5c1eba149a94f7a59d3b1a834b2e47fe0f8758d68dcd77a3d3f497ee47", 2_365_634_246,
)  # fmt: skip
_GIGA = Download(
    f"{_STATMT}/wmt10/training-giga-fren.tar",
    "sha256:3ff8319f6919393520559bfbc7ad6a747ec81b3abc7be9993b338d4b017b4d9a", 2_595_102_720,
)  # fmt: skip
_NEWSTEST2013 = Download(f"{_STATMT}/wmt13/test.tgz", "md5:48eca5d02f637af44e85186847141f67")
_NEWSTEST2014 = Download(f"{_STATMT}/wmt14/test-full.tgz", "md5:a8cd784e006feb32ac6f3d9ec7eb389a")
_NEWSTEST2014_FILTERED = Download(f"{_STATMT}/wmt14/test-filtered.tgz", "md5:84c597844c1542e29c2aff23aaee4310")


def _members(name: str, archive: Download, pattern: str, language: str, lines: int | None = None) -> Corpus:
    """English to `language`; `pattern` names both members of the archive, with {} for the language."""
    return Corpus(name, Text(archive, pattern.format("en")), Text(archive, pattern.format(language)), lines)


def _newstest2014(archive: Download, folder: str, pair: str, language: str, lines: int) -> Corpus:
    source, target = f"{folder}/newstest2014-{pair}-src.en.sgm", f"{folder}/newstest2014-{pair}-ref.{language}.sgm"
    return Corpus("newstest2014", Text(archive, source), Text(archive, target), lines)


def _wmt14_en_de() -> dict[str, list[Corpus]]:
    return {
        "train": [
            _members("europarl-v7", _EUROPARL, "training/europarl-v7.de-en.{}", "de", 1_920_209),
            _members("commoncrawl", _COMMON_CRAWL, "commoncrawl.de-en.{}", "de", 2_399_123),
            _members("news-commentary-v9", _NEWS_COMMENTARY, "training/news-commentary-v9.de-en.{}", "de", 201_288),
        ],
        "valid": [_members("newstest2013", _NEWSTEST2013, "test/newstest2013-src.{}.sgm", "de", 3000)],
        "test": [_newstest2014(_NEWSTEST2014, "test-full", "deen", "de", 3003)],
        "test_filtered": [_newstest2014(_NEWSTEST2014_FILTERED, "test", "deen", "de", 2737)],
    }


def _wmt14_en_fr() -> dict[str, list[Corpus]]:
    return {
        "train": [
            _members("europarl-v7", _EUROPARL, "training/europarl-v7.fr-en.{}", "fr", 2_007_723),
            _members("commoncrawl", _COMMON_CRAWL, "commoncrawl.fr-en.{}", "fr", 3_244_152),
            _members("news-commentary-v9", _NEWS_COMMENTARY, "training/news-commentary-v9.fr-en.{}", "fr", 183_251),
            _members("un", _UN, "un/undoc.2000.fr-en.{}", "fr", 12_886_831),
            # Published counts of its lines differ by a few.
            _members("giga", _GIGA, "giga-fren.release2.fixed.{}.gz", "fr"),
        ],
        "valid": [_members("newstest2013", _NEWSTEST2013, "test/newstest2013-src.{}.sgm", "fr", 3000)],
        "test": [_newstest2014(_NEWSTEST2014, "test-full", "fren", "fr", 3003)],
    }


_MULTI30K_SHA256 = {
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
}


def _multi30k() -> dict[str, list[Corpus]]:
    url = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"

    def corpus(name: str, lines: int) -> list[Corpus]:
        files = [f"{name}.{language}.gz" for language in ("en", "de")]
        source, target = (Text(Download(f"{url}/{file}", f"sha256:{_MULTI30K_SHA256[file]}")) for file in files)
        return [Corpus(f"multi30k {name}", source, target, lines)]

    return {"train": corpus("train", 29_000), "valid": corpus("val", 1014), "test": corpus("test_2016_flickr", 1000)}


@dataclass(frozen=True)
class Preparation:
    """A recipe for data: which text, what is dropped, how it is written, how large the vocabulary is.

    Args:
        source_language, target_language: as file names abbreviate them.
        vocab_size: ids, padding, end of sentence and unknown included.
        corpora: by split; empty where the user brings the files.
        lowercase, moses: as in `TextForm`.
        character_coverage: as in `train_subwords`.
        max_words: of a side of a training pair, as spaces divide it.
        max_ratio: of the longer side's words to the shorter one's.
    """

    source_language: str = "en"
    target_language: str = "de"
    vocab_size: int = 8000
    corpora: dict[str, list[Corpus]] = field(default_factory=dict)
    lowercase: bool = False
    moses: bool = False
    character_coverage: float = 0.9999
    max_words: int = 250
    max_ratio: float | None = None


PREPARATIONS = {
    "wmt14_en_de": Preparation(vocab_size=37_000, corpora=_wmt14_en_de()),
    # The bounds on words leave about 36 million of the 40.8 million pairs, as many as the paper has.
    "wmt14_en_fr": Preparation("en", "fr", 32_000, _wmt14_en_fr(), max_words=175, max_ratio=1.5),
    "multi30k_fast": Preparation(vocab_size=4000, corpora=_multi30k(), character_coverage=1.0),
    "multi30k_tiny": Preparation(
        vocab_size=10_000, corpora=_multi30k(), lowercase=True, moses=True, character_coverage=1.0
    ),
    "small_en_de": Preparation(vocab_size=10_000, max_words=100, max_ratio=4.0),
    "smoke": Preparation(vocab_size=300, character_coverage=1.0),
}


# ---- reading ----


@contextmanager
def open_lines(text: Text, path: Path) -> Iterator[Iterator[bytes]]:
    """The lines of a text, without their line ends, however large the file.

    Args:
        text: what to read.
        path: where `text.file` lies.

    Raises:
        ValueError: an archive without that member, or a damaged one.
    """
    name = text.member or path.name
    with _open_bytes(text, path) as file:
        lines = _split_lines(file)
        if name.endswith(".sgm"):
            lines = (match[1].strip() for match in map(_SEGMENT.search, lines) if match)
        yield _checked(lines, path)


@contextmanager
def _open_bytes(text: Text, path: Path) -> Iterator[_File]:
    """The text, out of its archive and uncompressed."""
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if text.member is not None:
            file = stack.enter_context(_open_member(file, path, text.member))
        if (text.member or path.name).endswith(".gz"):
            yield stack.enter_context(gzip.GzipFile(fileobj=file))
        else:
            yield file


@contextmanager
def _open_member(file: IO[bytes], path: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive, archive.open(member) as opened:
                yield opened
        else:
            file.seek(0)
            # A stream, read from front to back: seeking back in a compressed archive would decompress it again.
            with tarfile.open(fileobj=file, mode="r|*", bufsize=2**20) as tar:
                entry = next((entry for entry in tar if entry.name.removeprefix("./") == member), None)
                content = tar.extractfile(entry) if entry is not None else None  # None also of a folder
                if content is None:
                    raise KeyError(member)
                yield content
    except KeyError:
        raise ValueError(f"{path}: has no member {member}") from None
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _checked(lines: Iterator[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: is damaged ({error}); remove it and run the command again")


def _split_lines(file: _File) -> Iterator[bytes]:
    """The lines of a file: they end with \\n or \\r\\n only, for Unicode's other separators stand inside sentences."""
    first = True
    while line := file.readline(MAX_LINE_BYTES):
        part = line
        while len(part) == MAX_LINE_BYTES and not part.endswith(b"\n"):
            part = file.readline(MAX_LINE_BYTES)
        yield line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(b"\xef\xbb\xbf" if first else b"")
        first = False


def read_pairs(
    corpus: Corpus, source: Path, target: Path, chunk_size: int
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """The pairs of a corpus, `chunk_size` at a time.

    Args:
        corpus: the corpus to read.
        source, target: where the files of its sides lie.
        chunk_size: pairs.

    Raises:
        ValueError: sides of different numbers of lines, or not as many as the corpus has.
    """
    with open_lines(corpus.source, source) as source_lines, open_lines(corpus.target, target) as target_lines:
        total = 0
        while True:
            chunk = list(islice(source_lines, chunk_size)), list(islice(target_lines, chunk_size))
            if len(chunk[0]) != len(chunk[1]):
                counts = [
                    total + len(side) + sum(1 for _ in rest)
                    for side, rest in zip(chunk, (source_lines, target_lines), strict=True)
                ]
                raise ValueError(
                    f"{corpus.name}: both sides must have as many lines, got {counts[0]:,} in {corpus.source.name} "
                    f"and {counts[1]:,} in {corpus.target.name}"
                )
            if not chunk[0]:
                break
            total += len(chunk[0])
            yield chunk
    if corpus.lines is not None and total != corpus.lines:
        raise ValueError(f"{corpus.name}: must have {corpus.lines:,} lines, got {total:,}; not the file it should be")
