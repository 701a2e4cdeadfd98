"""The self-made translation task of the examples: numbers, grammar, vocabulary and corpus."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from number_translation import Vocabulary, corpus, grammar, lexicon, numbers, sentences
from number_translation.grammar import NOTHING, Pair, Subject

VOCABULARY = Vocabulary()


# ---- numbers ----


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (1, "one", "eins"),
        (6, "six", "sechs"),
        (7, "seven", "sieben"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (20, "twenty", "zwanzig"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (42, "forty-two", "zweiundvierzig"),
        (66, "sixty-six", "sechsundsechzig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (100, "one hundred", "hundert"),
        (101, "one hundred and one", "hunderteins"),
        (116, "one hundred and sixteen", "hundertsechzehn"),
        (305, "three hundred and five", "dreihundertfünf"),
        (701, "seven hundred and one", "siebenhunderteins"),
        (1000, "one thousand", "tausend"),
        (1001, "one thousand and one", "tausendeins"),
        (1100, "one thousand one hundred", "tausendeinhundert"),
        (1234, "one thousand two hundred and thirty-four", "tausendzweihundertvierunddreißig"),
        (21_000, "twenty-one thousand", "einundzwanzigtausend"),
        (101_000, "one hundred and one thousand", "hunderteintausend"),
        (130_017, "one hundred and thirty thousand and seventeen", "hundertdreißigtausendsiebzehn"),
        (
            243_517,
            "two hundred and forty-three thousand five hundred and seventeen",
            "zweihundertdreiundvierzigtausendfünfhundertsiebzehn",
        ),
        (
            999_999,
            "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
            "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
        ),
    ],
)
def test_number(number, english, german):
    assert numbers.english_number(number) == english
    assert numbers.german_number(number) == german


@pytest.mark.parametrize(
    ("day", "english", "german"),
    [
        (1, "first", "ersten"),
        (2, "second", "zweiten"),
        (3, "third", "dritten"),
        (5, "fifth", "fünften"),
        (7, "seventh", "siebten"),
        (8, "eighth", "achten"),
        (9, "ninth", "neunten"),
        (12, "twelfth", "zwölften"),
        (16, "sixteenth", "sechzehnten"),
        (19, "nineteenth", "neunzehnten"),
        (20, "twentieth", "zwanzigsten"),
        (21, "twenty-first", "einundzwanzigsten"),
        (27, "twenty-seventh", "siebenundzwanzigsten"),
        (30, "thirtieth", "dreißigsten"),
    ],
)
def test_ordinal(day, english, german):
    assert (numbers.english_ordinal(day), numbers.german_ordinal(day)) == (english, german)


@pytest.mark.parametrize(
    ("year", "english", "german"),
    [
        (1100, "eleven hundred", "elfhundert"),
        (1517, "fifteen seventeen", "fünfzehnhundertsiebzehn"),
        (1901, "nineteen oh one", "neunzehnhunderteins"),
        (1905, "nineteen oh five", "neunzehnhundertfünf"),
        (1984, "nineteen eighty-four", "neunzehnhundertvierundachtzig"),
        (2000, "two thousand", "zweitausend"),
        (2001, "two thousand and one", "zweitausendeins"),
        (2024, "twenty twenty-four", "zweitausendvierundzwanzig"),
    ],
)
def test_year(year, english, german):
    assert (numbers.english_year(year), numbers.german_year(year)) == (english, german)


@pytest.mark.parametrize(
    ("hour", "minute", "english", "german"),
    [
        (1, 0, "one o'clock", "ein Uhr"),
        (3, 0, "three o'clock", "drei Uhr"),
        (1, 10, "ten past one", "zehn nach eins"),
        (6, 15, "quarter past six", "Viertel nach sechs"),
        (3, 25, "twenty-five past three", "fünf vor halb vier"),
        (3, 30, "half past three", "halb vier"),
        (12, 30, "half past twelve", "halb eins"),
        (3, 35, "twenty-five to four", "fünf nach halb vier"),
        (12, 40, "twenty to one", "zwanzig vor eins"),
        (4, 45, "quarter to five", "Viertel vor fünf"),
        (9, 55, "five to ten", "fünf vor zehn"),
    ],
)
def test_clock(hour, minute, english, german):
    assert numbers.clock(hour, minute) == (english, german)


@pytest.mark.parametrize(
    ("euros", "cents", "english", "german"),
    [
        (3, 50, "three euros fifty", "drei Euro fünfzig"),
        (1, 20, "one euro twenty", "einen Euro zwanzig"),
        (0, 99, "ninety-nine cents", "neunundneunzig Cent"),
        (12, 0, "twelve euros", "zwölf Euro"),
        (1, 0, "one euro", "einen Euro"),
    ],
)
def test_price(euros, cents, english, german):
    assert numbers.price(euros, cents) == (english, german)


def test_numbers_out_of_range_are_refused():
    for function, value in (
        (numbers.english_number, 0),
        (numbers.german_number, 1_000_000),
        (numbers.german_ordinal, 32),
        (numbers.english_year, 1099),
    ):
        with pytest.raises(ValueError, match=f"got {value}"):
            function(value)
    with pytest.raises(ValueError, match="minute: must be a multiple of 5 below 60, got 7"):
        numbers.clock(3, 7)
    with pytest.raises(ValueError, match="got 101 euros"):
        numbers.price(101, 0)


# ---- grammar ----

NOUNS = {noun.english: noun for noun in lexicon.PEOPLE + lexicon.THINGS}
VERBS = {verb.english: verb for verbs in (*lexicon.VERBS.values(), [lexicon.ARRIVE, lexicon.TRAVEL]) for verb in verbs}
PRONOUNS = {pronoun.english: pronoun for pronoun in lexicon.PRONOUNS}
OLD, RED = Pair("old", "alt"), Pair("red", "rot")


@pytest.mark.parametrize(
    ("noun", "count", "adjective", "is_definite", "case", "expected"),
    [
        ("apple", 1, RED, False, "acc", ("one red apple", "einen roten Apfel")),
        ("apple", 1, RED, True, "acc", ("the red apple", "den roten Apfel")),
        ("apple", 42, RED, False, "acc", ("forty-two red apples", "zweiundvierzig rote Äpfel")),
        ("apple", 3, RED, True, "acc", ("the three red apples", "die drei roten Äpfel")),
        ("book", 1, RED, False, "acc", ("one red book", "ein rotes Buch")),
        ("flower", 1, RED, False, "acc", ("one red flower", "eine rote Blume")),
        ("man", 1, OLD, False, "nom", ("one old man", "ein alter Mann")),
        ("man", 1, OLD, True, "nom", ("the old man", "der alte Mann")),
        ("woman", 1, OLD, False, "dat", ("one old woman", "einer alten Frau")),
        ("woman", 2, OLD, False, "dat", ("two old women", "zwei alten Frauen")),
        ("child", 5, NOTHING, True, "dat", ("the five children", "den fünf Kindern")),
        ("boy", 1, OLD, True, "nom", ("the old boy", "der alte Junge")),
        ("boy", 1, OLD, True, "acc", ("the old boy", "den alten Jungen")),
        ("farmer", 1, NOTHING, False, "dat", ("one farmer", "einem Bauern")),
        ("girl", 1, OLD, False, "dat", ("one old girl", "einem alten Mädchen")),
        ("person", 7, NOTHING, False, "dat", ("seven people", "sieben Leuten")),
    ],
)
def test_noun_phrase_agrees_in_gender_case_and_number(noun, count, adjective, is_definite, case, expected):
    assert grammar.noun_phrase(NOUNS[noun], count, adjective, is_definite, case) == expected


def _clause(subject, verb, tense, complements, day=NOTHING, clock=NOTHING, is_time_fronted=False):
    is_pronoun = isinstance(subject, str)
    subject = Subject.of_pronoun(PRONOUNS[subject]) if is_pronoun else Subject.of_noun(NOUNS[subject[0]], *subject[1:])
    group = grammar.conjugate(VERBS[verb], tense, subject)
    return grammar.Clause(subject, group, Pair(*complements), Pair(*day), Pair(*clock), is_time_fronted)


MONDAY, HALF_PAST_THREE = ("on Monday", "am Montag"), ("at half past three", "um halb vier")
FORTY_TWO_APPLES = ("forty-two apples", "zweiundvierzig Äpfel")
MARCH_21 = ("on the twenty-first of March", "am einundzwanzigsten März")


@pytest.mark.parametrize(
    ("clause", "english", "german", "subordinate"),
    [
        (
            _clause(("person", 305), "buy", "past", FORTY_TWO_APPLES, MARCH_21, NOTHING, True),
            "on the twenty-first of March three hundred and five people bought forty-two apples",
            "am einundzwanzigsten März kauften dreihundertfünf Leute zweiundvierzig Äpfel",
            "am einundzwanzigsten März dreihundertfünf Leute zweiundvierzig Äpfel kauften",
        ),
        (
            _clause(("woman", 2, OLD), "buy", "past perfect", ("one hat", "einen Hut"), MONDAY, HALF_PAST_THREE),
            "two old women had bought one hat at half past three on Monday",
            "zwei alte Frauen hatten am Montag um halb vier einen Hut gekauft",
            "zwei alte Frauen am Montag um halb vier einen Hut gekauft hatten",
        ),
        (
            _clause("he", "pick", "past", ("the boy", "den Jungen"), MONDAY, HALF_PAST_THREE, True),
            "on Monday at half past three he picked up the boy",
            "am Montag um halb vier holte er den Jungen ab",
            "er am Montag um halb vier den Jungen abholte",
        ),
        (
            _clause("I", "arrive", "future", ("in Munich", "in München"), MONDAY),
            "I will arrive in Munich on Monday",
            "ich werde am Montag in München ankommen",
            "ich am Montag in München ankommen werde",
        ),
        (
            _clause("they", "travel", "past perfect", ("to Vienna", "nach Wien")),
            "they had travelled to Vienna",
            "sie waren nach Wien gereist",
            "sie nach Wien gereist waren",
        ),
        (
            _clause(("child", 1), "bring", "wanted to", ("two eggs", "zwei Eier"), NOTHING, HALF_PAST_THREE, True),
            "at half past three one child wanted to bring along two eggs",
            "um halb vier wollte ein Kind zwei Eier mitbringen",
            "um halb vier ein Kind zwei Eier mitbringen wollte",
        ),
        (
            _clause("we", "see", "past", ("the farmer", "den Bauern")),
            "we saw the farmer",
            "wir sahen den Bauern",
            "wir den Bauern sahen",
        ),
        (
            _clause("she", "give", "had to", ("one car to the boys", "den Jungen ein Auto")),
            "she had to give one car to the boys",
            "sie musste den Jungen ein Auto geben",
            "sie den Jungen ein Auto geben musste",
        ),
    ],
)
def test_clause_orders_its_words(clause, english, german, subordinate):
    assert clause.english() == english
    assert clause.german() == german
    assert clause.german_subordinate() == subordinate


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_sentences_have_one_translation_each_and_fit_the_model(seed):
    pair = sentences.sample_sentence(Random(seed))
    assert pair == sentences.sample_sentence(Random(seed))
    for text in pair:
        assert text == " ".join(text.split())
        assert 2 <= len(VOCABULARY.encode(text)) < 100


def test_no_english_sentence_has_two_translations():
    rng = Random(3)
    translations = {}
    for english, german in (sentences.sample_sentence(rng) for _ in range(20_000)):
        assert translations.setdefault(english, german) == german


# ---- vocabulary and corpus ----


def test_vocabulary_is_small_and_shared():
    assert len(VOCABULARY) <= 400
    assert len(set(VOCABULARY.pieces)) == len(VOCABULARY)
    assert VOCABULARY.split("am einundzwanzigsten März") == ["▁am", "▁ein", "und", "zwan", "zig", "sten", "▁März"]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_segmentation_of_sentences_is_reversible(seed):
    for text in sentences.sample_sentence(Random(seed)):
        assert VOCABULARY.decode([*VOCABULARY.encode(text), VOCABULARY.eos_id, VOCABULARY.pad_id]) == text


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 999_999))
def test_segmentation_of_numbers_is_reversible(number):
    for text in (numbers.english_number(number), numbers.german_number(number)):
        assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


@settings(max_examples=300, deadline=None)
@example("am</s>")
@example("<pad>")
@example("am▁am")
@given(st.lists(st.sampled_from([*VOCABULARY.pieces, " ", "▁", "ß", "x"]), max_size=6).map("".join))
def test_segmentation_is_reversible_or_refused(text):
    try:
        ids = VOCABULARY.encode(text)
    except ValueError as error:
        assert "no pieces spell the word" in str(error)
    else:
        assert VOCABULARY.decode(ids) == text


def test_segmentation_refuses_what_it_cannot_spell():
    with pytest.raises(ValueError, match="no pieces spell the word 'zebra'"):
        VOCABULARY.encode("one zebra")


def test_training_and_test_sentences_never_meet():
    training, test = corpus.draw_pairs(5_000, seed=1), corpus.draw_pairs(500, seed=1, test=True)
    assert len({english for english, _ in training}) == 5_000
    assert len({english for english, _ in test}) == 500
    assert not {english for english, _ in training} & {english for english, _ in test}
    assert not any(corpus.is_test_sentence(english) for english, _ in corpus.draw_pairs(5_000, seed=2))
    assert all(corpus.is_test_sentence(english) for english, _ in test)
    assert corpus.draw_pairs(50, seed=1) == corpus.draw_pairs(50, seed=1) != corpus.draw_pairs(50, seed=2)
