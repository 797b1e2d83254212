r"""Units behind a value: what they measure, and how they convert.

A unit is stripped from an answer and held against the gold answer's. Two units of the same kind convert (100 cm is
1 m); two of different kinds (5 m, 5 s) are not equal; an answer without a unit is taken to be in the unit that the
other one has, because problems state it; words that are no unit of measure ("students", "ways") name what was counted
and do not change the value.

Not covered: compound units beyond the table, prefixes beyond it, temperatures in different scales.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_KINDS: dict[str, dict[str, str]] = {
    "length": {
        "1": "m meter meters metre metres",
        "1000": "km kilometer kilometers kilometre kilometres kms",
        "1/100": "cm centimeter centimeters centimetre centimetres cms",
        "1/1000": "mm millimeter millimeters millimetre millimetres",
        "1/1000000": "um micrometer micrometers micron microns",
        "1/1000000000": "nm nanometer nanometers",
        "1/10": "dm decimeter decimeters decimetre decimetres",
        "254/10000": "in inch inches",
        "3048/10000": "ft foot feet",
        "9144/10000": "yd yard yards",
        "1609344/1000": "mi mile miles",
    },
    "mass": {
        "1": "kg kilogram kilograms kgs",
        "1/1000": "g gram grams gm",
        "1/1000000": "mg milligram milligrams",
        "1000": "tonne tonnes",
        "45359237/100000000": "lb lbs pound-mass",
        "28349523125/1000000000000": "oz ounce ounces",
    },
    "time": {
        "1": "s sec secs second seconds",
        "1/1000": "ms millisecond milliseconds",
        "60": "min mins minute minutes",
        "3600": "h hr hrs hour hours",
        "86400": "day days",
        "604800": "week weeks",
    },
    "long time": {"1": "month months", "12": "yr yrs year years"},
    "volume": {
        "1": "L l liter liters litre litres",
        "1/1000": "mL ml milliliter milliliters millilitre millilitres",
    },
    "gallons": {"1": "gal gallon gallons", "1/4": "quart quarts qt", "1/8": "pint pints"},
    "dollars": {"1": "$ dollar dollars usd", "1/100": "cent cents ¢"},
    "euros": {"1": "€ euro euros eur"},
    "pounds": {"1": "£ pound pounds gbp", "1/100": "pence"},
    "yen": {"1": "¥ yen jpy"},
    "yuan": {"1": "yuan rmb cny"},
    "rupees": {"1": "₹ rupee rupees rs inr", "1/100": "paise"},
    "speed": {"1": "m/s mps", "1000/3600": "km/h kmh kmph kph", "1609344/3600000": "mph", "1/100": "cm/s"},
    "acceleration": {"1": "m/s^2"},
    "energy": {"1": "J joule joules", "1000": "kJ kilojoule kilojoules"},
    "electronvolts": {"1": "eV", "1000": "keV", "1000000": "MeV", "1000000000": "GeV"},
    "power": {"1": "W watt watts", "1000": "kW kilowatt kilowatts"},
    "force": {"1": "N newton newtons"},
    "pressure": {"1": "Pa pascal pascals", "1000": "kPa"},
    "potential": {"1": "V volt volts"},
    "current": {"1": "A ampere amperes amps"},
    "resistance": {"1": "ohm ohms"},
    "frequency": {"1": "Hz hertz", "1000": "kHz", "1000000": "MHz"},
    "temperature": {"1": "K kelvin kelvins"},
    "celsius": {"1": "°C celsius"},
    "fahrenheit": {"1": "°F fahrenheit"},
    "angle": {"1": "° deg degree degrees", "1/60": "arcminute arcminutes", "1/3600": "arcsecond arcseconds"},
    "radians": {"1": "rad radian radians"},
    "amount": {"1": "mol mole moles"},
    "count": {"1": "dozen dozens"},
}
_TABLE = {
    word: (kind, Fraction(factor))
    for kind, factors in _KINDS.items()
    for factor, words in factors.items()
    for word in words.split()
}
_LOWER = {word.lower(): entry for word, entry in _TABLE.items() if len(word) > 2}
LETTERS = frozenset("mgsLlhNJWVAK")
"""Units of one letter, which may also be variables."""
_POWER = re.compile(
    r"(?:(sq(?:uare|\.)?|cu(?:bic|\.)?)\s+)?([^\s^]+?)(?:\s*\^\s*\{?([23])\}?|\s+(squared|cubed)|([23]))?"
)
_NO_UNIT = frozenset(
    {"units", "unit", "square units", "sq units", "cubic units", "units^2", "units^3", "unit^2", "sq. units"}
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as written, and what it measures.

    Attributes:
        words: the spelling, lower case but for the units that need capitals.
        kind: what it measures, such as "length" or "length^2"; None for words that name what was counted.
        factor: the size in the kind's base unit.
    """

    words: str
    kind: str | None
    factor: Fraction = Fraction(1)


def read_unit(words: str) -> Unit | None:
    """The unit that some words name; None for none at all ("units", "square units")."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", words)
    text = re.sub(r"\\mu\s*|[µμ]", "u", text)
    text = re.sub(r"\s+", " ", text.replace("~", " ").replace("{", "").replace("}", "").replace("\\$", "$")).strip(
        " .,;"
    )
    text = re.sub(r"\s*\^\s*", "^", re.sub(r"\s*(?:/|\bper\b)\s*", "/", text))
    if not text or text.lower() in _NO_UNIT:
        return None
    if "/" in text and (entry := _lookup(_rate(text))):
        return Unit(text, entry[0], entry[1])
    if power := _POWER.fullmatch(text):
        shape, word, exponent, spelt, digit = power.groups()
        entry = _lookup(word)
        size = int(exponent or digit or {"squared": 2, "cubed": 3}.get(spelt or "", 1))
        if shape:
            size = 2 if shape.startswith("sq") else 3
        if entry:
            kind = entry[0] if size == 1 else f"{entry[0]}^{size}"
            return Unit(text, kind, entry[1] ** size)
    if entry := _lookup(text.rsplit(" of ", 1)[0] if " of " in text else text):
        return Unit(text, entry[0], entry[1])
    return Unit(text.lower(), None)


def _rate(text: str) -> str:
    above, _, below = text.partition("/")
    short = {"hour": "h", "hours": "h", "hr": "h", "second": "s", "sec": "s", "seconds": "s", "s": "s", "h": "h"}
    names = {"kilometers": "km", "kilometer": "km", "kilometres": "km", "miles": "mi", "mile": "mi", "meters": "m"}
    names |= {"meter": "m", "metres": "m", "feet": "ft"}
    above, below = names.get(above.strip().lower(), above.strip()), short.get(below.strip(), below.strip())
    return "mph" if (above, below) == ("mi", "h") else f"{above}/{below}"


def _lookup(word: str) -> tuple[str, Fraction] | None:
    return _TABLE.get(word) or _LOWER.get(word.lower())


def is_known(word: str) -> bool:
    """Whether a word by itself is a unit of measure (with two letters or more)."""
    return len(word) > 1 and _lookup(word) is not None


def conversion(found: Unit | None, gold: Unit | None) -> Fraction | None:
    """What the found value is multiplied with before it is compared; None: the units contradict each other."""
    if found is None or gold is None or (found.kind is None and gold.kind is None):
        return Fraction(1)
    if found.kind == gold.kind:
        return found.factor / gold.factor
    return None
