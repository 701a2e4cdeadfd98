"""Cleaning: bad training lines are dropped, counted by reason and named; validation and test stay whole."""

from __future__ import annotations

from examples.wmt14.cleaning import Cleaner
from examples.wmt14.subwords import Subwords, TextForm
from tests.support.wmt14_text import BAD, prepare, report_of, spoil, tokens_of, write_lines


def test_bad_lines_are_counted_by_reason_and_line(files, out, capsys):
    spoil(files)
    prepare(out, files, "--max-ratio", "4")
    [corpus] = report_of(out)["splits"]["train"]["corpora"]
    expected: dict = {}
    for number, (reason, *_) in BAD.items():
        expected.setdefault(reason, []).append(number)
    assert {reason: dropped["lines"] for reason, dropped in corpus["dropped"].items()} == expected
    assert corpus["kept"] == len(tokens_of(out)) == 300 - len(BAD)
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in expected) and "dropped; lines 7, 8" in printed


def test_only_the_first_lines_of_a_reason_are_kept(files, out):
    lines = files["--train-source"].read_text().split("\n")[:-1]
    write_lines(files["--train-source"], [*lines[:100], *[""] * 50, *lines[150:]])
    prepare(out, files)
    assert report_of(out)["splits"]["train"]["corpora"][0]["dropped"] == {
        "empty": {"pairs": 50, "lines": list(range(101, 121))}
    }


def test_lines_end_at_line_feeds_only(files, out):
    source = b"\xef\xbb\xbfthe big\xe2\x80\xa8house.\r\nthe\x85\x0bdog.\r\n".replace(b"\x85", "\x85".encode())
    files["--valid-source"].write_bytes(source)
    files["--valid-target"].write_bytes(b"das Haus.\nder Hund.")
    prepare(out, files)
    ids = [tokens_of(out, "valid").pair(i)[0] for i in range(2)]
    assert Subwords.load(out).decode(ids, "source") == ["the big house.", "the dog."]
    assert (out / "valid.source.txt").read_bytes() == source.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"")
    assert (out / "valid.target.txt").read_bytes() == b"das Haus.\nder Hund.\n"


def test_validation_and_test_stay_whole(files, out):
    lines = [b"", b"  two  spaces ", b"<p>", b"a " * 400, *[b"the house."] * 6]
    write_lines(files["--test-source"], lines)
    prepare(out, files)
    assert (out / "test.source.txt").read_bytes() == b"".join(line + b"\n" for line in lines)
    tokens = tokens_of(out, "test")
    assert len(tokens) == 10 and tokens.pair(0)[0].tolist() == [1]


def test_duplicates_stay_unless_asked_for(files, tmp_path):
    for option in ("--train-source", "--train-target"):
        lines = files[option].read_text().split("\n")[:-1]
        write_lines(files[option], lines[:200] + lines[:100])
    prepare(tmp_path / "all", files)
    prepare(tmp_path / "once", files, "--drop-duplicates")
    assert len(tokens_of(tmp_path / "all")) == 300
    dropped = report_of(tmp_path / "once")["splits"]["train"]["corpora"][0]["dropped"]["duplicate"]
    assert dropped["pairs"] >= 100 and dropped["lines"][-1] > 200
    assert len(tokens_of(tmp_path / "once")) == 300 - dropped["pairs"]


def test_cleaner_keeps_what_is_at_its_bounds():
    cleaner = Cleaner(TextForm("en"), TextForm("de"), max_words=4, max_ratio=2.0, max_characters=11)
    assert cleaner(b"a b c d", b"a b") == ("a b c d", "a b")
    assert cleaner(b"a b c d", b"a") == "length ratio"
    assert cleaner(b"a b c d e", b"a b c d") == "too many words"
    assert cleaner(b"abcdefghijk", b"x") == ("abcdefghijk", "x")
    assert cleaner(b"abcdefghijkl", b"x") == "too many characters"
    assert cleaner(b"a < b", b"x <y> z") == ("a < b", "x <y> z")
