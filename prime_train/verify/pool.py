"""Scores answers in processes that can be killed.

    trainer ── pipes ── this module run as a program ── workers ── (code) a sandbox for each answer

The workers are children of a process of its own, which is started afresh and imports neither torch nor the
trainer's main module: no fork of a process with threads and a GPU, workers that start in milliseconds (forked from a
server that has sympy loaded), and a trainer that dies takes all of them with it. A worker that is not done with a
sample at its deadline is killed and replaced; the others go on.
"""

import importlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self, cast

from .answers import FORMS
from .records import Answer, Status, Verdict
from .workers import Died, Killed, Stopped, Task, Workers

logger = logging.getLogger(__name__)

# What code may take beyond its deadline, which it keeps itself, so that the tests that did end count.
_CODE_GRACE_S = 3.0
_MAX_RESPONSE = 1_000_000  # characters; a longer one is no answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the pool's program and its workers need to know; VerifierPool documents the fields."""

    workers: int
    deadline_s: float
    math_deadline_s: float
    extract: tuple[str, ...]
    custom: str | None
    unsafe: bool
    test_seconds: float
    test_memory_mb: int
    test_processes: int
    test_output_mb: int


class VerifierPool:
    """Long-lived worker processes that score answers; a context manager.

    workers: processes. deadline_s: seconds for one answer, all tests of a code answer together; a math answer gets the
    shorter of it and math_deadline_s. extract: the forms in which a math answer is looked for, the first found counts.
    custom: "module:function", a callable (prompt, response) -> float that scores every answer in place of the built-in
    verifiers. unsafe: run code without a sandbox. test_*: limits of one test of a code answer (sandbox.Limits).

    ValueError for settings that cannot be meant, a custom verifier that cannot be imported among them.
    """

    def __init__(
        self, *, workers: int, deadline_s: float, extract: Sequence[str] = FORMS, custom: str | None = None,
        unsafe: bool = False, math_deadline_s: float = 1.0, test_seconds: float = 10.0, test_memory_mb: int = 1024,
        test_processes: int = 16, test_output_mb: int = 8,
    ) -> None:  # fmt: skip
        for name, value in (
            ("workers", workers), ("deadline_s", deadline_s), ("math_deadline_s", math_deadline_s),
            ("test_seconds", test_seconds), ("test_memory_mb", test_memory_mb), ("test_processes", test_processes),
            ("test_output_mb", test_output_mb),
        ):  # fmt: skip
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        if not extract or not set(extract) <= set(FORMS):
            raise ValueError(f"extract must be some of {', '.join(FORMS)}, not {list(extract)!r}")
        if custom is not None and (custom.count(":") != 1 or not all(custom.split(":"))):
            raise ValueError(f"custom must be 'module:function', not {custom!r}")
        self._settings = Settings(
            workers=workers, deadline_s=deadline_s, math_deadline_s=min(math_deadline_s, deadline_s),
            extract=tuple(extract), custom=custom, unsafe=unsafe, test_seconds=test_seconds,
            test_memory_mb=test_memory_mb, test_processes=test_processes, test_output_mb=test_output_mb,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._warned: set[str] = set()
        self._start()

    def verify(self, answers: Sequence[Answer], *, progress: Callable[[int], None] | None = None) -> list[Verdict]:
        """One verdict for each answer, in order. progress is called with how many are done, from 0 to all of them.

        Never raises for what is in an answer: a verifier that fails on it gives score 0 and status "error".
        """
        with self._lock:
            return self._verify(answers, progress or (lambda done: None))

    def _verify(self, answers: Sequence[Answer], progress: Callable[[int], None]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        attempts = 0
        progress(0)
        while len(verdicts) < len(answers):
            if self._process is None:
                self._start()
            missing = [i for i in range(len(answers)) if i not in verdicts]
            try:
                self._connection.send([(i, answers[i]) for i in missing])
                for _ in missing:
                    index, verdict = self._connection.recv()
                    verdicts[index] = verdict
                    self._log(verdict)
                    progress(len(verdicts))
            except (EOFError, OSError):
                # The program itself died. Once more for what is left, then it is the answers' fault.
                self.close()
                attempts += 1
                logger.error("the verifier pool died with %d of %d answers left", len(missing), len(answers))
                if attempts > 1:
                    for i in missing:
                        died = Verdict(id=answers[i].id, score=0.0, status="error", seconds=0.0, detail="the pool died")
                        verdicts.setdefault(i, died)
            except BaseException:
                # Answers of this call may still be on their way: they must not meet the next one.
                self.close()
                raise
        return [verdicts[i] for i in range(len(answers))]

    def _log(self, verdict: Verdict) -> None:
        if verdict.status == "refused" and verdict.detail not in self._warned:
            self._warned.add(verdict.detail)
            logger.error("code answers are refused and score 0: %s", verdict.detail)
        elif verdict.status in ("timeout", "error"):
            logger.warning(
                "sample %s: %s after %.1f s: %s", verdict.id, verdict.status, verdict.seconds, verdict.detail
            )

    def _start(self) -> None:
        to_program, from_program = os.pipe(), os.pipe()
        # -P: the working directory is on the path only if it is on ours.
        program = "from prime_train.verify.pool import main; main()"
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(to_program[0]), str(from_program[1]),
             json.dumps(asdict(self._settings))],
            pass_fds=(to_program[0], from_program[1]), stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(to_program[0])
        os.close(from_program[1])
        self._connection = _Pipes(
            Connection(from_program[0], writable=False), Connection(to_program[1], readable=False)
        )
        try:
            failure = self._connection.recv()
        except EOFError:
            failure = "the verifier pool did not start"
        if failure:
            self.close()
            raise ValueError(failure)

    def close(self) -> None:
        """Ends every process of the pool. Closing twice, and after an error, is allowed."""
        if self._process is None:
            return
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Mean score, seconds an answer and in all, and how many had each status."""
    counts = Counter(verdict.status for verdict in verdicts)
    n = max(len(verdicts), 1)
    seconds = sum(verdict.seconds for verdict in verdicts)
    statuses: tuple[Status, ...] = ("timeout", "error", "refused")
    return {
        "score": sum(verdict.score for verdict in verdicts) / n,
        "seconds": seconds / n,
        "seconds_max": max((verdict.seconds for verdict in verdicts), default=0.0),
        **{f"{status}s" if status != "refused" else status: float(counts[status]) for status in statuses},
    }


@dataclass(frozen=True, slots=True)
class _Pipes:
    reader: Connection
    writer: Connection

    def send(self, message: Any) -> None:
        self.writer.send(message)

    def recv(self) -> Any:
        return self.reader.recv()

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


# -- in a worker ----------------------------------------------------------------------------------------------------


class _Worker:
    """One worker process's sandbox, made when the first answer needs it."""

    sandbox: Any = None
    refusal: str = ""


def load_custom(name: str) -> Callable[[str, str], float]:
    """The callable that "module:function" names; ValueError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the verifier {name!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise ValueError(f"the verifier {name!r} is not callable")
    return cast(Callable[[str, str], float], found)


def _timed(answer: Answer, settings: Settings) -> tuple[float, Status, str, float]:
    """(score, status, detail, seconds) of one answer."""
    start = time.monotonic()
    return *_score(answer, settings), time.monotonic() - start


def _score(answer: Answer, settings: Settings) -> tuple[float, Status, str]:
    try:
        if settings.custom:
            value = float(load_custom(settings.custom)(answer.prompt, answer.response))
            if not 0.0 <= value <= 1.0:
                return 0.0, "error", f"the verifier {settings.custom} returned {value}, which is not in [0, 1]"
            return value, "ok", ""
        if len(answer.response) > _MAX_RESPONSE:
            return 0.0, "ok", "the response is too long"
        if answer.ability == "math":
            from .math import verify_math

            right = verify_math(answer.response, answer.reference, answer.prompt, settings.extract)
            return float(right), "ok", ""
        if answer.ability == "code":
            return _score_code(answer, settings)
        return 0.0, "error", f"no verifier for the ability {answer.ability!r}; there are math and code"
    except (Exception, RecursionError) as error:
        return 0.0, "error", f"{type(error).__name__}: {error}"


def _score_code(answer: Answer, settings: Settings) -> tuple[float, Status, str]:
    from .code import score_code
    from .sandbox import Limits, Sandbox, SandboxUnavailable

    if _Worker.sandbox is None and not _Worker.refusal:
        limits = Limits(
            seconds=settings.test_seconds, memory_mb=settings.test_memory_mb, processes=settings.test_processes,
            output_mb=settings.test_output_mb,
        )  # fmt: skip
        try:
            _Worker.sandbox = Sandbox(limits, unsafe=settings.unsafe)
        except SandboxUnavailable as unavailable:
            _Worker.refusal = str(unavailable)
    if _Worker.refusal:
        return 0.0, "refused", _Worker.refusal
    return score_code(_Worker.sandbox, answer.response, answer.reference, settings.deadline_s)


# -- the pool's program ---------------------------------------------------------------------------------------------


def main() -> None:
    settings = Settings(**json.loads(sys.argv[3]))
    trainer = _Pipes(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))
    for fd in (int(sys.argv[1]), int(sys.argv[2])):
        os.set_inheritable(fd, False)
    # Workers are forked from a server that has all they need in memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([] if settings.custom else ["prime_train.verify.preload"])
    try:
        if settings.custom:
            load_custom(settings.custom)
    except ValueError as error:
        trainer.send(str(error))
        return
    trainer.send("")
    workers = Workers(settings.workers, partial(_timed, settings=settings), context)
    try:
        while True:
            answers: dict[int, Answer] = dict(trainer.recv())
            tasks = [Task(index, answer, _deadline(answer, settings)) for index, answer in answers.items()]
            for index, result in workers.run(tasks, trainer.reader):
                trainer.send((index, _verdict(answers[index], result, settings)))
    except (EOFError, OSError, Stopped):
        pass  # the trainer closed the pool, or is gone
    finally:
        workers.stop()


def _deadline(answer: Answer, settings: Settings) -> float:
    if settings.custom:
        return settings.deadline_s
    return settings.math_deadline_s if answer.ability == "math" else settings.deadline_s + _CODE_GRACE_S


def _verdict(answer: Answer, result: Any, settings: Settings) -> Verdict:
    value, seconds = 0.0, 0.0
    status: Status
    if isinstance(result, Killed):
        status, detail, seconds = "timeout", "killed at its deadline", _deadline(answer, settings)
    elif isinstance(result, Died):
        status, detail = "error", f"the worker died with exit code {result.exitcode}"
    else:
        value, status, detail, seconds = result
    return Verdict(id=answer.id, score=value, status=status, seconds=seconds, detail=detail)
