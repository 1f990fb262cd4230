"""Batches of rollouts by step, in turn with training or one ahead of it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from types import TracebackType
from typing import Self

from ..run.interrupt import Interrupted
from .collect import Collected


class Ahead:
    """Makes batches by `collect(step, check)`, which is to call check often and to let out what that raises.

    Where one batch is to be ahead, `begin` starts it in a thread; otherwise each is made when it is taken. A batch that
    was begun comes from weights one step older than those that train on it: its lag, which importance weights correct.
    Leaving the context stops a batch that nobody will take.
    """

    def __init__(
        self, collect: Callable[[int, Callable[[], None]], Collected], check: Callable[[], None], *, ahead: int,
        last: int,
    ) -> None:  # fmt: skip
        self._collect, self._check, self._ahead, self._last = collect, check, ahead, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: Future[Collected] | None = None
        self._stopped = Event()

    def begin(self, step: int) -> None:
        """Starts the step's batch, if one is to be ahead and the run has that step."""
        if self._ahead and step <= self._last:
            self._begun = self._thread.submit(self._collect, step, self._stop_or_check)

    def take(self, step: int) -> tuple[Collected, int]:
        """The step's batch, and by how many steps its weights are older than the policy."""
        if self._begun is None:
            return self._collect(step, self._check), 0
        begun, self._begun = self._begun, None
        return begun.result(), 1

    def settle(self) -> None:
        """Waits for a batch that was begun. What became of it, `take` tells."""
        if self._begun is not None:
            wait([self._begun])

    def _stop_or_check(self) -> None:
        if self._stopped.is_set():
            raise Interrupted
        self._check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.shutdown()
