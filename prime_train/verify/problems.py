"""HumanEval and MBPP, as published, as code problems: their assertions are run by the sandbox's judge."""

import ast
import builtins
import gzip
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeProblem:
    """prompt: what a model is asked; reference: its tests, for Answer.reference; solution: source that passes them."""

    id: str
    prompt: str
    reference: str
    solution: str


def read_humaneval(path: Path) -> list[CodeProblem]:
    """HumanEval.jsonl, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        CodeProblem(
            id=row["task_id"],
            prompt=f"Complete this function.\n```python\n{row['prompt']}```",
            # The prompt is a whole function, with a docstring for a body; the answer's then takes its place.
            reference=_reference(
                [f"{row['test']}\ncheck({row['entry_point']})"], [row["entry_point"]], preamble=row["prompt"]
            ),
            solution=row["prompt"] + row["canonical_solution"],
        )
        for row in rows
    ]


def read_mbpp(path: Path) -> list[CodeProblem]:
    """The sanitised MBPP, one JSON list; each assertion is a test."""
    return [
        CodeProblem(
            id=f"MBPP/{row['task_id']}",
            prompt=row.get("instruction") or row["prompt"],
            reference=_mbpp_reference(row),
            solution=row["code"],
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def _mbpp_reference(row: dict[str, Any]) -> str:
    """An assertion may use what the published solution imports; the functions it defines are the answer's to define."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\w" in a plain text, in some solutions
        body = ast.parse(row["code"]).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    preamble = "\n".join([*row["test_imports"], *imports])
    asserts = [f"{preamble}\n{test}" for test in row["test_list"]]
    names = set().union(*(_free_names(source, set(dir(builtins)) - defined) for source in asserts))
    return _reference(asserts, sorted(names))


def _reference(asserts: list[str], names: list[str], preamble: str = "") -> str:
    return json.dumps({"asserts": asserts, "names": names, "preamble": preamble})


def _free_names(source: str, known: set[str]) -> set[str]:
    """Names that the source uses, does not make and that are not known: the answer's."""
    used: set[str] = set()
    made = set(known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return used - made
