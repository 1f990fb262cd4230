"""Outcome of a math answer: whether it says what the reference says.

Both are taken apart in the same way: lists, sets, tuples, intervals and their unions, matrices, equations,
inequalities, units, choices and plain words; what is left, numbers and formulas, is compared by expressions.py. An
answer is right only if every part of it is: an element too many or too few, a second candidate, a word that is not in
the reference, a unit of another kind or size make it wrong.

- A unit may be left out, and an answer may have one where the reference has none. Where both have one the quantities
  must be equal: 5 kg is 5000 g, and neither 5 g nor 5 m.
- Percent: a reference of 50% is met by 50%, 50 and 0.5. A reference of 50 or 0.5 is met by 50% only where the question
  asks for percent ("percent", "%"), and then 50% is the number 50.
- Lists without brackets and sets have no order; tuples have. An inequality is the interval that it describes.
- "x = 5" is 5; where the reference names a variable too, it must be the same one.
- A decimal is equal to a number that no decimal is (1/3, √2) if it gives it to six digits or more.
"""

import itertools
import re
from functools import lru_cache

from . import expressions, latex
from .answers import FORMS, extract_answer
from .units import Unit, parse_unit

_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?\s*([A-J])\s*\)?[.:]?", re.I)
_LABEL = re.compile(r"\(\s*[A-E]\s*\)\s*(?=\S)")
_ARTICLES = re.compile(r"^(?:an?|the)\s+", re.I)
# x, x_1, \theta, m_{\max}, f(x), y', (x, y)
_VARIABLE = (
    r"(?:\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)|"
    r"\\?[a-zA-Z]+(?:_\s*(?:\{[^{}]*\}|\w))?(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?'*)"
)
_NEGATIVE = re.compile(r"\\(?:not|neg|lnot|nsim|napprox)(?![a-z])|\b(?:not|isn't|never|except)\b", re.I)
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|sim|equiv|in|notin|subset)(?![a-z])|[<>=≡]")
_REALS = re.compile(r"\\mathbb\s*(?:\{\s*R\s*\}|R)|(?:all )?real numbers", re.I)
_NOTHING = re.compile(r"\\emptyset|\\\{\s*\\\}|no (?:real )?solutions?|none", re.I)
_MAX_ITEMS = 64


def verify_math(response: str, reference: str, question: str = "", forms: tuple[str, ...] = FORMS) -> bool:
    """Whether the answer that the response gives is the reference; False where it gives none."""
    answer = extract_answer(response, forms)
    return answer is not None and equivalent(answer, reference, question)


def equivalent(answer: str, reference: str, question: str = "") -> bool:
    """Whether `answer` says what `reference` says. The question only decides about percent and about counted things."""
    if len(answer) > latex.MAX_LENGTH or not latex.balanced(answer):
        return False
    ours, theirs = latex.normalise(answer), latex.normalise(reference)
    if not ours or not theirs:
        return False
    if latex.canonical(ours) == latex.canonical(theirs):
        return True
    if any(c.isdigit() and not c.isascii() for c in ours) or "?" in ours:
        return False
    return _same(ours, theirs, question)


def _same(ours: str, theirs: str, question: str) -> bool:
    if latex.canonical(ours) == latex.canonical(theirs):
        return True
    if _NEGATIVE.search(ours) or _NOTHING.fullmatch(ours) or _NOTHING.fullmatch(theirs):
        return bool(_NOTHING.fullmatch(ours) and _NOTHING.fullmatch(theirs))
    if (choice := _CHOICE.fullmatch(theirs)) and len(theirs) <= 4 and choice[1].isupper():
        return _is_choice(ours, choice[1])
    ours = _LABEL.sub("", ours, count=1) if _LABEL.match(ours) and not latex.bracketed(ours) else ours
    if _is_words(theirs):
        return _words(ours) == _words(theirs)
    for decide in (_as_intervals, _as_relation, _as_list, _as_matrix, _as_brackets):
        if (decided := decide(ours, theirs, question)) is not None:
            return decided
    return _same_quantity(ours, theirs, question)


# -- words and choices ----------------------------------------------------------------------------------------------


def _is_choice(ours: str, letter: str) -> bool:
    """ "B", "(B)", "B.", "option B", and "(B) 12" where nothing in the rest is another choice."""
    if match := _CHOICE.fullmatch(ours):
        return match[1] == letter
    match = re.fullmatch(r"\(\s*([A-J])\s*\)\s*(.+)|([A-J])\s*[).:]\s*(.+)", ours)
    if not match or (match[1] or match[3]) != letter:
        return False
    rest = match[2] or match[4]
    return not re.search(r"\b[A-J]\b|\b(?:and|or|not)\b", rest)


