"""How many answers a second the verifier pool scores, some that hang among them.

    python -m benchmarks.verify [--workers 2] [--json FILE]

1,024 math answers of the usual kinds, and 256 code answers with ten tests each; 1% of either never end. The pool is
started, and has scored one answer, before the clock starts: it lives as long as a training run does.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from prime_train.verify import Answer, VerifierPool, metrics

BOUND_S = {"math": 10.0, "code": 60.0}
_RIGHT = (
    ("116", "116"), (r"\frac{22}{4}", r"\frac{11}{2}"), ("0.5", r"\frac12"), (r"2\sqrt{5}", r"\sqrt{20}"),
    ("(2,4)", "(2, 4)"), (r"\{1,2,3\}", "3,2,1"), (r"[2,\infty)", r"x\ge 2"), (r"n(n+1)/2", r"\frac{n(n+1)}{2}"),
    (r"62.5\%", "62.5%"), ("32,348", "32348"),
)  # fmt: skip
_WRONG = "117"


@dataclass(frozen=True, slots=True)
class Throughput:
    """seconds for all answers; bound_s is what the project promises on two cores."""

    kind: str
    answers: int
    hanging: int
    workers: int
    seconds: float
    bound_s: float
    timeouts: int
    score: float


def math_answers(n: int = 1024) -> tuple[list[Answer], int]:
    """Every eighth is wrong, about every hundredth keeps sympy busy for ever; (answers, how many of those)."""
    answers = []
    hanging = 0
    for i in range(n):
        response, reference = _RIGHT[i % len(_RIGHT)]
        if i % 8 == 5:
            response = _WRONG
        answers.append(_answer(i, "math", rf"Therefore \boxed{{{response}}}.", reference))
    for i in range(50, n, 100):
        answers[i], hanging = _answer(i, "math", rf"\boxed{{{HANGING_FORMULA}}}", "5"), hanging + 1
    return answers, hanging


# Gets past the guards on powers and factorials: the deadline has to end it.
HANGING_FORMULA = r"\binom{99999999999}{88888888}"


def code_answers(n: int = 256, tests: int = 10) -> tuple[list[Answer], int]:
    answers, hanging = [], 0
    program = "n = int(input())\nprint(sum(i * i for i in range(n)))"
    reference = {
        "inputs": [f"{k}\n" for k in range(tests)],
        "outputs": [str(sum(i * i for i in range(k))) for k in range(tests)],
    }
    for i in range(n):
        source = program if i % 8 != 5 else program.replace("i * i", "i")
        if i % 100 == 50:
            source, hanging = "while True: pass", hanging + 1
        answers.append(_answer(i, "code", f"```python\n{source}\n```", json.dumps(reference)))
    return answers, hanging


def _answer(i: int, ability: str, response: str, reference: str) -> Answer:
    return Answer(id=f"{ability}-{i}", prompt="", response=response, ability=ability, reference=reference)


def measure(kind: str, workers: int) -> Throughput:
    answers, hanging = math_answers() if kind == "math" else code_answers()
    with VerifierPool(workers=workers, deadline_s=10.0) as pool:
        pool.verify(answers[:workers])
        start = perf_counter()
        values = metrics(pool.verify(answers))
        seconds = perf_counter() - start
    return Throughput(
        kind=kind, answers=len(answers), hanging=hanging, workers=workers, seconds=round(seconds, 2),
        bound_s=BOUND_S[kind], timeouts=int(values["timeouts"]), score=round(values["score"], 4),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(kind, arguments.workers) for kind in BOUND_S]
    for row in rows:
        print(
            f"{row.kind}: {row.answers} answers, {row.hanging} of them hang, {row.workers} workers: "
            f"{row.seconds:.1f} s (bound {row.bound_s:.0f} s), {row.timeouts} timed out"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.seconds <= row.bound_s for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
