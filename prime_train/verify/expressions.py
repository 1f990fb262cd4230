"""Numbers and formulas: exact rationals first, then math-verify's parser and values at random points.

Nothing here evaluates the model's text: it is read by regular expressions and by math-verify's LaTeX grammar. What
could keep sympy busy for longer than its answer is worth (towers of powers, huge exponents and factorials) is not given
to it; what still does is ended by the pool's deadline.
"""

import logging
import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

# It logs every expression that it does not understand, with a traceback.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

MAX_DIGITS = 400
MAX_DEPTH = 20
MAX_EXPONENT = 4000
_SIGNIFICANT = 6  # digits that a decimal needs to stand for a number that is none
_POINTS = 3
_PRECISION = 60  # decimal digits of the values that are compared

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:\\? \d{3})+|\d+"
_NUMBER = re.compile(rf"(?P<whole>{_INTEGER})?(?:\.(?P<part>\d*))?(?:[eE](?P<exp>[+-]?\d{{1,4}}))?", re.A)
_POWER_OF_TEN = re.compile(
    r"(.*?)\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))", re.A
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", re.A)
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_MIXED = re.compile(r"(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s+(\d+)\s*/\s*(\d+)", re.A)
# Commands of the grammar that are no variables; \pi, e and i are constants.
_NOT_VARIABLES = frozenset(
    [
        "frac",
        "sqrt",
        "cdot",
        "times",
        "pi",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "log",
        "ln",
        "exp",
        "lg",
        "binom",
        "lfloor",
        "rfloor",
        "lceil",
        "rceil",
        "pm",
        "mp",
        "infty",
        "le",
        "ge",
        "ne",
        "left",
        "right",
        "circ",
        "lvert",
        "rvert",
        "vert",
        "mid",
        "max",
        "min",
        "gcd",
        "lcm",
        "bmod",
        "div",
        "ldots",
        "cdots",
        "overline",
        "sum",
        "prod",
        "int",
        "lim",
        "to",
        "dot",
        "ddot",
        "prime",
        "choose",
        "tbinom",
        "dbinom",
        "mathbb",
    ]
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi max min gcd".split()
)


def decimal_digits(text: str) -> int | None:
    """Significant digits of a decimal number as it is written, None for anything else."""
    match = _NUMBER.fullmatch(text.strip().lstrip("+-").strip())
    if not match or (match["part"] is None and match["exp"] is None):
        return None
    return len(((match["whole"] or "") + (match["part"] or "")).replace(",", "").lstrip("0"))


@lru_cache(maxsize=8192)
def rational(text: str) -> Fraction | None:
    """Exactly 1,234, -3.5, 4.5e33, 4.5\\times 10^{33}, 7/3, \\frac{7}{3}, 137\\frac{1}{2}, 0.\\overline{3}, or None."""
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    if text[:1] in ("-", "+"):
        value = rational(text[1:]) if text[1:2] not in ("-", "+") else None
        return -value if value is not None and text[0] == "-" else value
    if match := _POWER_OF_TEN.fullmatch(text):
        mantissa = rational(match[1])
        return None if mantissa is None else mantissa * Fraction(10) ** int(match[2] or match[3])
    if match := re.fullmatch(r"10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|(\d))", text, re.A):
        return Fraction(10) ** int(match[1] or match[2])
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = (int(group) for group in match.groups() if group is not None)
        return whole + Fraction(top, bottom) if bottom and top < bottom else None
    if match := _REPEATING.fullmatch(text):
        whole_digits, fixed, repeated = match[1] or "0", match[2], match[3]
        return int(whole_digits + fixed) * Fraction(1, 10 ** len(fixed)) + Fraction(
            int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed)
        )
    if match := _FRACTION.fullmatch(text):
        return _quotient(match[1], match[2])
    if text.count("/") == 1:
        return _quotient(*text.split("/"))
    match = _NUMBER.fullmatch(text)
    if not match or not (match["whole"] or match["part"]):
        return None
    digits = re.sub(r"[,\\ ]", "", match["whole"] or "0")
    value = Fraction(f"{digits}.{match['part'] or '0'}")
    return value * Fraction(10) ** int(match["exp"] or 0)


def _quotient(top: str, bottom: str) -> Fraction | None:
    numerator, denominator = rational(top), rational(bottom)
    return numerator / denominator if numerator is not None and denominator else None


def same_number(answer: str, reference: str) -> bool | None:
    """Equal exactly, or a decimal of at least six digits that rounds the other; None if either is no number."""
    a, b = rational(answer), rational(reference)
    if a is None or b is None:
        return None
    return a == b or _rounds(answer, a, b) or _rounds(reference, b, a)


def _rounds(text: str, value: Fraction, exact: Fraction) -> bool:
    """Whether the decimal `text` is `exact`, which no decimal is, to all of its digits (six at least)."""
    digits = decimal_digits(text)
    if digits is None or digits < _SIGNIFICANT or _terminates(exact) or not exact:
        return False
    return abs(value - exact) <= abs(exact) * Fraction(10) ** (1 - digits)


def _terminates(value: Fraction) -> bool:
    denominator = value.denominator
    if denominator.bit_length() > 4 * MAX_DIGITS:
        return True
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def variables(text: str) -> frozenset[str] | None:
    """The letters and Greek letters that a formula is about; None where the text has words in it."""
    names: set[str] = set()
    for command in re.findall(r"\\([a-zA-Z]+)", text):
        if command not in _NOT_VARIABLES:
            names.add(command)
    for run in re.findall(r"[^\W\d_]+", re.sub(r"\\[a-zA-Z]+", " ", text)):
        if run in _FUNCTIONS:
            continue
        if len(run) > 4 or not run.isascii():
            return None
        names |= set(run)
    # A derivative is another quantity than what it is the derivative of.
    return frozenset(names - {"e", "i"} | {"'" * n for n in (text.count("'"),) if n})


