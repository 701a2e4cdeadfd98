"""The form of the text and its subwords: what is encoded comes back, as each preparation writes it."""

from __future__ import annotations

import pytest

from examples.wmt14.subwords import Subwords, TextForm, train_subwords
from tests.support.wmt14_text import prepare, sentences, tokens_of, write_lines


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
