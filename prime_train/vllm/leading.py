"""vLLM for several processes: the one that leads asks the servers, all have the answers and gather the weights."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from ..distributed import World
from ..models import LanguageModel
from ..records import Response
from ..served import served_weights
from .engine import VLLMEngine

SIGN_OF_LIFE_S = 10.0
"""Between two times that the process which leads tells the others that it is still sampling."""


class LeadingEngine:
    """The `Engine` of a process among several, of which one has the engine proper.

    Args:
        engine: makes it, where this process leads.
        policy: whose weights are served, sharded over the processes or not.
    """

    def __init__(self, engine: Callable[[], VLLMEngine], policy: LanguageModel, world: World) -> None:
        self._make, self._policy, self._world = engine, policy, world
        self._engine: VLLMEngine | None = None

    def __enter__(self) -> Self:
        def enter() -> None:
            if self._world.leads:
                self._engine = self._make().__enter__()

        self._world.each(enter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.__exit__(kind, error, traceback)

    def refresh(self, version: int) -> None:
        def act() -> None:
            if self._engine is not None:
                self._engine.refresh(version)
            else:
                for _ in served_weights(self._policy):  # gathering them takes every process
                    pass

        self._world.each(act)

    def rest(self) -> None:
        self._world.each(lambda: None if self._engine is None else self._engine.rest())

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Response]]:  # fmt: skip
        if self._engine is None:
            return self._wait(progress)
        world, last, told = self._world, time.monotonic(), False

        def alive(tokens: int) -> None:
            """Shows the others, who else would take this process for lost, that it works; hears whether they do."""
            nonlocal last, told
            progress(tokens)
            if time.monotonic() - last > min(SIGN_OF_LIFE_S, world.timeout.total_seconds() / 4):
                told = True  # what this raises, all processes raise
                world.each(lambda: None)
                last, told = time.monotonic(), False

        try:
            found = self._engine.sample(
                prompts, n=n, temperature=temperature, max_tokens=max_tokens, seeds=seeds, progress=alive
            )
        except Exception as error:
            if not told:
                world.each(partial(_raise, error))
            raise
        return _answer(world.each(lambda: found))

    def _wait(self, progress: Callable[[int], None]) -> list[list[Response]]:
        """Until there are responses; takes note of signs of life, and of what `progress` raises, meanwhile."""
        while True:
            heard = self._world.each(lambda: progress(0))
            if heard[0] is not None:
                return _answer(heard)


def _answer(heard: Sequence[list[list[Response]] | None]) -> list[list[Response]]:
    assert heard[0] is not None
    return heard[0]


def _raise(error: Exception) -> None:
    raise error
