"""Units of measurement: what a unit is, how it converts, and what follows a number in an answer."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_SI = {"p": -12, "n": -9, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}


def _table() -> dict[str, tuple[str, Fraction]]:
    """Name → (dimension, factor). Units that never convert are a dimension of their own."""
    table: dict[str, tuple[str, Fraction]] = {}

    def add(dimension: str, factor: str, *names: str) -> None:
        for name in names:
            table[name] = (dimension, Fraction(factor))

    def si(dimension: str, base: str, prefixes: str, factor: str = "1") -> None:
        add(dimension, factor, base)
        for prefix in prefixes:
            add(dimension, str(Fraction(factor) * Fraction(10) ** _SI[prefix]), prefix + base)

    def long(dimension: str, stem: str, factor: str = "1", *forms: str) -> None:
        for prefix, power in (
            ("", 0),
            ("kilo", 3),
            ("centi", -2),
            ("milli", -3),
            ("micro", -6),
            ("nano", -9),
            ("mega", 6),
        ):
            scaled = str(Fraction(factor) * Fraction(10) ** power)
            add(dimension, scaled, prefix + stem, prefix + stem + "s", *(prefix + form for form in forms))

    si("length", "m", "pnumcdk")
    long("length", "meter", "1", "metre", "metres")
    add("length", "0.0254", "in", "inch", "inches")
    add("length", "0.3048", "ft", "foot", "feet")
    add("length", "0.9144", "yd", "yard", "yards")
    add("length", "1609.344", "mi", "mile", "miles")
    add("length", "0.0000000001", "angstrom", "angstroms", "Å")
    add("light-year", "1", "ly", "light-year", "light-years")
    add("parsec", "1", "pc", "parsec", "parsecs")
    si("mass", "g", "umk", "0.001")
    long("mass", "gram", "0.001")
    add("mass", "1000", "ton", "tons", "tonne", "tonnes")
    add("pound", "1", "lb", "lbs", "pound", "pounds")
    add("pound", "1/16", "oz", "ounce", "ounces")
    si("time", "s", "pnum")
    add("time", "1", "sec", "secs", "second", "seconds")
    add("time", "0.001", "millisecond", "milliseconds")
    add("time", "60", "min", "mins", "minute", "minutes")
    add("time", "3600", "h", "hr", "hrs", "hour", "hours")
    add("time", "86400", "day", "days")
    add("time", "604800", "week", "weeks")
    add("month", "1", "month", "months")
    add("year", "1", "yr", "yrs", "year", "years")
    si("volume", "L", "mcd", "0.001")
    add("volume", "0.000001", "cc", "ml")
    long("volume", "liter", "0.001", "litre", "litres")
    for name in ("gallon", "quart", "pint", "cup", "acre", "bushel"):
        add(name, "1", name, name + "s")
    add("money", "1", "$", "dollar", "dollars", "usd", "USD")
    add("money", "0.01", "cent", "cents", "¢")
    add("euro", "1", "€", "euro", "euros")
    add("sterling", "1", "£")
    add("angle", "1", "°", "deg", "degree", "degrees")
    add("radian", "1", "rad", "rads", "radian", "radians")
    add("arcsecond", "1", "arcsec", "arcsecs", "arcsecond", "arcseconds")
    add("percent", "1", "%", "percent")
    for base in ("J", "W", "V", "A", "N", "Pa", "Hz", "eV", "mol", "C", "F", "H", "T", "cal"):
        si(base, base, "pnumkMG")
    for base, name in (("J", "joule"), ("W", "watt"), ("V", "volt"), ("A", "ampere"), ("N", "newton"), ("mol", "mole")):
        long(base, name)
    add("Hz", "1", "hertz")
    add("erg", "1", "erg", "ergs")
    add("K", "1", "K", "kelvin")
    add("amu", "1", "amu")
    add("dimensionless", "1", "unit", "units")
    add("am", "1", "am", "a.m.", "AM", "A.M.")
    add("pm", "1", "pm", "p.m.", "PM", "P.M.")  # the half of the day, not the picometre
    return table


_UNITS = _table()
# Counted things that questions ask for; a word of the question itself is taken for one too.
_NOUNS = frozenset(
    [
        "people",
        "students",
        "ways",
        "points",
        "numbers",
        "integers",
        "solutions",
        "pairs",
        "triples",
        "apples",
        "books",
        "pages",
        "balls",
        "cards",
        "coins",
        "games",
        "sides",
        "edges",
        "vertices",
        "faces",
        "squares",
        "triangles",
        "tiles",
        "steps",
        "moves",
        "hours",
        "boys",
        "girls",
        "men",
        "women",
        "children",
    ]
)
# Words that change the number or the claim, so never what was counted.
_NEVER = frozenset(
    "not no or and nor neither either both if is isn are about approximately maybe wrong false none to from over than "
    "half third quarter double twice dozen hundred thousand million billion trillion squared cubed factorial plus "
    "minus times more less fewer negative positive least most except unless".split()
)
_WORD = r"[A-Za-zÅ°%$€£¢][A-Za-z.\-]*|°|%"


@dataclass(frozen=True, slots=True)
class Unit:
    """dimensions: ((name, power), …) in order; factor: how many of the base unit one of it is."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction

    @property
    def is_percent(self) -> bool:
        return self.dimensions == (("percent", 1),)

    @property
    def may_be_left_out(self) -> bool:
        """Half of the day is part of the answer, a unit is not."""
        return not {"am", "pm"} & {name for name, _ in self.dimensions}


@lru_cache(maxsize=4096)
def parse_unit(text: str, question: str = "") -> Unit | None:
    """The unit that `text` is, as a product of powers: "cm", "km/h", "m s^{-1}", "square feet", "g per mole"."""
    text = text.strip().rstrip(".") if text.strip() not in _UNITS else text.strip()
    text = re.sub(r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1", text).replace("\\cdot", " ").replace("*", " ")
    text = re.sub(r"\bper\b", "/", text).replace("²", "^2").replace("³", "^3")
    powers: dict[str, int] = {}
    factor, sign, scale, seen = Fraction(1), 1, 1, False
    for token in re.findall(rf"/|(?:{_WORD})(?:\^-?\d+)?|\S", text):
        if token == "/":
            sign = -1
            continue
        name, _, power = token.partition("^")
        if name.lower().rstrip(".") in ("square", "sq", "cubic", "cu"):
            scale = 3 if name.lower().startswith("cu") else 2
            continue
        entry = (
            _UNITS.get(name) or _UNITS.get(name.rstrip(".")) or (_UNITS.get(name.lower()) if len(name) > 3 else None)
        )
        if entry is None:
            word = name.lower()
            known = word in _NOUNS or re.search(rf"\b{re.escape(word)}\b", question.lower())
            if len(word) < 3 or not word.isalpha() or word in _NEVER or not known:
                return None
            entry = (word.removesuffix("s"), Fraction(1))
        if abs(exponent := sign * (int(power) if power else scale)) > 9:
            return None
        powers[entry[0]] = powers.get(entry[0], 0) + exponent
        factor, scale, seen = factor * entry[1] ** exponent, 1, True
        # "m/s s" divides by the first only; "km per hour" by what follows it.
        sign = 1
    if not seen:
        return None
    powers.pop("dimensionless", None)
    volume = powers.pop("volume", 0)  # a litre is a cubic decimetre
    if volume:
        powers["length"] = powers.get("length", 0) + 3 * volume
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), factor)
