"""Scores, step by step, on tables of tokens made by hand."""

from __future__ import annotations

import json
import math

import pytest

from examples.wmt14 import score
from examples.wmt14.score import moses_tokens, paper_tokens, plain_quotes, split_compounds


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("„Nein“, sagte er.", '"Nein", sagte er.'),
        ("»Ja« und «oui»", '"Ja" und "oui"'),
        ("“a” ‟b″", '"a" "b"'),
        ("‚so‘ isn’t ‹x›", "'so' isn't 'x'"),
        ('"plain" – 5 Grad', '"plain" – 5 Grad'),
    ],
)
def test_plain_quotes(text, plain):
    assert plain_quotes(text) == plain


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Das ist gut.", "Das ist gut ."),
        ("z.B. am 3. Mai, 1.000,5 Euro!", "z.B. am 3. Mai , 1.000,5 Euro !"),
        ('Er sagte: "Ja & nein".', "Er sagte : &quot; Ja &amp; nein &quot; ."),
        ("Nord-Süd-Gefälle (groß)", "Nord-Süd-Gefälle ( groß )"),
        ("", ""),
    ],
)
def test_moses_tokens(text, tokens):
    assert moses_tokens(text, "de") == tokens


def test_moses_tokens_know_the_language():
    assert moses_tokens("l'eau", "fr") == "l&apos; eau"
    assert moses_tokens("l'eau", "de") == "l &apos; eau"


@pytest.mark.parametrize(
    ("tokens", "split"),
    [
        ("Nord-Süd", "Nord ##AT##-##AT## Süd"),
        ("ab-cd-ef", "ab ##AT##-##AT## cd ##AT##-##AT## ef"),
        ("a-b-c", "a ##AT##-##AT## b-c"),  # matches do not overlap
        ("a-b-c-d", "a ##AT##-##AT## b-c ##AT##-##AT## d"),
        ("a--b", "a ##AT##-##AT## -b"),
        ("- a - -b c-", "- a - -b c-"),
        ("1-2 – x", "1 ##AT##-##AT## 2 – x"),
        ("é-ü", "é ##AT##-##AT## ü"),
    ],
)
def test_split_compounds(tokens, split):
    assert split_compounds(tokens) == split


def test_paper_tokens():
    text = "Die „U-Bahn-Station“ kostet 2-3 Mio. Euro."
    at = "##AT##-##AT##"
    expected = f"Die &quot; U {at} Bahn {at} Station &quot; kostet 2 {at} 3 Mio. Euro ."
    assert paper_tokens(text) == expected


# Hypothesis, reference and the tokens both metrics see: 13a keeps hyphens between letters and typographic quotes.
TOKENS = [
    ("13a", "Das ist der U-Bahn-Plan.", ["Das", "ist", "der", "U-Bahn-Plan", "."]),
    ("intl", "Das ist der U-Bahn-Plan.", ["Das", "ist", "der", "U", "-", "Bahn", "-", "Plan", "."]),
    ("13a", "Ein „Wort“, 3,5-mal", ["Ein", "„Wort“", ",", "3,5", "-", "mal"]),
    ("intl", "Ein „Wort“, 3,5-mal", ["Ein", "„", "Wort", "“", ",", "3,5", "-", "mal"]),
    ("13a", "5€ & 7%", ["5€", "&", "7", "%"]),
    ("intl", "5€ & 7%", ["5", "€", "&", "7%"]),
]


@pytest.mark.parametrize(("tokenize", "text", "tokens"), TOKENS)
def test_13a_against_intl(tokenize, text, tokens):
    """Tokens are counted, and those that match a reference with spaces between them."""
    spaced = " ".join(tokens)
    (row,) = score.score([text], [spaced], "de", [tokenize])
    assert row.value == pytest.approx(100)
    assert row.details.endswith(f"lengths {len(tokens)} {len(tokens)}")
    assert f"tok:{tokenize}|" in row.signature and "case:mixed" in row.signature


def plain_bleu(hypotheses, references):
    """BLEU of lists of tokens, by the definition of BLEU."""
    matches, totals = [0] * 4, [0] * 4
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for n in range(1, 5):
            grams = [tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1)]
            others = [tuple(reference[i : i + n]) for i in range(len(reference) - n + 1)]
            matches[n - 1] += sum(min(grams.count(gram), others.count(gram)) for gram in set(grams))
            totals[n - 1] += len(grams)
    if not all(matches):
        return 0.0
    lengths = (sum(map(len, side)) for side in (hypotheses, references))
    hypothesis_length, reference_length = lengths
    penalty = min(0.0, 1 - reference_length / hypothesis_length)
    return 100 * math.exp(penalty + sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)


HYPOTHESES = ["Die „Nord-Süd“-Achse ist sehr lang.", "Am 3. Mai fuhr er mit der U-Bahn nach Hause."]
REFERENCES = ['Die "Nord-Süd"-Achse ist ziemlich lang.', "Am 3. Mai fuhr sie mit der S-Bahn schnell nach Hause."]


