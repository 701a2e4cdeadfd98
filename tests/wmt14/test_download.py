"""Downloads against servers that break off, forget ranges or lie; text read out of archives, whole or damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from examples.wmt14 import corpora, download
from examples.wmt14.corpora import (
    MAX_LINE_BYTES,
    PREPARATIONS,
    Corpus,
    Download,
    Preparation,
    Text,
    open_lines,
    read_pairs,
)
from examples.wmt14.download import fetch
from fastattn.nmt.data import ParallelTokens
from tests.support.wmt14_text import prepare, sentences, write_lines, write_text

CONTENT = bytes(range(256)) * 20_000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(HTTPServer):
    """A server of `content` at /file.gz; `breaks` are the numbers of bytes after which it hangs up, one per request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.has_ranges, self.breaks, self.errors = CONTENT, True, [], []
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/file.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers["Range"])
        if server.errors or self.path != "/file.gz":
            return self.send_error(server.errors.pop(0) if server.errors else 404)
        start = 0
        if server.has_ranges and (asked := self.headers["Range"]):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_downloaded_once(server, tmp_path):
    wanted = Download(server.url, SHA256, len(CONTENT))
    path = fetch(wanted, tmp_path / "downloads")
    assert path.name == "file.gz" and path.read_bytes() == CONTENT
    assert fetch(wanted, tmp_path / "downloads") == path
    assert server.ranges == [None]
    assert [file.name for file in path.parent.iterdir()] == ["file.gz"]


