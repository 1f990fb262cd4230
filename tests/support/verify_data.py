"""Where the tests of verification find their data, and the sandbox where there can be one."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

from prime_train.verify.answers import extract_answer
from prime_train.verify.sandbox import Limits, Sandbox, SandboxUnavailable
from tests.support.paths import DATA

AIME = "AI-MO__aimo-validation-aime__aimo-validation-aime.jsonl"
AMC = "AI-MO__aimo-validation-amc__aimo-validation-amc.jsonl"


class MathProblem(NamedTuple):
    source: str
    question: str
    reference: str
    solution: str


def data_file(name: str) -> Path:
    path = DATA / "eval" / name
    if not path.exists():
        pytest.skip(f"{path} is not there; PRIME_DATA names the folder of the data")
    return path


def math_problems() -> Iterator[MathProblem]:
    """Every problem of the five evaluation sets."""
    for name, source in ((AIME, "AIME"), (AMC, "AMC")):
        for row in _rows(name):
            yield MathProblem(source, row["question"], str(row["answer"]), row["solution"] or "")
    columns = json.loads(data_file("math500__math_test_cleaned.json").read_text())
    for key, question in columns["problem"].items():
        yield MathProblem("MATH-500", question, columns["expected_answer"][key], columns["solution"][key])
    for row in _rows("minerva_math__test.jsonl"):
        # Its reference is what its solution boxes.
        reference = extract_answer(row["solution"], ["boxed"])
        assert reference is not None
        yield MathProblem("Minerva", row["problem"], reference, row["solution"])
    for row in _rows("olympiadbench__test.jsonl"):
        yield MathProblem("OlympiadBench", row["question"], row["final_answer"][0], "\n".join(row["solution"]))


def _rows(name: str) -> Iterator[dict]:
    with data_file(name).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox | str:
    try:
        return Sandbox(Limits(seconds=1.5, memory_mb=256, output_mb=1))
    except SandboxUnavailable as unavailable:
        return str(unavailable)


def sandbox_or_skip() -> Sandbox:
    found = _sandbox()
    if isinstance(found, str):
        pytest.skip(f"no sandbox here: {found}")
    return found