def test_the_papers_bleu_is_that_of_its_tokens():
    (row,) = score.score(HYPOTHESES, REFERENCES, "de", ["paper"])
    tokens = [[paper_tokens(line).split() for line in side] for side in (HYPOTHESES, REFERENCES)]
    assert row.value == pytest.approx(plain_bleu(*tokens))
    assert 20 < row.value < 80
    assert "tok:paper|" in row.signature and "smooth:none" in row.signature and "sacremoses:" in row.signature


def test_moses_bleu_and_case():
    rows = score.score(HYPOTHESES, [line.upper() for line in REFERENCES], "de", ["moses"], lowercase=True)
    tokens = [
        [moses_tokens(plain_quotes(line.lower()), "de").split() for line in side] for side in (HYPOTHESES, REFERENCES)
    ]
    assert rows[0].value == pytest.approx(plain_bleu(*tokens))
    assert "case:lc" in rows[0].signature


def test_an_empty_match_is_not_smoothed_away_in_multi_bleu():
    values = {row.metric: row.value for row in score.score(["a b c d"], ["a c b d"], "de")}
    assert values["moses"] == values["paper"] == 0.0
    assert values["13a"] > 0.0


def test_everything_a_language_has():
    german = score.score(HYPOTHESES, REFERENCES, "de")
    assert [row.metric for row in german] == ["13a", "intl", "chrf", "moses", "paper"]
    assert [row.metric for row in score.score(HYPOTHESES, REFERENCES, "fr")] == ["13a", "intl", "chrf", "moses"]
    values = {row.metric: row.value for row in german}
    assert values["paper"] > values["moses"] > values["13a"]  # quotes match, then hyphens
    lower = {
        row.metric: row.value for row in score.score([x.lower() for x in REFERENCES], REFERENCES, "de", None, True)
    }
    assert lower == pytest.approx(dict.fromkeys(lower, 100.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["a", "b"], "de"), "hypotheses: must be as many lines as the 2 references, got 1"),
        (([], [], "de"), "references: must hold at least one line, got none"),
        ((["a"], ["a"], "fr", ["paper"]), "'paper' splits German compounds; the language must be 'de', got 'fr'"),
        ((["a"], ["a"], "de", ["14a"]), "metrics: must be among 13a, intl, chrf, moses, paper, got '14a'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        score.score(*arguments)


# ---- the command ----


@pytest.fixture
def data(tmp_path):
    """A data folder with a filtered newstest2014 of its own."""
    (tmp_path / "preparation.json").write_text(json.dumps({"target_language": "de", "lowercase": False}))
    (tmp_path / "test.target.txt").write_text("".join(f"Zeile Nummer {n} von vielen.\n" for n in range(2737)))
    return tmp_path


def test_the_command_prints_a_table_and_names_the_set(data, capsys):
    score.main(["--data", str(data), str(data / "test.target.txt"), "--metrics", "13a,paper"])
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith(
        "13a    100.00  100.0/100.0/100.0/100.0 BP 1.000 lengths 16422 16422  nrefs:1"
    )
    assert out.splitlines()[1].startswith("paper  100.00")
    assert err == "2737 lines: as many as newstest2014, the filtered set, has\n"


@pytest.mark.parametrize(("lines", "name"), [(3003, "newstest2014, the full set"), (3000, "newstest2013"), (5, None)])
def test_json(tmp_path, capsys, lines, name):
    file = tmp_path / "lines.fr"
    file.write_text("Une ligne de plus ici\u2028\rlà.\n" * lines, newline="")
    score.main(["--references", str(file), "--language", "fr", str(file), "--json", "--metrics", "chrf"])
    result = json.loads(capsys.readouterr().out)
    assert (result["lines"], result["test_set"]) == (lines, name)
    assert result["scores"]["chrf"]["value"] == pytest.approx(100)
    assert result["scores"]["chrf"]["signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")


def test_case_follows_the_preparation(data, capsys):
    (data / "preparation.json").write_text(json.dumps({"target_language": "de", "lowercase": True}))
    (data / "out.de").write_text((data / "test.target.txt").read_text().lower())
    score.main(["--data", str(data), str(data / "out.de"), "--metrics", "13a"])
    out = capsys.readouterr().out
    assert out.startswith("13a    100.00") and "case:lc" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--references", "none.de", "--language", "de", "none.de"], "none.de"),
        (["--references", "two.fr", "--language", "fr", "--metrics", "paper", "two.fr"], "splits German compounds"),
        (["--references", "two.fr", "--language", "fr", "three.fr"], "as many lines as the 2 references, got 3"),
    ],
)
def test_errors_are_messages(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.fr").write_text("a\nb\n")
    (tmp_path / "three.fr").write_text("a\nb\nc\n")
    with pytest.raises(SystemExit) as stopped:
        score.main(arguments)
    assert message in stopped.value.code
