"""Requests to vLLM servers: one attempt, attempts until a deadline, and several servers that share the work.

A request is worth repeating when nothing came back, or the server broke down (5xx), or what came back is not whole.
It is not when the server says that the request is wrong (4xx), sampled from other weights than it should have, or cut
a response short.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from ...records import Response
from .errors import ServerError, Unavailable

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between the first two attempts, doubled after each, and at most."""
ATTEMPT_SHARE = 1 / 2
"""Of the deadline that one attempt may take: a server that hangs leaves time to ask again."""
QUIET_S, REMIND_S = 5.0, 60.0
"""For which nothing is said of a request that fails, and between two words on those for samples."""
EXCERPT = 300
"""Characters of an answer that an error shows."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What to sample from a prompt, and from which weights."""

    n: int
    temperature: float
    max_tokens: int
    seed: int
    eos: tuple[int, ...]
    """The tokens that end a response; no others do."""
    version: str
    """Label of the weights that every token must come from."""
    context: int | None = None
    """Tokens of the longest sequence that the model takes, where that is known."""

    def body(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Whatever shapes the distribution is said, so that no default of the server or the model does."""
        return {
            "token_ids": list(prompt),
            "sampling_params": {
                "n": self.n, "temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed,
                "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": list(self.eos), "logprobs": 0,
                "detokenize": False,
            },
        }  # fmt: skip


class Server:
    """A vLLM server at a URL."""

    def __init__(self, url: str, http: httpx2.AsyncClient, deadline: float) -> None:
        self.url, self.http, self.deadline = url, http, deadline

    async def attempt(self, method: str, path: str, body: Any = None, *, limit: float | None = None) -> dict[str, Any]:
        """The JSON object that one request is answered with.

        Args:
            limit: seconds; a share of the deadline unless given.

        Raises:
            Unavailable: no connection, no answer in time, 5xx, not JSON.
            ServerError: 4xx.
        """
        limit = self.deadline * ATTEMPT_SHARE if limit is None else limit
        asked = f"{method} {self.url}{path}"
        try:
            async with asyncio.timeout(limit):
                answer = await self.http.request(method, self.url + path, json=body)
        except TimeoutError:
            raise Unavailable(f"{asked}: no answer within {limit:.3g} s") from None
        except httpx2.HTTPError as error:
            raise Unavailable(f"{asked}: {type(error).__name__}: {error}") from None
        if answer.status_code >= 500:
            raise Unavailable(f"{asked}: {answer.status_code}: {answer.text[:EXCERPT]}")
        if answer.status_code >= 400:
            raise ServerError(f"{asked}: {answer.status_code}: {answer.text[:EXCERPT]}")
        try:
            return dict(answer.json())
        except (TypeError, ValueError):
            raise Unavailable(f"{asked}: answered with what is no JSON object: {answer.text[:EXCERPT]!r}") from None

    async def call(self, method: str, path: str, body: Any = None, *, long: bool = False) -> dict[str, Any]:
        """`attempt` until it succeeds or the deadline is over; says when it has to wait.

        Args:
            long: one attempt may take all of the deadline. The server does not stop when nobody listens any more, so
                what is asked again too soon only waits behind itself.
        """
        clock = asyncio.get_running_loop().time
        least, end = self.deadline * ATTEMPT_SHARE, clock() + self.deadline

        def attempt() -> Awaitable[dict[str, Any]]:
            return self.attempt(method, path, body, limit=max(least, end - clock()) if long else least)

        return await persistently(attempt, self.deadline, waiting=logger.warning)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> list[Response]:
        """One attempt at n responses to a prompt."""
        answer = await self.attempt("POST", "/inference/v1/generate", sampling.body(prompt))
        try:
            return [_response(choice, len(prompt), sampling) for choice in _choices(answer, sampling.n)]
        except (LookupError, TypeError, ValueError) as error:
            raise Unavailable(f"{self.url}: an answer that is not whole: {type(error).__name__}: {error}") from None
        except Refused as error:
            raise ServerError(f"{self.url}: {error}") from None


class Refused(Exception):
    """A response that is whole and not what was asked for, nor would be if it were asked for again."""


def _choices(answer: Any, n: int) -> list[Any]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != n:
        raise ValueError(f"{len(choices)} responses where {n} were asked for")
    return choices


def _response(choice: Any, prompt_length: int, sampling: Sampling) -> Response:
    tokens = tuple(choice["token_ids"])
    if choice["finish_reason"] not in ("stop", "length") or not tokens:
        raise ValueError(f"a response of {len(tokens)} tokens that ended by {choice['finish_reason']!r}")
    versions = {span["version"] for span in choice["weight_versions"]}
    if versions != {sampling.version}:
        found = ", ".join(sorted(versions)) or "unknown ones"
        raise Refused(f"a response from weights {found} was refused: those of {sampling.version} are wanted")
    logprobs = choice["logprobs"]["content"]
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(logprobs)} log-probs for {len(tokens)} tokens")
    # vLLM ends a sequence at its --max-model-len, in the same words. That may be the model's own limit, not a smaller.
    short = choice["finish_reason"] == "length" and len(tokens) < sampling.max_tokens
    if short and prompt_length + len(tokens) < (sampling.context or math.inf):
        raise Refused(
            f"a response to {prompt_length} tokens was cut off after {len(tokens)} of {sampling.max_tokens}: "
            "the server's --max-model-len is too small"
        )
    logp = tuple(math.nan if known["logprob"] is None else float(known["logprob"]) for known in logprobs)
    return Response(tokens=tokens, logp=logp, finished=tokens[-1] in sampling.eos)


class Pool:
    """Servers of the same weights that share requests."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers
        self.busy: Counter[str] = Counter()
        self._said = -math.inf

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> list[Response]:
        """n responses, from the server with the fewest requests; after a failure, from another if there is one.

        Raises:
            ServerError: no attempt succeeded before the deadline; with the last one's URL and error.
        """
        failed_at: Server | None = None

        async def attempt() -> list[Response]:
            nonlocal failed_at
            others = [server for server in self.servers if server is not failed_at] or self.servers
            server = failed_at = min(others, key=lambda server: self.busy[server.url])
            self.busy[server.url] += 1
            try:
                return await server.generate(prompt, sampling)
            finally:
                self.busy[server.url] -= 1

        return await persistently(attempt, self.servers[0].deadline, waiting=self._say)

    def _say(self, error: str) -> None:
        """Once for many requests that fail alike."""
        if (now := asyncio.get_running_loop().time()) - self._said > REMIND_S:
            self._said = now
            logger.warning(error)


async def persistently(
    attempt: Callable[[], Awaitable[T]], deadline: float, *, waiting: Callable[[str], None] = lambda error: None
) -> T:
    """Repeats what is `Unavailable`, after ever longer pauses, until `deadline` seconds are over.

    waiting is told the error, once, when that has taken a while.

    Raises:
        ServerError: with the last attempt's error.
    """
    clock = asyncio.get_running_loop().time
    begun, pause, told = clock(), FIRST_PAUSE, False
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            if clock() + pause > begun + deadline:
                raise ServerError(f"given up after {deadline:.3g} s; the last error: {error}") from None
            if not told and clock() > begun + QUIET_S:
                waiting(f"asking again for up to {deadline:.3g} s: {error}")
                told = True
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def together(work: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Waits for all of the work; the first error ends the rest."""
    tasks = [asyncio.create_task(w) for w in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def connected(urls: Sequence[str], deadline: float) -> AsyncIterator[list[Server]]:
    """Servers that can be talked to within. Proxies of the environment are not used; deadlines are `Server`'s own."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(trust_env=False, timeout=None, limits=limits) as http:
        yield [Server(url, http, deadline) for url in urls]
