"""What the training loop asks of whatever samples its rollouts."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from ..records import Response


class Engine(Protocol):
    """A source of rollouts. As a context manager it holds whatever it needs: processes, connections, files."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def refresh(self, version: int) -> None:
        """Samples from the policy's weights as they are now; version is the number of steps they were trained for.
        Collective."""

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Response]]:  # fmt: skip
        """n responses to each prompt, of at most max_tokens tokens, from the weights of the last refresh. Collective:
        all processes ask for the same and get the same.

        Args:
            temperature: 0 takes the likeliest token, and then log-probs are those of temperature 1.
            seeds: of each prompt.
            progress: called every so often with the number of tokens sampled since its last call; what it raises stops
                the sampling.
        """

    def rest(self) -> None:
        """Gives up the accelerator's memory until the next refresh, where it can."""
