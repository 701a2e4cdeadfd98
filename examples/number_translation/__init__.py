"""A self-made English -> German translation task: numbers, dates, clock times and prices in whole sentences.

Nothing is downloaded: a small grammar writes both sides. It is small, but it has the difficulties of real translation.
The German verb stands second, so a fronted date moves the subject behind it; participles, infinitives and separable
prefixes go to the end of the clause, and in a "dass" clause the finite verb follows them; articles, adjectives and
nouns agree in gender, case and number; units come before tens ("einundzwanzig"), and half past three is "halb vier".

    on the third of May two old women had bought forty-two apples for three euros fifty
    am dritten Mai hatten zwei alte Frauen zweiundvierzig Äpfel für drei Euro fünfzig gekauft

`numbers` spells numbers, dates and times; `lexicon` holds the words; `grammar` makes clauses of them; `sentences` draws
clauses at random; `corpus` keeps training and test sentences apart; `vocabulary` segments both languages into at most
400 shared pieces.
"""

from .corpus import draw_pairs
from .vocabulary import Vocabulary

__all__ = ["Vocabulary", "draw_pairs"]
