"""Puts words into sentences: noun phrases, verb forms and the order of the clause, in both languages at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .lexicon import ARTICLES, PLURAL_ARTICLES, PLURAL_ENDINGS, Noun, Pronoun, Verb
from .numbers import english_number, german_number

MODALS = {"had to": "musste", "wanted to": "wollte"}


class Pair(NamedTuple):
    """The same words in English and German."""

    english: str = ""
    german: str = ""


NOTHING = Pair()


@dataclass(frozen=True)
class Subject:
    """The subject with what the finite verb must know about it."""

    words: Pair
    is_plural: bool
    future: str  # its form of "werden"
    is_pronoun: bool = False

    @classmethod
    def of_pronoun(cls, pronoun: Pronoun) -> Subject:
        """A personal pronoun as subject."""
        return cls(Pair(pronoun.english, pronoun.german), pronoun.is_plural, pronoun.future, is_pronoun=True)

    @classmethod
    def of_noun(cls, noun: Noun, count: int, adjective: Pair = NOTHING, is_definite: bool = False) -> Subject:
        """A noun phrase as subject."""
        words = noun_phrase(noun, count, adjective, is_definite, "nom")
        return cls(words, count > 1, "werden" if count > 1 else "wird")


@dataclass(frozen=True)
class VerbGroup:
    """English verb group, German finite verb, and what closes the German clause (participle, infinitive or prefix)."""

    english: str
    finite: str
    closing: str
    is_separable: bool = False  # the closing prefix joins the finite verb where that stands last


@dataclass(frozen=True)
class Clause:
    """One clause; `complements` are objects, place and price, each language's in its own order."""

    subject: Subject
    verb: VerbGroup
    complements: Pair
    day: Pair = NOTHING
    clock: Pair = NOTHING
    is_time_fronted: bool = False

    def english(self) -> str:
        """Subject, verb, complements; the day before the clock in front, after it at the end."""
        core = [self.subject.words.english, self.verb.english, self.complements.english]
        if self.is_time_fronted:
            return join(self.day.english, self.clock.english, *core)
        return join(*core, self.clock.english, self.day.english)

    def german(self) -> str:
        """A main clause, verb second: one constituent, finite verb, middle field, the rest of the verb."""
        first, second = self._subject_and_time(self.is_time_fronted)
        return join(first, self.verb.finite, second, self.complements.german, self.verb.closing)

    def german_subordinate(self) -> str:
        """A subordinate clause, verb last; there a pronoun subject stays in front of the time."""
        first, second = self._subject_and_time(self.is_time_fronted and not self.subject.is_pronoun)
        verb = self.verb
        last = verb.closing + verb.finite if verb.is_separable else join(verb.closing, verb.finite)
        return join(first, second, self.complements.german, last)

    def _subject_and_time(self, is_time_first: bool) -> tuple[str, str]:
        subject, time = self.subject.words.german, join(self.day.german, self.clock.german)
        return (time, subject) if is_time_first else (subject, time)


def noun_phrase(noun: Noun, count: int, adjective: Pair, is_definite: bool, case: str) -> Pair:
    """Article or number, adjective and noun; the German agrees in gender, number and `case` (nom, acc, dat)."""
    if count == 1:
        definite, indefinite, after_definite, after_indefinite = ARTICLES[noun.gender][case]
        article = Pair("the", definite) if is_definite else Pair("one", indefinite)
        number, ending = NOTHING, after_definite if is_definite else after_indefinite
    else:
        article = Pair("the", PLURAL_ARTICLES[case]) if is_definite else NOTHING
        number = Pair(english_number(count), german_number(count))
        ending = "en" if is_definite else PLURAL_ENDINGS[case]
    english_noun = noun.english if count == 1 else noun.english_plural
    german_adjective = adjective.german + ending if adjective.german else ""
    return Pair(
        join(article.english, number.english, adjective.english, english_noun),
        join(article.german, number.german, german_adjective, noun.form(case, count > 1)),
    )


def conjugate(verb: Verb, tense: str, subject: Subject) -> VerbGroup:
    """The verb in `tense` (past, past perfect, future, or a modal of MODALS), agreeing with `subject`."""
    if tense == "past":
        is_separable = bool(verb.prefix)
        return VerbGroup(join(verb.english_past, verb.particle), agree(verb.past, subject), verb.prefix, is_separable)
    if tense == "past perfect":
        english = join("had", verb.english_participle, verb.particle)
        return VerbGroup(english, agree(verb.auxiliary, subject), verb.participle)
    infinitive = join(verb.english, verb.particle)
    if tense == "future":
        return VerbGroup(join("will", infinitive), subject.future, verb.infinitive)
    return VerbGroup(join(tense, infinitive), agree(MODALS[tense], subject), verb.infinitive)


def agree(past: str, subject: Subject) -> str:
    """The past form for `subject`; the first and the third person singular are the same."""
    ending = "n" if past.endswith("e") else "en"
    return past + ending * subject.is_plural


def join(*words: str) -> str:
    """The words that are not empty, separated by one space."""
    return " ".join(word for word in words if word)