def _is_words(text: str) -> bool:
    return (
        bool(re.fullmatch(r"[A-Za-z][A-Za-z' .\-]*[A-Za-z]", text)) and expressions.variables(text) is None
    ) or bool(re.fullmatch(r"[A-Za-z]{2,}", text) and re.search(r"[a-z]{2}", text))


def _words(text: str) -> str:
    return _ARTICLES.sub("", " ".join(text.lower().replace("-", " ").split()))


# -- lists, sets, tuples, intervals, matrices -----------------------------------------------------------------------


def _as_list(ours: str, theirs: str, question: str) -> bool | None:
    """Items in any order, one to one; a set in braces is the list of its elements."""
    ours_items, theirs_items = _items(ours), _items(theirs)
    if len(ours_items) == len(theirs_items) == 1 and ours_items == [ours] and theirs_items == [theirs]:
        return None
    if len(ours_items) != len(theirs_items) or len(ours_items) > _MAX_ITEMS:
        return False
    left = list(theirs_items)
    for item in ours_items:
        match = next((other for other in left if _same(item, other, question)), None)
        if match is None:
            return False
        left.remove(match)
    return True


@lru_cache(maxsize=4096)
def _items(text: str) -> list[str]:
    """The elements of a list or set, a ± b as two; the text itself where it is one thing."""
    inside = latex.bracketed(text)
    if inside and inside[0] == r"\{":
        text = inside[1]
    elif member := re.fullmatch(rf"{_VARIABLE}\s*\\in\s*\\\{{(.*)\\\}}", text):
        text = member[1]
    if expressions.rational(_quantity(text, "")[0]) is not None:
        return [text]  # 1,234 and $1,234 are one number
    parts = latex.split_list(text)
    # "x = 1, 2" and "x = ±2" name the variable once.
    items: list[str] = []
    for part in parts:
        if r"\pm" in part and not (latex.bracketed(part) or r"\mp" in part):
            items += [part.replace(r"\pm", "+"), part.replace(r"\pm", "-")]
        else:
            items.append(part)
    items = [re.sub(r"(^|=)\s*\+", r"\1", item).strip() for item in items]
    distinct = list(dict.fromkeys(items))
    return distinct if distinct else [text]


def _as_matrix(ours: str, theirs: str, question: str) -> bool | None:
    a, b = latex.matrix(ours), latex.matrix(theirs)
    if a is None and b is None:
        return None
    if a is None or b is None or [len(row) for row in a] != [len(row) for row in b]:
        return False
    cells = zip(itertools.chain.from_iterable(a), itertools.chain.from_iterable(b), strict=True)
    return all(_same(x, y, "") for x, y in cells)


def _as_brackets(ours: str, theirs: str, question: str) -> bool | None:
    """Tuples and intervals: the same brackets and the same items in order."""
    a, b = latex.bracketed(ours), latex.bracketed(theirs)
    if a is None and b is None:
        return None
    ours_items = latex.split(a[1], (",", ";")) if a else [ours]
    theirs_items = latex.split(b[1], (",", ";")) if b else [theirs]
    if len(ours_items) == len(theirs_items) == 1:  # brackets around one thing are grouping
        if (a and a[0] == "(") or (b and b[0] == "("):
            inner_a, inner_b = (a[1] if a and a[0] == "(" else ours), (b[1] if b and b[0] == "(" else theirs)
            return _same(inner_a, inner_b, question) if (inner_a, inner_b) != (ours, theirs) else None
        return None
    if a is None or b is None or len(ours_items) != len(theirs_items):
        return False
    vectors = {"(", "[", r"\langle"} if len(ours_items) > 2 else {"(", r"\langle"}
    alike = (a[0], a[2]) == (b[0], b[2]) or (a[0] in vectors and b[0] in vectors and a[2] != "]" != b[2])
    alike = alike or (len(ours_items) > 2 and {a[0], b[0]} <= vectors)
    return alike and all(_same(x, y, question) for x, y in zip(ours_items, theirs_items, strict=True))


