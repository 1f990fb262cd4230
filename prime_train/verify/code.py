"""Outcome of a code answer: its last Python block against the tests of the problem.

A problem's tests are JSON, in one of these forms:

    {"inputs": [...], "outputs": [...]}                   programs: stdin and stdout, each a text or a list of lines
    {"inputs": [...], "outputs": [...], "fn_name": name}  functions: the arguments, a list or a line of JSON for each,
                                                          and the value that is returned
    [{"input": ..., "output": ...}, ...]                  programs, test by test
    {"asserts": [source, ...], "names": [...], "preamble": source}
                                                          assertions on the functions `names`; `preamble` is source that
                                                          comes before the answer and before each assertion

The score is 1 where every test passes, else the share that passed of the first ten (and of the test that failed, where
it comes after them). Programs' outputs are equal as the APPS family has it: line by line, leading and trailing space
and blank lines apart, word by word, within 1e-6 where the expected word is a decimal number. Returned values are equal
as JSON, tuples being lists, within 1e-6 where the expected number is a decimal one, or where the expected value is a
list of one element that equals them.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .records import Status
from .sandbox import Run, Sandbox

SCORED_TESTS = 10
_LATER_TESTS = 40  # how many of the others go into the sandbox at once
_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M | re.I)
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Test:
    """request: what the sandbox gets; expected: what it never sees (None: the sandbox's judge decides)."""

    request: dict[str, Any]
    expected: Any

    def passed(self, run: Run) -> bool:
        if run.outcome != "ended":
            return False
        if "asserts" in self.request:
            return True
        text = run.output.decode("utf-8", errors="replace")
        if "stdin" in self.request:
            return same_output(text, self.expected)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return same_value(value, self.expected) or (
            isinstance(self.expected, list) and len(self.expected) == 1 and same_value(value, self.expected[0])
        )


def extract_code(response: str) -> str | None:
    """The last ```python block; to the end of the response where it is not closed."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else None


def parse_tests(reference: str) -> list[Test]:
    """Raises ValueError, saying what is wrong, for anything that is not one of the forms above."""
    try:
        data = json.loads(reference)
        data = json.loads(data) if isinstance(data, str) else data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the tests are not JSON: {error}") from None
    if isinstance(data, list) and all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in data):
        data = {"inputs": [test["input"] for test in data], "outputs": [test["output"] for test in data]}
    if not isinstance(data, dict):
        raise ValueError(f"the tests are a {type(data).__name__}; wanted an object with inputs and outputs")
    if "asserts" in data:
        tests = [
            Test({"asserts": source, "names": data["names"], "preamble": data.get("preamble", "")}, None)
            for source in data["asserts"]
        ]
    else:
        inputs, outputs, name = data.get("inputs"), data.get("outputs"), data.get("fn_name")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError("the tests need `inputs` and `outputs`, two lists of the same length")
        if name:
            tests = [_call(name, i, o) for i, o in zip(inputs, outputs, strict=True)]
        else:
            tests = [Test({"stdin": _lines(i)}, _lines(o)) for i, o in zip(inputs, outputs, strict=True)]
    if not tests:
        raise ValueError("there is no test")
    return tests


def score_code(sandbox: Sandbox, response: str, reference: str, deadline_s: float) -> tuple[float, Status, str]:
    """(score, status, detail). Raises ValueError for tests that cannot be read."""
    tests = parse_tests(reference)
    code = extract_code(response)
    if code is None:
        return 0.0, "ok", ""
    preamble = tests[0].request.get("preamble", "")
    end, passed, cut_off = time.monotonic() + deadline_s, 0, False
    for batch in _batches(tests):
        left = max(0.0, end - time.monotonic())
        runs = sandbox.run(f"{preamble}\n{code}", [test.request for test in batch], deadline_s=left)
        results = [test.passed(run) for test, run in zip(batch, runs, strict=True)]
        cut_off = cut_off or any(run.outcome == "timeout" for run in runs)
        passed += sum(results)
        if not all(results):
            # Of the first ten the share that passed; one that fails later still must not score 1.
            scored = min(SCORED_TESTS, len(tests))
            score = passed / scored if passed < scored else scored / (scored + 1)
            return score, "timeout" if cut_off else "ok", "a test ran out of time" if cut_off else ""
    return 1.0, "ok", ""


def same_output(actual: str, expected: str) -> bool:
    actual_lines, expected_lines = ([line.split() for line in text.split("\n")] for text in (actual, expected))
    actual_lines, expected_lines = ([line for line in lines if line] for lines in (actual_lines, expected_lines))
    return len(actual_lines) == len(expected_lines) and all(
        len(ours) == len(theirs) and all(map(_same_word, ours, theirs))
        for ours, theirs in zip(actual_lines, expected_lines, strict=True)
    )


def same_value(actual: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(actual, (int, float)) and _close(actual, expected)
    if isinstance(expected, list):
        return isinstance(actual, list) and len(actual) == len(expected) and all(map(same_value, actual, expected))
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and actual.keys() == expected.keys()
            and all(same_value(actual[key], expected[key]) for key in expected)
        )
    return bool(actual == expected)


def _same_word(actual: str, expected: str) -> bool:
    if actual == expected:
        return True
    # Only a decimal number in ASCII: int() and float() also read "1_0", "infinity" and the digits of other scripts.
    if not re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", expected, re.A):
        return False
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", actual, re.A)
    return number is not None and _close(float(actual), float(expected))


def _close(actual: float, expected: float) -> bool:
    try:
        if not (math.isfinite(actual) and math.isfinite(expected)):
            return actual == expected
        return abs(actual - expected) <= _TOLERANCE * max(1.0, abs(expected))
    except OverflowError:  # a whole number beyond every float
        return False


def _batches(tests: Sequence[Test]) -> Iterator[Sequence[Test]]:
    yield tests[:SCORED_TESTS]
    for start in range(SCORED_TESTS, len(tests), _LATER_TESTS):
        yield tests[start : start + _LATER_TESTS]


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_lines, value))
    return value if isinstance(value, str) else json.dumps(value)


def _call(name: str, arguments: Any, returned: Any) -> Test:
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        returned = json.loads(returned) if isinstance(returned, str) else returned
    if not isinstance(arguments, list):
        raise ValueError(f"the input of a function must be the list of its arguments, not {arguments!r:.80}")
    return Test({"call": name, "args": [_int_keys(argument) for argument in arguments]}, returned)


def _int_keys(value: Any) -> Any:
    """JSON has no other keys than texts; tests with {"1": …} mean the number."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?\d+", key, re.A) for key in value):
        return {int(key): item for key, item in value.items()}
    return value
