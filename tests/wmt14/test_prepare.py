"""prepare: what goes in comes out, bad lines are counted and named, and nothing half made looks finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.wmt14 import pipeline
from examples.wmt14 import prepare as prepare_module
from examples.wmt14.cleaning import Cleaner
from examples.wmt14.corpora import MAX_LINE_BYTES, PREPARATIONS, Download
from examples.wmt14.pipeline import Workers, sample_sentences
from examples.wmt14.subwords import Subwords, TextForm, train_subwords
from fastattn.nmt.data import ParallelTokens
from tests.support.wmt14_text import prepare, sentences, write_lines, write_text


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def files(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_text_comes_back(files, out, capsys):
    prepare(out, files)
    subwords = Subwords.load(out)
    assert subwords.vocab_size == 150
    for seed, (split, count) in enumerate({"train": 300, "valid": 20, "test": 10}.items()):
        expected, tokens = sentences(count, seed), ParallelTokens(out, split)
        pairs = [tokens.pair(i) for i in range(len(tokens))]
        assert subwords.decode([source for source, _ in pairs], "source") == expected["source"]
        assert subwords.decode([target for _, target in pairs]) == expected["target"]
        assert all(side[-1] == subwords.eos_id and subwords.eos_id not in side[:-1] for pair in pairs for side in pair)
        assert pairs[0][0].tolist() == subwords.encode(expected["source"][:1])[0]
    report = report_of(out)["splits"]["train"]
    assert (report["pairs"], report["target_ids"]) == (300, int(tokens_of(out).target_lengths.sum()))
    assert "packed 0.0%" in capsys.readouterr().out


def tokens_of(out: Path, split: str = "train") -> ParallelTokens:
    return ParallelTokens(out, split)


def test_bytes_depend_on_neither_workers_nor_chunks(files, tmp_path, monkeypatch):
    spoil(files)
    prepare(tmp_path / "one", files)
    monkeypatch.setattr(pipeline, "CHUNK_SIZE", 7)
    prepare(tmp_path / "two", files, workers=2)
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert {name for name in one if name.startswith("valid")} == {
        f"valid.{side}.{kind}" for side in ("source", "target") for kind in ("txt", "tokens.npy", "offsets.npy")
    }


def test_workers_keep_order_and_read_little_ahead():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield i

    with Workers(2) as workers:
        results = workers.map(str, items())
        assert [next(results) for _ in range(3)] == ["0", "1", "2"]
        assert len(read) < 15
        assert list(results) == [str(i) for i in range(3, 100)]


# ---- bad text ----


BAD = {
    3: ("invalid UTF-8", b"caf\xe9 au lait", b"ein Haus."),
    5: ("NUL character", b"a house.", b"ein\0 Haus."),
    7: ("empty", b" \t ", b"ein Haus."),
    8: ("empty", b"a house.", "\u200b\u2028".encode()),
    11: ("too many words", b"a " * 251, b"ein " * 200),
    13: ("too many characters", b"x" * 5001, b"y"),
    17: ("too many characters", b"y", "ü".encode() * MAX_LINE_BYTES),
    19: ("markup", b'<SPEAKER ID="3" NAME="Mr X">', b"<SPEAKER ID=3>"),
    23: ("length ratio", b"a a a a a a a a a", b"ein ein"),
}


def spoil(files: dict[str, Path]) -> None:
    """Put the bad lines into the training files."""
    for column, side in ((1, "source"), (2, "target")):
        lines = files[f"--train-{side}"].read_bytes().split(b"\n")[:-1]
        for number, bad in BAD.items():
            lines[number - 1] = bad[column]
        write_lines(files[f"--train-{side}"], lines)


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


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--train-source", b"one line\n", "both sides must have as many lines, got 1 in train.source and 300 in train"),
        ("--valid-target", b"ok\n" * 4 + b"\xff\n" + b"ok\n" * 15, "valid.source: line 5 must be UTF-8 text"),
        ("--train-source", b"\n" * 300, "no pair is left after cleaning"),
        ("--train-source", b"\xff\xfea\0 \0" * 300, "got 1 in train.source and 300"),
    ],
    ids=["lines", "utf8", "nothing-left", "utf16"],
)
def test_wrong_files_stop(files, out, option, content, message):
    files[option].write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        prepare(out, files)
    assert not out.exists()


def test_wrong_arguments_stop(files, out):
    with pytest.raises(SystemExit, match="vocab_size: 5000 does not fit the text"):
        prepare(out, files, "--vocab-size", "5000")
    with pytest.raises(SystemExit, match="--test-source, --test-target: must be given, smoke downloads nothing"):
        prepare(out, {option: file for option, file in files.items() if "test" not in option})
    with pytest.raises(SystemExit, match="--valid-source, --valid-target: must both be given, or neither"):
        prepare(out, {option: file for option, file in files.items() if option != "--valid-target"})
    with pytest.raises(SystemExit, match="nowhere: there is no such file"):
        prepare(out, files | {"--train-source": Path("nowhere")})
    with pytest.raises(SystemExit, match="source and target must be two texts"):
        prepare(out, files | {"--train-source": files["--train-target"]})
    assert not out.exists()


# ---- half made, made before ----


def test_the_folder_appears_only_when_complete(files, out, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "summarize", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        prepare(out, files)
    assert not out.exists() and out.with_name("out.partial").exists()
    monkeypatch.undo()
    out.with_name("out.partial").joinpath("stale").touch()
    prepare(out, files)
    assert not out.with_name("out.partial").exists() and "stale" not in contents(out)


def test_killed_and_run_again(files, tmp_path, out):
    big = write_text(tmp_path, train_pairs=40_000)
    arguments = [str(part) for option in big.items() for part in option]
    command = [sys.executable, "-m", "examples.wmt14.prepare", "--preparation", "smoke", "--out", out]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--vocab-size", "150", *arguments],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    part = out.with_name("out.partial")
    while not (part.exists() and any(part.glob("train.*"))) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert part.exists() and not out.exists()
    prepare(out, big)
    assert len(tokens_of(out)) == 40_000


def test_the_same_again_is_done_before_it_starts(files, out, capsys):
    prepare(out, files)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    prepare(out, files)
    assert "made before" in capsys.readouterr().out
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(SystemExit, match="was made with other vocab_size"):
        prepare(out, files, "--vocab-size", "140")
    files["--train-source"].write_bytes(files["--train-source"].read_bytes().replace(b"dog", b"cat"))
    with pytest.raises(SystemExit, match="was made with other inputs_sha256"):
        prepare(out, files)
    (out / "preparation.json").unlink()
    with pytest.raises(SystemExit, match="must not exist, or have been made by this command"):
        prepare(out, files)


# ---- how text is written ----


def test_lower_case_and_moses(files, out):
    prepare(out, files, "--lowercase", "--moses")
    subwords = Subwords.load(out)
    target = tokens_of(out).pair(0)[1]
    expected = sentences(300, 0)["target"][0].lower()
    assert subwords.decode([target]) == [expected]
    assert subwords.decode([target], restore=False) == [expected.removesuffix(".") + " ."]
    assert subwords.encode(["The  HOUSE."]) == subwords.encode(["the house."])
    assert (out / "test.target.txt").read_text().split("\n")[0] == sentences(10, 2)["target"][0]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (TextForm("de"), "Stra\u0308\u00dfe \u00a0\u3000ist\t\x07la\u200bng ", "Strä\u00dfe ist lang"),
        (TextForm("en"), "ﬁne … ½", "ﬁne … ½"),
        (TextForm("en", lowercase=True), "ÀB", "àb"),
        (TextForm("en", moses=True), "“Don’t” – no…", '" Don \'t " - no ...'),
        (TextForm("en", moses=True), "a < b & c", "a < b & c"),
        (
            TextForm("en", is_tokenised=True),
            "It &apos;s well @-@ known , &quot; no &quot; .",
            'It\'s well-known, "no".',
        ),
    ],
)
def test_normalisation(form, text, expected):
    assert form.normalize(text) == expected


def test_tokenised_training_text(files, out):
    tokenised = [line.replace(".", " &apos; .") for line in sentences(300, 0)["source"]]
    write_lines(files["--train-source"], tokenised)
    write_lines(files["--valid-source"], ["a &apos; house."] * 20)
    prepare(out, files, "--train-is-tokenised")
    subwords = Subwords.load(out)
    decoded = subwords.decode([tokens_of(out).pair(i)[0] for i in range(300)], "source")
    assert all("&" not in line and "'" in line for line in decoded)
    assert 2 in tokens_of(out, "valid").pair(0)[0]  # the & that is in no training line


def test_unknown_characters_have_an_id(files, out):
    prepare(out, files)
    subwords = Subwords.load(out)
    [ids] = subwords.encode(["a ☃"])
    assert 2 in ids and max(ids) < subwords.vocab_size
    assert subwords.encode([]) == [] and subwords.decode([]) == []
    assert subwords.decode([[0, *subwords.encode(["the dog."])[0], 0, 0]]) == ["the dog."]


def test_subwords_are_the_same_bytes_and_ids_are_fixed():
    text = sum(sentences(200, 3).values(), [])
    first, second = (train_subwords(text, 150, 1.0) for _ in range(2))
    assert first == second
    processor = Subwords(first, TextForm("en"), TextForm("de")).processor
    assert [processor.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]


def test_subwords_keep_every_character():
    text = ["ﬁne … ½ ™ „so“", *sentences(200, 3)["source"]]
    subwords = Subwords(train_subwords(text, 120, 1.0), TextForm("en"), TextForm("de"))
    assert subwords.decode(subwords.encode(text)) == text


def test_subwords_need_a_prepared_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="was not written by prepare"):
        Subwords.load(tmp_path)


@pytest.mark.parametrize(("pairs", "sample"), [(10, 3), (10, 10), (10, 99), (1000, 7)])
def test_sample_is_even_and_of_both_sides(tmp_path, pairs, sample):
    sides = [write_lines(tmp_path / side, [f"{side}{i}" for i in range(pairs)]) for side in ("a", "b")]
    drawn = list(sample_sentences(sides, pairs, sample))
    kept = min(pairs, sample)
    assert len(drawn) == 2 * kept
    places = [int(line[1:]) for line in drawn[:kept]]
    assert [f"b{i}" for i in places] == drawn[kept:]
    assert max(b - a for a, b in zip([-1, *places], [*places, pairs], strict=True)) <= pairs // kept + 1


def test_cleaner_keeps_what_is_at_its_bounds():
    cleaner = Cleaner(TextForm("en"), TextForm("de"), max_words=4, max_ratio=2.0, max_characters=11)
    assert cleaner(b"a b c d", b"a b") == ("a b c d", "a b")
    assert cleaner(b"a b c d", b"a") == "length ratio"
    assert cleaner(b"a b c d e", b"a b c d") == "too many words"
    assert cleaner(b"abcdefghijk", b"x") == ("abcdefghijk", "x")
    assert cleaner(b"abcdefghijkl", b"x") == "too many characters"
    assert cleaner(b"a < b", b"x <y> z") == ("a < b", "x <y> z")


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