def _as_intervals(ours: str, theirs: str, question: str) -> bool | None:
    """Unions of intervals and finite sets, in any order; inequalities in one variable are intervals."""
    a, b = _intervals(ours), _intervals(theirs)
    if a is None or b is None:
        # One pair of brackets, as a tuple or a set has it too, is for others to decide.
        parts = (a or b or ("", []))[1]
        ordinary = not parts or (len(parts) == 1 and (parts[0] in (ours, theirs) or parts[0].startswith(r"\{")))
        return None if ordinary else False
    if a[0] and b[0] and a[0] != b[0]:
        return False
    if a[1] == [ours] and b[1] == [theirs]:
        return None
    left = list(b[1])
    for part in a[1]:
        match = next((other for other in left if _as_brackets_or_set(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _as_brackets_or_set(a: str, b: str) -> bool:
    x, y = latex.bracketed(a), latex.bracketed(b)
    if x is None or y is None:
        return False
    if r"\{" in (x[0], y[0]):
        return x[0] == y[0] and bool(_as_list(a, b, ""))
    # An end at infinity is open however it is written.
    ends_a, ends_b = latex.split(x[1], (",",)), latex.split(y[1], (",",))
    if len(ends_a) != 2 or len(ends_b) != 2 or (x[0], x[2]) != (y[0], y[2]):
        return False
    return all(_same(p, q, "") for p, q in zip(ends_a, ends_b, strict=True))


def _intervals(text: str) -> tuple[str, list[str]] | None:
    """(variable or "", parts) of an interval, a union of them, an inequality, or "x \\in …"; None for anything else."""
    variable = ""
    if match := re.fullmatch(
        r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|R))?\s*(?:\\mid|\||:|,)\s*(.*?)\s*\\\}", text
    ):
        text = match[2]
    if match := re.fullmatch(rf"({_VARIABLE})\s*\\in\s*(.+)", text):
        variable, text = match[1], match[2]
    if _REALS.fullmatch(text):
        return variable, [r"(-\infty,\infty)"]
    parts: list[str] = []
    for part in latex.split(text, (r"\cup", "or", r"\lor", r"\vee")):
        if interval := _inequality(part):
            if variable and interval[0] != variable:
                return None
            variable = interval[0]
            parts.append(interval[1])
        elif (inside := latex.bracketed(part)) and (inside[0] == r"\{" or len(latex.split(inside[1], (",",))) == 2):
            parts.append(part)
        else:
            return None
    return variable, parts


