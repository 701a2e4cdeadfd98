"""The words of the task in both languages, with the forms the grammar needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun of both languages; `oblique` is the accusative and dative singular where it differs (weak masculines)."""

    english: str
    english_plural: str
    gender: str
    german: str
    german_plural: str
    oblique: str = ""

    def form(self, case: str, is_plural: bool) -> str:
        """The German form in `case` (nom, acc, dat)."""
        if not is_plural:
            return self.german if case == "nom" else self.oblique or self.german
        takes_n = case == "dat" and self.german_plural[-1] not in "ns"
        return self.german_plural + "n" * takes_n


@dataclass(frozen=True)
class Verb:
    """A verb of both languages; `prefix` is the separable one, `auxiliary` builds the past perfect."""

    english: str
    english_past: str
    english_participle: str
    infinitive: str
    past: str
    participle: str
    particle: str = ""
    prefix: str = ""
    auxiliary: str = "hatte"
    has_recipient: bool = False


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun as subject, with the form of "werden" that it takes."""

    english: str
    german: str
    is_plural: bool
    future: str


PEOPLE = [
    Noun("man", "men", "m", "Mann", "Männer"),
    Noun("woman", "women", "f", "Frau", "Frauen"),
    Noun("child", "children", "n", "Kind", "Kinder"),
    Noun("girl", "girls", "n", "Mädchen", "Mädchen"),
    Noun("boy", "boys", "m", "Junge", "Jungen", oblique="Jungen"),
    Noun("farmer", "farmers", "m", "Bauer", "Bauern", oblique="Bauern"),
    Noun("guest", "guests", "m", "Gast", "Gäste"),
    Noun("sister", "sisters", "f", "Schwester", "Schwestern"),
    Noun("brother", "brothers", "m", "Bruder", "Brüder"),
    Noun("person", "people", "f", "Person", "Leute"),
]
THINGS = [
    Noun("apple", "apples", "m", "Apfel", "Äpfel"),
    Noun("book", "books", "n", "Buch", "Bücher"),
    Noun("flower", "flowers", "f", "Blume", "Blumen"),
    Noun("letter", "letters", "m", "Brief", "Briefe"),
    Noun("egg", "eggs", "n", "Ei", "Eier"),
    Noun("chair", "chairs", "m", "Stuhl", "Stühle"),
    Noun("car", "cars", "n", "Auto", "Autos"),
    Noun("bottle", "bottles", "f", "Flasche", "Flaschen"),
    Noun("picture", "pictures", "n", "Bild", "Bilder"),
    Noun("fish", "fish", "m", "Fisch", "Fische"),
    Noun("lamp", "lamps", "f", "Lampe", "Lampen"),
    Noun("glass", "glasses", "n", "Glas", "Gläser"),
    Noun("hat", "hats", "m", "Hut", "Hüte"),
]

PEOPLE_ADJECTIVES = {"old": "alt", "young": "jung", "small": "klein", "big": "groß"}
THING_ADJECTIVES = {
    "old": "alt", "new": "neu", "small": "klein", "big": "groß", "beautiful": "schön",
    "red": "rot", "green": "grün", "white": "weiß",
}  # fmt: skip

TRANSITIVE = [
    Verb("lose", "lost", "lost", "verlieren", "verlor", "verloren"),
    Verb("bring", "brought", "brought", "mitbringen", "brachte", "mitgebracht", particle="along", prefix="mit"),
    Verb("unpack", "unpacked", "unpacked", "auspacken", "packte", "ausgepackt", prefix="aus"),
]
WITH_PEOPLE = [
    Verb("see", "saw", "seen", "sehen", "sah", "gesehen"),
    Verb("find", "found", "found", "finden", "fand", "gefunden"),
    Verb("count", "counted", "counted", "zählen", "zählte", "gezählt"),
    Verb("pick", "picked", "picked", "abholen", "holte", "abgeholt", particle="up", prefix="ab"),
]
VERBS = {  # by the kinds of their complements
    "trade": [
        Verb("buy", "bought", "bought", "kaufen", "kaufte", "gekauft"),
        Verb("order", "ordered", "ordered", "bestellen", "bestellte", "bestellt"),
        Verb("sell", "sold", "sold", "verkaufen", "verkaufte", "verkauft", has_recipient=True),
    ],
    "transitive": TRANSITIVE + WITH_PEOPLE,
    "people": WITH_PEOPLE,
    "ditransitive": [
        Verb("give", "gave", "given", "geben", "gab", "gegeben", has_recipient=True),
        Verb("show", "showed", "shown", "zeigen", "zeigte", "gezeigt", has_recipient=True),
        Verb("send", "sent", "sent", "schicken", "schickte", "geschickt", has_recipient=True),
    ],
}
ARRIVE = Verb("arrive", "arrived", "arrived", "ankommen", "kam", "angekommen", prefix="an", auxiliary="war")
TRAVEL = Verb("travel", "travelled", "travelled", "reisen", "reiste", "gereist", auxiliary="war")

PRONOUNS = [
    Pronoun("I", "ich", False, "werde"),
    Pronoun("he", "er", False, "wird"),
    Pronoun("she", "sie", False, "wird"),
    Pronoun("we", "wir", True, "werden"),
    Pronoun("they", "sie", True, "werden"),
]
MATRIX_CLAUSES = [
    ("I think that", "ich glaube, dass"),
    ("he knew that", "er wusste, dass"),
    ("we heard that", "wir hörten, dass"),
    ("the newspaper writes that", "die Zeitung schreibt, dass"),
]

WEEKDAYS = {
    "Monday": "Montag", "Tuesday": "Dienstag", "Wednesday": "Mittwoch", "Thursday": "Donnerstag", "Friday": "Freitag",
    "Saturday": "Samstag", "Sunday": "Sonntag",
}  # fmt: skip
MONTHS = [  # English, German, days
    ("January", "Januar", 31), ("February", "Februar", 29), ("March", "März", 31), ("April", "April", 30),
    ("May", "Mai", 31), ("June", "Juni", 30), ("July", "Juli", 31), ("August", "August", 31),
    ("September", "September", 30), ("October", "Oktober", 31), ("November", "November", 30),
    ("December", "Dezember", 31),
]  # fmt: skip
CITIES = {"Berlin": "Berlin", "Munich": "München", "Cologne": "Köln", "Vienna": "Wien", "Zurich": "Zürich"}
PLACES = {
    "at the market": "auf dem Markt",
    "in the city": "in der Stadt",
    "at the station": "am Bahnhof",
    "in the garden": "im Garten",
}

# gender -> case -> definite article, indefinite article, adjective ending after each
ARTICLES = {
    "m": {"nom": ("der", "ein", "e", "er"), "acc": ("den", "einen", "en", "en"), "dat": ("dem", "einem", "en", "en")},
    "f": {"nom": ("die", "eine", "e", "e"), "acc": ("die", "eine", "e", "e"), "dat": ("der", "einer", "en", "en")},
    "n": {"nom": ("das", "ein", "e", "es"), "acc": ("das", "ein", "e", "es"), "dat": ("dem", "einem", "en", "en")},
}
PLURAL_ARTICLES = {"nom": "die", "acc": "die", "dat": "den"}
PLURAL_ENDINGS = {"nom": "e", "acc": "e", "dat": "en"}  # after a number; after the article always "en"
