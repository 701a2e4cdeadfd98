"""Numbers, ordinals, years, clock times and prices in English (British) and German words."""

from __future__ import annotations

ENGLISH_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
ENGLISH_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ENGLISH_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip
GERMAN_SMALL = [
    "null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
]  # fmt: skip
GERMAN_TENS = ["-", "-", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
GERMAN_ORDINALS = {1: "ersten", 3: "dritten", 7: "siebten", 8: "achten"}


def english_number(number: int) -> str:
    """`number` (1 ... 999,999) in words: 1,205 is "one thousand two hundred and five"."""
    _check(number, 1, 999_999)
    thousands, rest = divmod(number, 1000)
    words = [english_number(thousands), "thousand"] if thousands else []
    hundreds, below = divmod(rest, 100)
    words += [ENGLISH_SMALL[hundreds], "hundred"] if hundreds else []
    if below:
        words += ["and"] if words else []
        words.append(_english_below_hundred(below))
    return " ".join(words)


def english_ordinal(day: int) -> str:
    """`day` (1 ... 31) as an ordinal: "twenty-first"."""
    _check(day, 1, 31)
    tens, hyphen, last = _english_below_hundred(day).rpartition("-")
    return tens + hyphen + ENGLISH_ORDINALS.get(last, last + "th")


def english_year(year: int) -> str:
    """`year` (1100 ... 2099) as it is spoken: "nineteen eighty-four", "nineteen oh five", "two thousand and five"."""
    _check(year, 1100, 2099)
    century, below = divmod(year, 100)
    if 2000 <= year < 2010:
        return english_number(year)
    if below < 10:
        return f"{_english_below_hundred(century)} {'oh ' + ENGLISH_SMALL[below] if below else 'hundred'}"
    return f"{_english_below_hundred(century)} {_english_below_hundred(below)}"


def german_number(number: int) -> str:
    """`number` (1 ... 999,999) in one word, as in counting: "eins", "hunderteins", "tausendeinhundert"."""
    return _german_stem(number) + ("s" if number % 100 == 1 else "")


def german_ordinal(day: int) -> str:
    """`day` (1 ... 31) as a dative ordinal: "ersten", "siebten", "einundzwanzigsten"."""
    _check(day, 1, 31)
    return GERMAN_ORDINALS.get(day) or _german_below_hundred(day) + ("ten" if day < 20 else "sten")


def german_year(year: int) -> str:
    """`year` (1100 ... 2099) as it is spoken: "neunzehnhundertvierundachtzig", "zweitausendfünf"."""
    _check(year, 1100, 2099)
    if year >= 2000:
        return german_number(year)
    century, below = divmod(year, 100)
    ending = "eins" if below == 1 else _german_below_hundred(below) if below else ""
    return _german_below_hundred(century) + "hundert" + ending


def clock(hour: int, minute: int) -> tuple[str, str]:
    """The time in English and German: (3, 30) is "half past three", "halb vier"; `minute` is a multiple of 5."""
    _check(hour, 1, 12)
    if minute not in range(0, 60, 5):
        raise ValueError(f"minute: must be a multiple of 5 below 60, got {minute}")
    following = hour % 12 + 1
    this_en, next_en = ENGLISH_SMALL[hour], ENGLISH_SMALL[following]
    this_de, next_de = german_number(hour), german_number(following)
    if minute == 0:
        return f"{this_en} o'clock", f"{GERMAN_SMALL[hour]} Uhr"
    if minute == 30:
        return f"half past {this_en}", f"halb {next_de}"
    to_full_hour = min(minute, 60 - minute)
    span_en = "quarter" if to_full_hour == 15 else _english_below_hundred(to_full_hour)
    english = f"{span_en} past {this_en}" if minute < 30 else f"{span_en} to {next_en}"
    if to_full_hour == 25:
        return english, f"fünf {'vor' if minute < 30 else 'nach'} halb {next_de}"
    span_de = "Viertel" if to_full_hour == 15 else _german_below_hundred(to_full_hour)
    return english, f"{span_de} nach {this_de}" if minute < 30 else f"{span_de} vor {next_de}"


def price(euros: int, cents: int) -> tuple[str, str]:
    """The price in English and German (accusative): (3, 50) is "three euros fifty", "drei Euro fünfzig".

    Amounts that German counts with an inflected "ein" are excluded, except one euro: euros ending in 01 and one cent.
    """
    _check(euros, 0, 999_999)
    _check(cents, 0 if euros else 2, 99)
    if cents == 1 or euros > 1 and euros % 100 == 1:
        raise ValueError(f"price: amounts ending in one are not written, got {euros} euros and {cents} cents")
    if not euros:
        return f"{english_number(cents)} cents", f"{german_number(cents)} Cent"
    english = "one euro" if euros == 1 else f"{english_number(euros)} euros"
    german = "einen Euro" if euros == 1 else f"{german_number(euros)} Euro"
    return (f"{english} {english_number(cents)}", f"{german} {german_number(cents)}") if cents else (english, german)


def _english_below_hundred(number: int) -> str:
    if number < 20:
        return ENGLISH_SMALL[number]
    tens, units = divmod(number, 10)
    return f"{ENGLISH_TENS[tens]}-{ENGLISH_SMALL[units]}" if units else ENGLISH_TENS[tens]


def _german_below_hundred(number: int) -> str:
    if number < 20:
        return GERMAN_SMALL[number]
    tens, units = divmod(number, 10)
    return f"{GERMAN_SMALL[units]}und{GERMAN_TENS[tens]}" if units else GERMAN_TENS[tens]


def _german_stem(number: int) -> str:
    """The number without the final "s" of "eins"; a leading "ein" before "hundert" and "tausend" is left out."""
    _check(number, 1, 999_999)
    thousands, rest = divmod(number, 1000)
    hundreds, below = divmod(rest, 100)
    word = ("" if thousands == 1 else _german_stem(thousands)) + "tausend" if thousands else ""
    if hundreds:
        word += ("" if hundreds == 1 and not word else GERMAN_SMALL[hundreds]) + "hundert"
    return word + (_german_below_hundred(below) if below else "")


def _check(number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise ValueError(f"number: must be {low} ... {high}, got {number}")
