"""vLLM for several processes: the one that leads asks the servers, all have the answers and gather the weights."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from ...models.distributed import World
from ...models.language_model import LanguageModel
from ...models.served import served_weights
from ...records import Response
from .engine import VLLMEngine, release_memory

SIGN_OF_LIFE_S = 10.0
"""Between two times that the process which leads tells the others that it is still there."""

T = TypeVar("T")


def nothing() -> None:
    pass


class LeadingEngine:
    """The `Engine` of a process among several, of which one has the engine proper.

    However long that one waits for servers, the others know that it is there, and so wait no longer than they should
    for one that is not.

    Args:
        engine: makes it, where this process leads; what it is given is to be called often while servers are waited for.
        policy: whose weights are served, sharded over the processes or not.
    """

    def __init__(
        self, engine: Callable[[Callable[[], None]], VLLMEngine], policy: LanguageModel, world: World
    ) -> None:  # fmt: skip
        self._make, self._policy, self._world = engine, policy, world
        self._engine: VLLMEngine | None = None
        self._shown, self._showing = 0.0, False

    def __enter__(self) -> Self:
        def enter() -> None:
            self._engine = self._make(self._show_life).__enter__()

        self._together(enter, first=release_memory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.__exit__(kind, error, traceback)

    def refresh(self, version: int) -> None:
        def gather() -> None:
            for _ in served_weights(self._policy):  # takes every process
                pass
            release_memory()

        self._together(lambda: self._own.refresh(version), first=gather)

    def rest(self) -> None:
        self._together(lambda: self._own.rest())

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Response]]:  # fmt: skip
        return self._together(
            lambda: self._own.sample(
                prompts, n=n, temperature=temperature, max_tokens=max_tokens, seeds=seeds, progress=progress
            ),
            meanwhile=lambda: progress(0),
        )

    @property
    def _own(self) -> VLLMEngine:
        assert self._engine is not None
        return self._engine

    def _together(
        self, lead: Callable[[], T], *, first: Callable[[], None] = nothing, meanwhile: Callable[[], None] = nothing
    ) -> T:
        """What `lead` returns on the process that leads, on all of them; likewise what it raises.

        Args:
            first: what the others do before they listen.
            meanwhile: what they do whenever the one that leads shows life; what it raises ends `lead`.
        """
        world = self._world
        if not world.leads:
            act = first
            while not world.each(act)[0]:
                act = meanwhile
            return world.first(lead)  # what it returned there
        self._shown, self._showing = -math.inf, False
        try:
            found = lead()
        except Exception as error:
            if not self._showing:  # else all have raised it
                world.each(partial(_raise, error))
            raise
        world.each(lambda: True)
        return world.first(lambda: found)

    def _show_life(self) -> None:
        """To the others, at once the first time and then every so often; hears what they raise."""
        if time.monotonic() - self._shown > min(SIGN_OF_LIFE_S, self._world.timeout.total_seconds() / 4):
            self._showing = True
            self._world.each(nothing)
            self._shown, self._showing = time.monotonic(), False


def _raise(error: Exception) -> None:
    raise error