def costly(text: str) -> bool:
    """Whether computing `text` may take longer than any answer is worth."""
    if (
        len(text) > 1000
        or _depth(text) > MAX_DEPTH
        or any(len(digits) > MAX_DIGITS for digits in re.findall(r"\d+", text))
    ):
        return True
    if re.search(r"\d\s*[)}]*\s*\^\s*[({]*\s*\d+\s*[)}]*\s*\^", text):  # a tower of numbers
        return True
    if re.search(r"\^\s*\{?\s*[({]*\d+\s*[)}]*\s*!", text) or re.search(r"!\s*[)}]*\s*(!|\^)", text):
        return True
    exponents = re.findall(r"\^\s*[({]*\s*-?\s*(\d+)", text) + re.findall(r"(\d+)\s*[)}]*\s*!", text)
    return any(int(exponent) > MAX_EXPONENT for exponent in exponents)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _readable(text: str) -> bool:
    """Only what the grammar reads: of anything else the parser would quietly take the part that it understands."""
    return (
        re.fullmatch(r"[A-Za-z0-9\s+\-*/^_(){}\[\]!.,|'\\]*", text, re.A) is not None
        and text.count("|") % 2 == 0
        and not re.search(r"\d\s*_|(?<![_\d])\d+\s+\d|\\[^a-zA-Z{}|]|\.\.|''\s*\d", text)
    )


def same_formula(answer: str, reference: str) -> bool:
    """The same variables, and the same value wherever it is tried: equality by math-verify, checked by numbers."""
    names = variables(answer)
    if names is None or names != variables(reference) or costly(answer):
        return False
    ours, theirs = parse(answer), parse(reference)
    if ours is None or theirs is None:
        return False
    near = _near(ours, theirs, answer, reference)
    if near is not None:
        return near
    # Values cannot be had (an unknown function, say): then what math-verify finds equal symbol by symbol.
    try:
        return bool(math_verify.verify(theirs, ours, strict=True, timeout_seconds=None))
    except Exception:
        return False


def proportional(answer: str, reference: str) -> bool:
    """Whether two formulas differ by a constant factor that is not 0, as both sides of the same equation do."""
    names = variables(answer)
    if not names or names != variables(reference) or costly(answer):
        return False
    ours, theirs = parse(answer), parse(reference)
    if ours is None or theirs is None:
        return False
    ratios = []
    for point in _points(ours.free_symbols | theirs.free_symbols):
        a, b = _value(ours, point), _value(theirs, point)
        if a is None or b is None or abs(b) < 1e-12 or abs(a) < 1e-12:
            return False
        ratios.append(a / b)
    return all(_close(ratio, ratios[0], sympy.Float("1e-12")) for ratio in ratios)


@lru_cache(maxsize=8192)
def parse(text: str) -> Any | None:
    """The sympy expression of a formula, by math-verify's grammar; None where it is none."""
    if not _readable(text):
        return None
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    try:
        # Not by math_verify.parse: it drops a last letter as a unit, and reads R and r as one variable.
        expression = latex2sympy(
            text,
            normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"),
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:
        return None
    return expression if isinstance(expression, sympy.Expr) else None


def _points(symbols: set[Any]) -> list[dict[Any, Any]]:
    """Positive values for every symbol, always the same ones: answers are about lengths and counts."""
    generator = random.Random(0)
    ordered = sorted(symbols, key=str)
    return [{s: sympy.Rational(generator.randint(200, 2900), 997) for s in ordered} for _ in range(_POINTS)]


def _value(expression: Any, point: dict[Any, Any]) -> Any | None:
    """The number that the expression is at the point; None where it is none, or not a finite one."""
    try:
        value = expression.subs(point).evalf(_PRECISION, maxn=1000)
    except Exception:
        return None
    real, imaginary = value.as_real_imag()
    return value if real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite else None


def _close(a: Any, b: Any, tolerance: Any) -> bool:
    return bool(abs(a - b) <= tolerance * abs(b))


def _near(ours: Any, theirs: Any, answer: str, reference: str) -> bool | None:
    """Equal wherever it is tried; None where there are no values."""
    symbols = ours.free_symbols | theirs.free_symbols
    if not symbols:
        ours, theirs = ours.doit(), theirs.doit()
        if ours.is_Rational and theirs.is_Rational:
            return bool(ours == theirs)
    # Exact expressions agree to all digits, those with a decimal in them to what it was read with.
    exact = not (ours.atoms(sympy.Float) or theirs.atoms(sympy.Float))
    tolerance = sympy.Float(10) ** (10 - _PRECISION) if exact else sympy.Float("1e-12")
    digits = [n for n in (decimal_digits(answer), decimal_digits(reference)) if n is not None]
    if digits:  # a decimal beside a number that is none
        if min(digits) < _SIGNIFICANT:
            return False
        tolerance = sympy.Float(10) ** (1 - min(digits))
    for point in _points(symbols) if symbols else [{}]:
        a, b = _value(ours, point), _value(theirs, point)
        if a is None or b is None:
            return None
        if not _close(a, b, tolerance):
            return False
    # √(x²) is x for positive x alone. Where a formula is not real there, as √x is not, nothing is said.
    opposite = [_value(e, {s: -v for s, v in _points(symbols)[0].items()}) for e in (ours, theirs)] if symbols else []
    return not (
        all(v is not None and v.is_real for v in opposite)
        and opposite
        and not _close(opposite[0], opposite[1], tolerance)
    )