def test_broken_connections_are_continued(server, tmp_path):
    server.breaks = [1_000_000, 2_000_000]
    assert fetch(Download(server.url, SHA256), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-", "bytes=3000000-"]


def test_a_later_run_continues(server, tmp_path):
    server.breaks = [500_000] * download.ATTEMPTS
    with pytest.raises(OSError, match="failed 5 times, .* ended after 2,500,000 of 5,120,000 bytes"):
        fetch(Download(server.url, SHA256), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.gz.part"]
    assert fetch(Download(server.url, SHA256), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=2500000-"


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.has_ranges, server.breaks = False, [1_000_000]
    assert fetch(Download(server.url, SHA256), tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_complete_already(server, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(CONTENT)
    assert fetch(Download(server.url, SHA256), tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(CONTENT + b"more")
    assert fetch(Download(server.url, SHA256), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.errors = [503, 500]
    assert fetch(Download(server.url, SHA256), tmp_path).read_bytes() == CONTENT


def test_a_missing_file_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(OSError, match=r"other\.gz: the server answers 404 Not Found"):
        fetch(Download(server.url.replace("file", "other")), tmp_path)
    assert len(server.ranges) == 1 and not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("checksum", "size", "rule"),
    [("sha256:" + "0" * 64, None, "its sha256 must be 000"), ("md5:" + "0" * 32, None, "its md5 must be 000"),
     (SHA256, 7, "must have 7 bytes .* got 5,120,000")],
)  # fmt: skip
def test_a_wrong_file_is_set_aside(server, tmp_path, checksum, size, rule):
    with pytest.raises(ValueError, match=rf"{rule}.*; it is now .*file\.gz\.wrong"):
        fetch(Download(server.url, checksum, size), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.gz.wrong"]


def test_a_wrong_file_that_was_there_is_left_alone(server, tmp_path):
    (tmp_path / "file.gz").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"file\.gz: its sha256 must be"):
        fetch(Download(server.url, SHA256), tmp_path)
    assert (tmp_path / "file.gz").read_bytes() == b"mine" and not server.ranges


def test_prepare_downloads_and_says_what_is_wrong(server, tmp_path, monkeypatch):
    files = write_text(tmp_path)
    text = sentences(300, 0)
    server.content = tgz({f"corpus.{side}": "\n".join(lines).encode() for side, lines in text.items()})
    wanted = Download(server.url.replace("gz", "tgz"), f"sha256:{hashlib.sha256(server.content).hexdigest()}")
    sides = [Text(wanted, f"corpus.{side}") for side in text]
    preparation = Preparation(vocab_size=150, corpora={"train": [Corpus("made up", *sides, 300)]})
    monkeypatch.setitem(corpora.PREPARATIONS, "smoke", preparation)
    local = {option: file for option, file in files.items() if "train" not in option}
    with pytest.raises(SystemExit, match="the server answers 404"):
        prepare(tmp_path / "out", local, "--downloads", str(tmp_path / "downloads"))
    (tmp_path / "downloads").mkdir(exist_ok=True)
    (tmp_path / "downloads" / "file.tgz").write_bytes(server.content)
    prepare(tmp_path / "out", local, "--downloads", str(tmp_path / "downloads"))
    assert len(ParallelTokens(tmp_path / "out", "train")) == 300


# ---- archives ----


LINES = [f"Zeile {i} ü" for i in range(5000)]
BYTES = "\n".join(LINES).encode()


def tgz(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def lines_of(path: Path, member: str | None = None) -> list[str]:
    with open_lines(Text(path, member), path) as lines:
        return [line.decode() for line in lines]


ARCHIVES = {
    "a.txt": (BYTES, None),
    "a.gz": (gzip.compress(BYTES[:999]) + gzip.compress(BYTES[999:]), None),
    "a.tgz": (tgz({"x/other": b"no\n", "x/text": BYTES}), "x/text"),
    "dot.tgz": (tgz({"./x/text": BYTES}), "x/text"),
    "a.tar": (tgz({"other": b"no\n", "text.gz": gzip.compress(BYTES)}, "w"), "text.gz"),
    "a.zip": (zipped({"other": b"no\n", "text": BYTES}), "text"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_lines_of_every_kind_of_file(tmp_path, name):
    content, member = ARCHIVES[name]
    (tmp_path / name).write_bytes(content)
    assert lines_of(tmp_path / name, member) == LINES


@pytest.mark.parametrize("name", [name for name in ARCHIVES if name != "a.txt"])
def test_a_damaged_archive_is_named(tmp_path, name):
    content, member = ARCHIVES[name]
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name}: (is damaged|has no member)"):
        lines_of(tmp_path / name, member)


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_a_missing_member_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(ARCHIVES[name][0])
    with pytest.raises(ValueError, match=rf"{name}: has no member nothing"):
        lines_of(tmp_path / name, "nothing")


def test_a_folder_is_no_text(tmp_path):
    folder = tarfile.TarInfo("text")
    folder.type = tarfile.DIRTYPE
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.addfile(folder)
    with pytest.raises(ValueError, match="a.tgz: has no member text"):
        lines_of(tmp_path / "a.tgz", "text")


def test_segments_of_sgm(tmp_path):
    segments = '<refset>\n<doc id="a">\n<seg id="1">Eins &amp; zwei</seg>\n<p>\n  <seg id="2"> Drei <b></seg>\n</doc>\n'
    (tmp_path / "test.sgm").write_text(segments)
    assert lines_of(tmp_path / "test.sgm") == ["Eins &amp; zwei", "Drei <b>"]


def test_of_a_monstrous_line_only_the_start_is_kept(tmp_path):
    write_lines(tmp_path / "text", [b"a", b"x" * (5 * MAX_LINE_BYTES + 3), b"b", b"y" * MAX_LINE_BYTES, b"c"])
    lines = lines_of(tmp_path / "text")
    assert [line[0] for line in lines] == ["a", "x", "b", "y", "c"]
    assert [len(line) for line in lines] == [1, MAX_LINE_BYTES, 1, MAX_LINE_BYTES, 1]


@pytest.mark.parametrize("sizes", [(5, 6), (6, 5), (4, 8)])
def test_sides_of_other_lengths(tmp_path, sizes):
    sides = [write_lines(tmp_path / side, ["x"] * size) for side, size in zip("ab", sizes, strict=True)]
    with pytest.raises(ValueError, match=f"got {sizes[0]} in a and {sizes[1]} in b"):
        list(read_pairs(Corpus("odd", *map(Text, sides)), *sides, chunk_size=2))


def test_a_corpus_has_the_lines_it_should_have(tmp_path):
    sides = [write_lines(tmp_path / side, ["x"] * 6) for side in "ab"]
    assert [len(a) for a, _ in read_pairs(Corpus("even", *map(Text, sides), 6), *sides, chunk_size=4)] == [4, 2]
    with pytest.raises(ValueError, match="even: must have 7 lines, got 6"):
        list(read_pairs(Corpus("even", *map(Text, sides), 7), *sides, chunk_size=4))


# ---- what is known of the downloads ----


def test_the_table_of_preparations():
    assert {"wmt14_en_de", "wmt14_en_fr", "multi30k_fast", "multi30k_tiny", "small_en_de", "smoke"} <= set(PREPARATIONS)
    assert PREPARATIONS["wmt14_en_de"].vocab_size == 37_000 and PREPARATIONS["wmt14_en_fr"].vocab_size == 32_000
    for preparation in PREPARATIONS.values():
        corpora = [corpus for split in preparation.corpora.values() for corpus in split]
        for text in (text for corpus in corpora for text in (corpus.source, corpus.target)):
            assert isinstance(text.file, Download) and text.file.url.startswith("https://")
            algorithm, _, digest = text.file.checksum.partition(":")
            assert len(digest) == {"sha256": 64, "md5": 32}[algorithm]
        for corpus in corpora:
            assert corpus.source != corpus.target
    lines = {split: sum(c.lines for c in corpora) for split, corpora in PREPARATIONS["wmt14_en_de"].corpora.items()}
    assert lines == {"train": 4_520_620, "valid": 3000, "test": 3003, "test_filtered": 2737}
