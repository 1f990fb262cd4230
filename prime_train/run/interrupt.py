"""Ctrl-C and SIGTERM as a request to stop where it is safe."""

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """Raised where stopping is safe after a stop was requested."""


class Interrupts:
    """Within it the first SIGINT or SIGTERM is a request; a SIGINT after that stops the program at once.

    A further SIGTERM does not: schedulers and torchrun each send their own for one and the same stop. So one is around
    all that a command does, from before models are loaded until the last checkpoint is written.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        """The last request's signal; None before there is one."""
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self.last is not None

    def check(self) -> None:
        if self.requested:
            raise Interrupted

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.last = number
