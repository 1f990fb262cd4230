"""Worker processes that can be killed, each with one task at a time and a pipe of its own.

What comes out of a worker's pipe, or that the worker ended, is therefore about the one task that it was given: a crash
is never laid to a task that was done before it, however late this process looks. And nothing is shared that a killed
worker could leave locked.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """One call of the workers' function."""

    key: Any
    argument: Any
    seconds: float  # until its worker is killed


class Killed:
    """In place of a result: the task ran out of time."""


@dataclass(frozen=True, slots=True)
class Died:
    """In place of a result: the worker ended by itself."""

    exitcode: int | None  # negative: the signal that ended it


class Stopped(Exception):
    """Who gave the tasks is gone."""


class Workers:
    """`count` processes that call `work(argument)`, which must neither raise nor return None, on one task at a time.

    A process that is killed or dies is replaced. The time that one takes to start is no task's.
    """

    def __init__(self, count: int, work: Callable[[Any], Any], context: ForkServerContext) -> None:
        self._work, self._context = work, context
        self._workers = [self._start() for _ in range(count)]

    def run(self, tasks: Iterable[Task], stop: Connection) -> Iterator[tuple[Any, Any]]:
        """(key, result) of each task as they come; the result is what `work` returned, Killed() or Died().

        Raises:
            Stopped: the other end of `stop` was closed.
            RuntimeError: a process ended before it had a task.
        """
        waiting = deque(tasks)
        while waiting or any(worker.task for worker in self._workers):
            for at, worker in enumerate(self._workers):
                if waiting and worker.ready and worker.task is None:
                    if not worker.process.is_alive():  # it ended after its last task
                        self._workers[at] = self._start()
                    else:
                        worker.give(waiting.popleft())
            until = min(worker.until for worker in self._workers)
            ends = [end for worker in self._workers for end in (worker.pipe, worker.process.sentinel)]
            if stop in wait([stop, *ends], None if until == inf else max(until - time.monotonic(), 0)):
                raise Stopped
            for at, worker in enumerate(self._workers):
                task = worker.task
                result = worker.result()
                if isinstance(result, Killed | Died):
                    worker.end()
                    self._workers[at] = self._start()
                if task is not None and result is not None:
                    yield task.key, result

    def stop(self) -> None:
        """Ends every process; no `run` afterwards."""
        for worker in self._workers:
            worker.end()

    def _start(self) -> "_Worker":
        pipe, far_end = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(far_end, self._work))
        process.start()
        far_end.close()
        return _Worker(process, pipe)


@dataclass(slots=True, eq=False)
class _Worker:
    process: BaseProcess
    pipe: "Connection[Any, Any]"
    ready: bool = False
    task: Task | None = None
    until: float = inf  # when its task's time is up

    def give(self, task: Task) -> None:
        self.task, self.until = task, time.monotonic() + task.seconds
        with suppress(OSError):  # it has just died, which its result will be
            self.pipe.send(task.argument)

    def result(self) -> Any:
        """What came of the task, None while nothing has."""
        alive = self.process.is_alive()  # asked first: what it wrote before it ended counts
        try:
            if self.pipe.poll():
                message = self.pipe.recv()
                if not self.ready:
                    self.ready = True
                    return None
                self.task, self.until = None, inf
                return message
        except (EOFError, OSError):
            return self._died()
        if not alive:
            return self._died()
        return Killed() if time.monotonic() >= self.until else None

    def _died(self) -> Died:
        if not self.ready:
            raise RuntimeError("a verifier's process ended before it had anything to do")
        self.process.join(timeout=1)  # its pipe may have been closed before it ended
        return Died(self.process.exitcode)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _serve(pipe: "Connection[Any, Any]", work: Callable[[Any], Any]) -> None:
    """A worker's life, until the other end is closed."""
    with suppress(EOFError, OSError):
        pipe.send("ready")
        while True:
            pipe.send(work(pipe.recv()))
