"""Answers as they are written, brought to one spelling and taken apart at the top level. Text in, text out."""

import re
from collections.abc import Iterator
from functools import lru_cache

MAX_LENGTH = 2000

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*",
    "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "°": "^{\\circ}", "º": "^{\\circ}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "ω": r"\omega ", "λ": r"\lambda ", "φ": r"\phi ",
    "ℝ": r"\mathbb{R}",
    "，": ",", "（": "(", "）": ")", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "µ": r"\mu ", "′": "'",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
_SYNONYMS = (
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(?:left|right|bigg?|Bigg?|[bB]igg?[lrm])(?![a-zA-Z])\.?", ""),
    (r"\\(?:displaystyle|textstyle|limits|nolimits|phantom|hfill|quad|qquad)(?![a-zA-Z])", " "),
    (r"\\(?:leqslant|leq|leqq)(?![a-z])", r"\\le "),
    (r"\\(?:geqslant|geq|geqq)(?![a-z])", r"\\ge "),
    (r"\\(?:neq|not\s*=)(?![a-z])", r"\\ne "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    (r"\\(?:varnothing)(?![a-z])", r"\\emptyset "),
    (r"\\(?:lbrace)(?![a-z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-z])", r"\\}"),
    (r"\\(?:degree|degrees)(?![a-z])", r"^{\\circ}"),
    (r"(?:\{\s*\})?\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))", "°"),
    (r"\\(?:backslash|newline)(?![a-z])", " "),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;:> ]", " "),
    (r"(?<!\\)~", " "),
    (r"\\%", "%"),
    (r"\{,\}", ","),
    (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![a-z]))", "'"),
    (r"\^\s*\{\s*\\prime\s*\\prime\s*\}", "''"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"\\(?:operatorname|mathop)\*?\s*\{\s*(arc\w+|[a-z]+h?)\s*\}", r"\\\1 "),
)
# Fonts and boxes around text say nothing; the text stays.
_WRAPPERS = re.compile(
    r"\\(?:text|mathrm|textbf|textit|textrm|textnormal|mathbf|mathit|mathsf|mbox|hbox|boldsymbol|bm|rm|bf|emph|boxed|fbox|ensuremath)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_DOLLAR = re.compile(r"\\\$")
_OPEN, _CLOSE = "([{", ")]}"


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """One spelling: no math delimiters, spacing, fonts or sizes, \\frac with braces, ASCII where LaTeX has a command.

    A dollar that stands for money stays as "$"; a degree sign is "°"; text within \\text{} stays, between spaces.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", lambda m: r"\sqrt{" + m.group(1).strip("()") + "}", text)
    # Fullwidth forms of ASCII.
    text = "".join(chr(ord(c) - 0xFEE0) if "！" <= c <= "～" else c for c in text)
    for symbol, spelling in _SYMBOLS.items():
        text = text.replace(symbol, spelling)
    text = _DOLLAR.sub("\0", text)
    text = re.sub(r"\\[()\[\]](?!\d*pt\])", " ", text)
    # "$5$" is in math mode, "$5" is money.
    text = text.replace("$", " ") if text.count("$") % 2 == 0 else re.sub(r"\$(?=\s*\d)", "\0", text).replace("$", " ")
    text = text.replace("**", "^")
    for pattern, spelling in _SYNONYMS:
        text = re.sub(pattern, spelling, text)
    while (unwrapped := _WRAPPERS.sub(r" \1 ", text)) != text:
        text = unwrapped
    text = re.sub(r"\\frac\s*(\d|[a-zA-Z])\s*(\d|[a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = text.replace("\0", "$")
    text = re.sub(r"\s+(?=\^)", "", re.sub(r"\s+", " ", text)).strip()
    while (shorter := text.rstrip(" ,;").removesuffix("\\")) != text:
        text = shorter
    return text[:-1].strip() if re.search(r"[^.\\]\.$", text) and not re.search(r"\b[ap]\.m\.$", text) else text


def canonical(text: str) -> str:
    """For comparing spellings: no spaces but those that keep two numbers apart, no braces around one character."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\0", text)
    text = re.sub(r"\s+", "", text)
    return re.sub(r"(?<=[_^])\{([a-zA-Z0-9])\}", r"\1", text)


def balanced(text: str) -> bool:
    """Braces close in order; of brackets only the number is even counted, since an interval may mix them."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth < 0:
            return False
    return depth == 0


def _tokens(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, token, depth of brackets around it); a LaTeX command, \\{ or \\} is one token."""
    depth = 0
    for match in re.finditer(r"\\begin\s*\{[^}]*\}|\\end\s*\{[^}]*\}|\\[a-zA-Z]+|\\.|.", text, re.S):
        token = match.group()
        if token.startswith("\\end") or token in (")", "]", "}", r"\}", r"\rangle"):
            depth = max(0, depth - 1)
        yield match.start(), token, depth
        if token.startswith("\\begin") or token in ("(", "[", "{", r"\{", r"\langle"):
            depth += 1


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts of text between top-level separators, stripped. A separator is a token or a whole word."""
    parts, start, skip_until = [], 0, 0
    for position, token, depth in _tokens(text):
        if depth or position < skip_until:
            continue
        for separator in separators:
            word = separator.isalpha()
            if not text.startswith(separator, position) or (not word and token != separator):
                continue
            end = position + len(separator)
            if word and (text[position - 1 : position].isalpha() or text[end : end + 1].isalpha()):
                continue
            parts.append(text[start:position])
            start = skip_until = end
            break
    parts.append(text[start:])
    return [part.strip() for part in parts]


def split_list(text: str) -> list[str]:
    """The items of a list: "1, 2, and 3", "x=1 or x=2". One with a gap in it is no list."""
    text = re.sub(r",\s*(?:and|or)\b", ",", text)
    parts = split(text, (",", ";", "and", "or", r"\lor", r"\vee"))
    return parts if all(parts) else [text]


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) of a text that is one pair of brackets, an interval's mixed ones too."""
    tokens = [(p, t) for p, t, depth in _tokens(text) if depth == 0]
    if len(tokens) != 2 or tokens[0][0] != 0:
        return None
    (_, opening), (end, closing) = tokens
    if end + len(closing) != len(text):
        return None
    kinds = {"(": (")", "]"), "[": (")", "]"), r"\{": (r"\}",), r"\langle": (r"\rangle",)}
    if closing not in kinds.get(opening, ()):
        return None
    return opening, text[len(opening) : end].strip(), closing


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a text that is one matrix."""
    match = re.fullmatch(
        r"\\begin\s*\{([bpvB]?matrix|array)\}(?:\s*\{[lcr|]*\})?(.*)\\end\s*\{\1\}", text.strip(), re.S
    )
    if not match or "\\begin" in match.group(2) or match.group(1) == "vmatrix":
        return None
    rows = re.split(r"\\\\(?:\s*\[[^\]]*\])?", match.group(2))
    return [[cell.strip() for cell in row.split("&")] for row in rows if row.strip()]
