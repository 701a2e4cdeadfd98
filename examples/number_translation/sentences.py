"""Random sentences in both languages at once."""

from __future__ import annotations

from random import Random

from . import lexicon as lex
from .grammar import MODALS, NOTHING, Clause, Pair, Subject, conjugate, join, noun_phrase
from .numbers import (
    clock,
    english_number,
    english_ordinal,
    english_year,
    german_number,
    german_ordinal,
    german_year,
    price,
)


def sample_sentence(rng: Random) -> Pair:
    """Draws one sentence in both languages."""
    clause = sample_clause(rng)
    if rng.random() < 0.2:
        english, german = rng.choice(lex.MATRIX_CLAUSES)
        return Pair(join(english, clause.english()), join(german, clause.german_subordinate()))
    return Pair(clause.english(), clause.german())


def sample_clause(rng: Random) -> Clause:
    tense = rng.choices(["past", "past perfect", "future", *MODALS], [8, 5, 3, 2, 2])[0]
    subject = sample_subject(rng)
    verb, complements = sample_predicate(rng)
    day, time = sample_time(rng, with_year=tense != "future")
    is_fronted = bool(day.german or time.german) and rng.random() < 0.5
    return Clause(subject, conjugate(verb, tense, subject), complements, day, time, is_fronted)


def sample_subject(rng: Random) -> Subject:
    if rng.random() < 0.3:
        return Subject.of_pronoun(rng.choice(lex.PRONOUNS))
    return Subject.of_noun(*sample_noun(rng, lex.PEOPLE, lex.PEOPLE_ADJECTIVES))


def sample_predicate(rng: Random) -> tuple[lex.Verb, Pair]:
    """A verb and its complements: English object, recipient, price, place; German place, recipient, object, price."""
    kind = rng.choices(["trade", "transitive", "people", "ditransitive", "move"], [3, 3, 2, 3, 2])[0]
    if kind == "move":
        english, german = rng.choice(list(lex.CITIES.items()))
        if rng.random() < 0.5:
            return lex.ARRIVE, Pair(f"in {english}", f"in {german}")
        return lex.TRAVEL, Pair(f"to {english}", f"nach {german}")
    verb = rng.choice(lex.VERBS[kind])
    nouns = (lex.PEOPLE, lex.PEOPLE_ADJECTIVES) if kind == "people" else (lex.THINGS, lex.THING_ADJECTIVES)
    thing = noun_phrase(*sample_noun(rng, *nouns), "acc")
    recipient = cost = NOTHING
    if verb.has_recipient:
        english, german = noun_phrase(*sample_noun(rng, lex.PEOPLE, lex.PEOPLE_ADJECTIVES), "dat")
        recipient = Pair(f"to {english}", german)
    if kind == "trade" and rng.random() < 0.7:
        english, german = price(*sample_price(rng))
        cost = Pair(f"for {english}", f"für {german}")
    place = sample_place(rng)
    return verb, Pair(
        join(thing.english, recipient.english, cost.english, place.english),
        join(place.german, recipient.german, thing.german, cost.german),
    )


def sample_noun(rng: Random, nouns: list[lex.Noun], adjectives: dict[str, str]) -> tuple[lex.Noun, int, Pair, bool]:
    """A noun, how many, an adjective or none, and whether the phrase is definite."""
    adjective = Pair(*rng.choice(list(adjectives.items()))) if rng.random() < 0.4 else NOTHING
    return rng.choice(nouns), sample_count(rng), adjective, rng.random() < 0.3


def sample_time(rng: Random, with_year: bool) -> tuple[Pair, Pair]:
    """A day and a clock time, each possibly empty."""
    day = time = NOTHING
    kind = rng.choices(["none", "clock", "weekday", "date", "year"], [4, 3, 4, 7, 2 * with_year])[0]
    if kind == "weekday":
        english, german = rng.choice(list(lex.WEEKDAYS.items()))
        day = Pair(f"on {english}", f"am {german}")
    elif kind == "date":
        day = sample_date(rng, with_year)
    elif kind == "year":
        year = sample_year(rng)
        day = Pair(f"in {english_year(year)}", f"im Jahr {german_year(year)}")
    if kind == "clock" or kind in ("weekday", "date") and rng.random() < 0.4:
        english, german = clock(rng.randint(1, 12), rng.randrange(0, 60, 5))
        time = Pair(f"at {english}", f"um {german}")
    return day, time


def sample_date(rng: Random, with_year: bool) -> Pair:
    month_en, month_de, days = rng.choice(lex.MONTHS)
    day = rng.randint(1, days)
    english, german = f"on the {english_ordinal(day)} of {month_en}", f"am {german_ordinal(day)} {month_de}"
    if with_year and rng.random() < 0.3:
        year = sample_year(rng)
        return Pair(f"{english} {english_year(year)}", f"{german} {german_year(year)}")
    return Pair(english, german)


def sample_year(rng: Random) -> int:
    return rng.choice([rng.randint(1100, 1999), rng.randint(1900, 2029)])


def sample_count(rng: Random) -> int:
    """A random number in 1 ... 999,999, often a small one, never 101, 201 ..., where German would inflect "ein"."""
    limit = rng.choices([1, 12, 99, 999, 999_999], [2, 4, 4, 2, 1])[0]
    count = rng.randint(1, limit)
    return count if count % 100 != 1 or count == 1 else count + 1


def sample_price(rng: Random) -> tuple[int, int]:
    """A random price, (euros, cents)."""
    kind = rng.choices(["cents", "euros", "both"], [1, 2, 5])[0]
    if kind == "cents":
        return 0, rng.randint(2, 99)
    return (sample_count(rng), 0) if kind == "euros" else (rng.randint(1, 99), rng.randint(2, 99))


def sample_place(rng: Random) -> Pair:
    kind = rng.choices(["none", "city", "place", "room"], [12, 3, 4, 2])[0]
    if kind == "city":
        english, german = rng.choice(list(lex.CITIES.items()))
        return Pair(f"in {english}", f"in {german}")
    if kind == "place":
        return Pair(*rng.choice(list(lex.PLACES.items())))
    if kind == "room":
        number = rng.randint(1, 999)
        return Pair(f"in room {english_number(number)}", f"in Zimmer {german_number(number)}")
    return NOTHING