def _inequality(text: str) -> tuple[str, str] | None:
    """(variable, interval) of x < 3, 3 > x, 1 < x ≤ 2."""
    pieces = [piece.strip() for piece in re.split(r"(\\le(?![a-z])|\\ge(?![a-z])|<|>)", text)]
    if len(pieces) == 3:
        left, sign, right = pieces
        if not re.fullmatch(_VARIABLE, left):
            left, right, sign = right, left, {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
        if not re.fullmatch(_VARIABLE, left) or not right:
            return None
        if sign in ("<", r"\le"):
            return left, rf"(-\infty,{right}" + (")" if sign == "<" else "]")
        return left, ("(" if sign == ">" else "[") + rf"{right},\infty)"
    if len(pieces) == 5:
        low, first, name, second, high = pieces
        if {first, second} <= {">", r"\ge"}:
            flip = {">": "<", r"\ge": r"\le"}
            low, first, second, high = high, flip[second], flip[first], low
        if {first, second} <= {"<", r"\le"} and re.fullmatch(_VARIABLE, name) and low and high:
            return name, ("(" if first == "<" else "[") + f"{low},{high}" + (")" if second == "<" else "]")
    return None


# -- equations ------------------------------------------------------------------------------------------------------


def _as_relation(ours: str, theirs: str, question: str) -> bool | None:
    """x = 5 as 5; equations up to a factor; any other relation only as it is spelled."""
    if len(_items(ours)) > 1 or len(_items(theirs)) > 1:
        if re.search(r"\\(?:ne|approx|notin)(?![a-z])", ours):
            return False
        return None
    if not _RELATION.search(ours) and not _RELATION.search(theirs):
        return None
    if (re.sub(r"=", "", ours) and _RELATION.search(ours.replace("=", " "))) or _RELATION.search(
        theirs.replace("=", " ")
    ):
        return False
    a, b = (latex.split(text, ("=",)) for text in (ours, theirs))
    if len(a) == len(b) == 1 or "" in a or "" in b or max(len(a), len(b)) > 4:
        return None if len(a) == len(b) == 1 else False
    name_a, values_a = _named(a)
    name_b, values_b = _named(b)
    if len(values_a) >= 1 and len(values_b) == 1 and (name_a or len(a) == 1) and (name_b or len(b) == 1):
        if name_a and name_b and latex.canonical(name_a) != latex.canonical(name_b):
            return False
        if all(_same(value, values_b[0], question) for value in values_a):
            return True
    if len(a) == len(b) == 2:
        return expressions.proportional(f"({a[0]})-({a[1]})", f"({b[0]})-({b[1]})")
    # "5 + 3 = 8": what was computed stands before the result.
    return len(b) == 1 and not name_a and all(_same(value, theirs, question) for value in a)


def _named(sides: list[str]) -> tuple[str, list[str]]:
    """(variable, the sides that give its value); the variable stands first or, alone of two, last."""
    if len(sides) > 1 and re.fullmatch(_VARIABLE, sides[0]):
        return sides[0], sides[1:]
    if len(sides) == 2 and re.fullmatch(_VARIABLE, sides[1]):
        return sides[1], sides[:1]
    return "", sides


# -- numbers, formulas and their units ------------------------------------------------------------------------------


def _same_quantity(ours: str, theirs: str, question: str) -> bool:
    (value_a, unit_a), (value_b, unit_b) = _quantity(ours, question), _quantity(theirs, question)
    percent = (unit_a is not None and unit_a.is_percent, unit_b is not None and unit_b.is_percent)
    if percent == (True, False):
        asked = unit_b is None and re.search(r"percent|%", question, re.I)
        return bool(asked) and _same_value(value_a, value_b, question)
    if percent == (False, True):
        if unit_a is not None:
            return False
        hundredth = expressions.rational(value_b)
        fraction = expressions.rational(value_a)
        return _same_value(value_a, value_b, question) or (hundredth is not None and fraction == hundredth / 100)
    if unit_a is not None and unit_b is not None:
        if unit_a.dimensions != unit_b.dimensions:
            return False
        if unit_a.factor != unit_b.factor:
            a, b = expressions.rational(value_a), expressions.rational(value_b)
            return a is not None and b is not None and a * unit_a.factor == b * unit_b.factor
    elif unit_b is not None and not unit_b.may_be_left_out:
        return False
    return _same_value(value_a, value_b, question)


def _same_value(ours: str, theirs: str, question: str) -> bool:
    ours, theirs = _ungroup(ours), _ungroup(theirs)
    if latex.canonical(ours) == latex.canonical(theirs):
        return True
    if (based := _same_in_base(ours, theirs, question)) is not None:
        return based
    if (same := expressions.same_number(ours, theirs)) is not None:
        return same
    return expressions.same_formula(ours, theirs)


def _ungroup(text: str) -> str:
    while (inside := latex.bracketed(text)) and inside[0] == "(" and inside[2] == ")":
        text = inside[1]
    return text.strip()


def _same_in_base(ours: str, theirs: str, question: str) -> bool | None:
    """4210_{5}: the same digits, and the same base where both name one; the question may have named it."""
    a, b = (re.fullmatch(r"([0-9A-Z]+)\s*_\s*\{?\s*(\d+|[a-z]{3,})\s*\}?", text) for text in (ours, theirs))
    if a and b:
        return a.groups() == b.groups()
    if b:
        return re.sub(r"\s", "", ours) == b[1]
    if a:
        return a[1] == re.sub(r"\s", "", theirs) and re.search(r"\bbase\b|_\s*\{?\s*\d", question) is not None
    return None


@lru_cache(maxsize=8192)
def _quantity(text: str, question: str) -> tuple[str, Unit | None]:
    """(value, unit): the longest ending that is a unit and follows a number."""
    if len(text) > 1 and text[0] in "$€£" and (value := text[1:].strip()):
        return value, parse_unit(text[0])
    if text[:2] in ("-$", "-£", "-€"):
        return "-" + text[2:].strip(), parse_unit(text[1])
    starts = [
        match.start() for match in re.finditer(r"(?<=[\d})\]\s.!])(?=[A-Za-zÅ°%$€£¢])|(?<=[\d}])\s*(?=\\cdot)", text)
    ]
    for start in starts:
        value, ending = text[:start].strip(), text[start:].strip()
        if not re.search(r"[\d})\]!.]\s*$|\\pi\s*$", value) or re.search(
            r"[\^_\\]\s*$|\\[a-zA-Z]+$", value.replace(r"\pi", "")
        ):
            continue
        if expressions.rational(value) is None and len(ending) == 1 and ending.isalpha():
            continue  # (a+1)m is a formula
        if unit := parse_unit(ending, question):
            return value, unit
    return text, None
