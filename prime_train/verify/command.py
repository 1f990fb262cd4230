"""prime-train verify FILE.jsonl [--out SCORES.jsonl]: scores a file of responses.

Each line of the file is a JSON object with `id`, `response`, and either `reference` (a math answer) or `ground_truth`
(a code problem's tests, as JSON or as a string of JSON; code.py has the forms); optionally `ability` ("math", "code")
and `prompt`. Each line of the output has `id`, `score` in [0, 1], `status` and `seconds`, in the order of the input. A
line that cannot be read is reported with its number and left out; the rest is scored.

Exit status: 0, all lines were scored; 1, some could not be read, or were refused since there is no sandbox; 2, nothing
was scored, since the file or a setting is wrong.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from .answers import FORMS
from .pool import VerifierPool, metrics
from .records import Answer, Verdict

_CHUNK = 1024  # lines that are held at a time


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        with contextlib.ExitStack() as stack:
            total = sum(1 for line in stack.enter_context(arguments.file.open("rb")) if line.strip())
            lines = stack.enter_context(arguments.file.open(encoding="utf-8", errors="replace"))
            out = stack.enter_context(arguments.out.open("w", encoding="utf-8")) if arguments.out else sys.stdout
            pool = stack.enter_context(
                VerifierPool(
                    workers=arguments.workers, deadline_s=arguments.deadline, extract=arguments.extract,
                    custom=arguments.custom, unsafe=arguments.unsafe, test_seconds=arguments.test_seconds,
                    test_memory_mb=arguments.test_memory,
                )
            )  # fmt: skip
            verdicts, bad = _score(pool, lines, out, total)
    except (OSError, ValueError) as error:
        print(f"prime-train verify: {error}", file=sys.stderr)
        return 2
    _summarise(verdicts, bad)
    return 1 if bad or any(verdict.status == "refused" for verdict in verdicts) else 0


def _score(pool: VerifierPool, lines: Iterable[str], out: TextIO, total: int) -> tuple[list[Verdict], int]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    verdicts: list[Verdict] = []
    answers: list[Answer] = []
    bad = 0
    console = Console(stderr=True)
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("verify", total=total)

        def flush() -> None:
            base = len(verdicts) + bad
            new = pool.verify(answers, progress=lambda done: bar.update(task, completed=base + done))
            for verdict in new:
                row = {"id": verdict.id, "score": verdict.score, "status": verdict.status}
                print(json.dumps(row | {"seconds": round(verdict.seconds, 4)}), file=out)
            out.flush()
            verdicts.extend(new)
            answers.clear()

        for number, line in _numbered(lines):
            try:
                answers.append(parse_line(line))
            except ValueError as error:
                bad += 1
                print(f"line {number}: {error}", file=sys.stderr)
            if len(answers) == _CHUNK:
                flush()
        flush()
        bar.update(task, completed=total)
    return verdicts, bad


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def parse_line(line: str) -> Answer:
    """Raises ValueError, saying what is wrong with the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"wanted a JSON object, found {type(row).__name__}")
    for key in ("id", "response"):
        if key not in row:
            raise ValueError(f"`{key}` is missing")
    if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
        raise ValueError("`id` must be a text or a whole number")
    if not isinstance(row["response"], str):
        raise ValueError("`response` must be a text")
    ability = row.get("ability") or ("code" if "ground_truth" in row and "reference" not in row else "math")
    if ability not in ("math", "code"):
        raise ValueError(f"`ability` must be math or code, not {ability!r}")
    wanted = "ground_truth" if ability == "code" else "reference"
    # Either key is taken for either ability: data sets name both kinds `ground_truth`.
    reference = next((row[key] for key in (wanted, "reference", "ground_truth") if key in row), None)
    if reference is None:
        raise ValueError(f"`{wanted}` is missing")
    return Answer(
        id=str(row["id"]), prompt=str(row.get("prompt", "")), response=row["response"], ability=ability,
        reference=_reference(reference, ability),
    )  # fmt: skip


def _reference(value: Any, ability: str) -> str:
    if ability == "code":
        from .code import parse_tests

        text = value if isinstance(value, str) else json.dumps(value)
        parse_tests(text)
        return text
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("`reference` must be a text or a number")
    if not str(value).strip():
        raise ValueError("`reference` is empty")
    return str(value)


def _summarise(verdicts: list[Verdict], bad: int) -> None:
    values = metrics(verdicts)
    print(
        f"{len(verdicts)} scored, mean {values['score']:.3f}, {values['timeouts']:.0f} timed out, "
        f"{values['errors']:.0f} errors, {values['refused']:.0f} refused, {bad} unreadable lines",
        file=sys.stderr,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prime-train verify", description="Score a JSON-lines file of responses.",
        epilog="A line: {id, response, reference | ground_truth[, ability][, prompt]}.",
    )  # fmt: skip
    parser.add_argument("file", type=Path, help="responses, one JSON object a line")
    parser.add_argument("--out", type=Path, help="where the scores go (default: standard output)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds for one answer (default: %(default)s)")
    parser.add_argument(
        "--extract", nargs="+", choices=FORMS, default=list(FORMS), help="where math answers are looked for, in order"
    )
    parser.add_argument("--custom", metavar="MODULE:FUNCTION", help="a verifier (prompt, response) -> float")
    parser.add_argument("--test-seconds", type=float, default=10.0, help="for one test of code (default: %(default)s)")
    parser.add_argument("--test-memory", type=int, default=1024, help="MiB for one test (default: %(default)s)")
    parser.add_argument("--unsafe", action="store_true", help="run code without a sandbox, with your own rights")
    return parser


if __name__ == "__main__":
    sys.exit(main())
