"""Reversible segmentation of both languages into one shared vocabulary of morphemes.

A word is split into the fewest pieces of a fixed inventory. The first piece of every word carries the mark "▁", so
joining pieces and turning marks into spaces restores the text exactly, capital letters and umlauts included:

    "am einundzwanzigsten März" -> ▁am ▁ein und zwanzig sten ▁März
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

WORD_MARK = "▁"
PAD, EOS = "<pad>", "</s>"

FIRST_PIECES = """
one two three four five six seven eight nine ten eleven twelve thir four fif six seven eigh nine twen for
first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth hundred thousand and oh
I he she we they the to at on in of for up along past half quarter o'clock euro euros cents room will had
wanted think knew heard that newspaper writes
man men woman women child girl boy farmer guest sister brother person people
apple book flower letter egg chair car bottle picture fish lamp glass hat
old new small big beautiful young red green white
buy bought order lose lost bring brought unpack see saw seen find found count pick give gave show shown send sent
sell sold arrive travel
Mon Tues Wednes Thurs Fri Satur Sun
January February March April May June July August September October November December
Berlin Munich Cologne Vienna Zurich market city station garden
ein zwei drei vier fünf sech sieb acht neun zehn elf zwölf zwan hundert tausend ersten dritten halb
Uhr Viertel nach vor um am im auf aus mit ab an in für Euro Cent Jahr Zimmer
ich er sie wir der die das dem den dass glaube wusste hörten Zeitung schreibt
Mann Männer Frau Kind Mädchen Junge Bauer Gast Gäste Schwester Bruder Brüder Person Leute
Apfel Äpfel Buch Bücher Blume Brief Ei Stuhl Stühle Auto Flasche Bild Fisch Lampe Glas Gläser Hut Hüte
alt neu klein groß schön jung rot grün weiß
kauf bestell verlier verlor seh sah find fand zähl hol brach pack geb gab zeig schick reis kam ver
ge hatte war werde wird musste wollte
Mon Diens Mittwoch Donners Frei Sams Sonn
Januar Februar März Mai Juni Juli Oktober Dezember München Köln Wien Zürich Markt Stadt Bahnhof Garten
"""

INNER_PIECES = """
teen ty th tieth day s es d ed led ren n ,
-one -two -three -four -five -six -seven -eight -nine -first -second -third -fourth -fifth -sixth -seventh -eighth
-ninth
eins ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf zwan zig ßig sech sieb und hundert tausend
tag sten ten te t e en er em r
bring hol pack komm kam kauf ge brach seh fund zähl geb zeig schick reis
"""


def default_pieces() -> list[str]:
    """Padding, the end of a sentence, and the inventory of both languages, without duplicates."""
    first_pieces = [WORD_MARK + piece for piece in FIRST_PIECES.split()]
    return [PAD, EOS, *dict.fromkeys(first_pieces + INNER_PIECES.split())]


class Vocabulary:
    """The pieces of both languages with their ids: 0 is padding, 1 ends a sentence.

    Args:
        pieces: list of str, the id of a piece is its place; default: the inventory of this module.
    """

    pad_id, eos_id = 0, 1

    def __init__(self, pieces: Iterable[str] | None = None) -> None:
        self.pieces = list(pieces or default_pieces())
        self.ids = {piece: index for index, piece in enumerate(self.pieces) if piece not in (PAD, EOS)}
        self._longest = max(map(len, self.ids))
        self._split = lru_cache(maxsize=None)(self._fewest_pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def split(self, text: str) -> list[str]:
        """The pieces of `text`, words separated by single spaces. Raises ValueError for a word nothing spells."""
        return [piece for word in text.split(" ") for piece in self._split(word)] if text else []

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of `text`, without the end mark."""
        return [self.ids[piece] for piece in self.split(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of piece `ids`, exactly; padding and end marks are left out."""
        pieces = [self.pieces[index] for index in ids if index not in (self.pad_id, self.eos_id)]
        return "".join(pieces).replace(WORD_MARK, " ").removeprefix(" ")

    def _fewest_pieces(self, word: str) -> tuple[str, ...]:
        """Splits one word; of equally short splits, the one with the longest last piece."""
        marked = WORD_MARK + word
        best: dict[int, tuple[str, ...]] = {0: ()}
        for end in range(2, len(marked) + 1):
            starts = [start for start in range(max(0, end - self._longest), end) if start in best]
            splits = [(*best[start], marked[start:end]) for start in starts if marked[start:end] in self.ids]
            if splits:
                best[end] = min(splits, key=len)
        if len(marked) not in best or WORD_MARK in word:
            raise ValueError(f"text: no pieces spell the word {word!r}")
        return best[len(marked)]
