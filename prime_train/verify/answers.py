"""Where in a response its answer is."""

import re
from collections.abc import Callable, Sequence

FORMS = ("boxed", "hash", "answer_is")

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Between two boxes of one statement: "\boxed{1} and \boxed{2}", "$\boxed{1}$ or $\boxed{2}$".
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:,|;|\band\b|\bor\b|,\s*and\b|,\s*or\b|\\text\{\s*(?:and|or)\s*\})[\s$]*(?:[a-z]\s*=)?[\s$]*"
)
_ANSWER_IS = re.compile(r"\banswer\s*(?:is|:)\s*:?(.*)", re.I)


def extract_answer(response: str, forms: Sequence[str] = FORMS) -> str | None:
    """The answer in the first of `forms` that the response has, or None.

    "boxed": the last balanced \\boxed{} or \\fbox{}; boxes joined by a comma, "and" or "or" are one answer.
    "hash": what follows the last "####" on its line. "answer_is": what follows the last "answer is" or "answer:" on its
    line, to the end of the sentence.
    """
    for form in forms:
        if (answer := _EXTRACTORS[form](response)) is not None and answer.strip():
            return answer.strip()
    return None


def _boxed(response: str) -> str | None:
    boxes: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(response):
        if (end := _closing_brace(response, match.end())) is not None:
            boxes.append((match.start(), end, response[match.end() : end]))
    if not boxes:
        return None
    start, _, answer = boxes.pop()
    while boxes and _BETWEEN_BOXES.fullmatch(response, boxes[-1][1] + 1, start):
        start, _, earlier = boxes.pop()
        answer = f"{earlier}, {answer}"
    return answer


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` closes; \\{ and \\} do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        if match.group() in "{}":
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return match.start()
    return None


def _hash(response: str) -> str | None:
    lines = re.findall(r"####(.*)", response)
    return lines[-1] if lines else None


def _answer_is(response: str) -> str | None:
    lines = _ANSWER_IS.findall(response)
    if not lines:
        return None
    sentence = re.split(r"\.(?=\s|$)", lines[-1])[0]
    return sentence.strip().strip("*").strip()


_EXTRACTORS: dict[str, Callable[[str], str | None]] = {"boxed": _boxed, "hash": _hash, "answer_is": _answer_is}
