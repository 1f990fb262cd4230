"""The rollout engine whose tokens come from vLLM servers."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ...models.language_model import LanguageModel
from ...models.snapshot import Weights
from ...records import Response
from .client import Pool, Sampling, Server, connected, persistently, together
from .errors import ServerDied, ServerError, Unavailable
from .server import ServerProcess
from .transport import Transport

CONCURRENCY = 64
"""Prompts at a time for each server, each with its n responses."""
TICK_S = 0.25
"""Between two looks at the server's process and at whether sampling should stop."""
RESTARTS = 3
"""Of a server that dies, in one refresh or one call of `sample`."""


class VLLMEngine:
    """The `Engine` over servers at `urls`, or over one that it starts itself.

    A server of its own is started anew when it dies, given the weights of the last refresh, and asked for what is
    missing. Every response says which weights each of its tokens is from; any but those of the last refresh are an
    error. Sampled tokens differ from the embedded engine's for the same seed; greedy ones do not.

    Args:
        policy: whose weights are served.
        eos: every token that ends a response.
        urls: servers that run already; without any, `process` is the server.
        sleeps: whether `process` gives its GPU up in `rest` (vLLM's --enable-sleep-mode).
        deadline: seconds for one request and all its repetitions.
        waiting: called every so often while servers are waited for, but not before all weights of a refresh have been
            gathered; what it raises ends the waiting.

    Raises:
        ServerError: from every method, when a server cannot be used; says which and why.
    """

    def __init__(
        self, policy: LanguageModel, transport: Transport, *, eos: Sequence[int], deadline: float,
        urls: Sequence[str] = (), process: ServerProcess | None = None, sleeps: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if bool(urls) == (process is not None):
            raise ValueError("either urls or a process of the engine's own, got both or neither")
        self.policy, self.transport, self.eos, self.deadline = policy, transport, tuple(eos), deadline
        self.process, self.sleeps = process, sleeps
        self._urls = list(urls)
        # Tells this engine's weights from those that another run, or an earlier one, left in the same server.
        self._run = secrets.token_hex(4)
        self._version: str | None = None
        self._asleep = self._gathering = False
        self._waiting = waiting

    def __enter__(self) -> Self:
        try:
            if self.process is not None:
                self._make_room()
                self.process.start(self._tick)
        except BaseException:
            asyncio.run(self.transport.close([]))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if self.process is not None:
                stack.callback(self.process.stop)
            stack.callback(lambda: asyncio.run(self._part()))

    @property
    def urls(self) -> list[str]:
        return self._urls if self.process is None else [self.process.url]

    def refresh(self, version: int) -> None:
        self._version = f"{self._run}/{version}"
        weights = Weights.of(self.policy)
        weights = replace(weights, tensors=self._gathered(weights))
        self._gathering = True
        try:
            self.transport.publish(weights)
            self._surviving(lambda: asyncio.run(self._on_all(self._load)))
        finally:
            # Other processes that gather a sharded model with this one must not be left waiting in the rest of it.
            for _ in weights.tensors:
                pass
            self._gathering = False
        self._asleep = False

    def _gathered(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for i, found in enumerate(weights.tensors, 1):
            self._gathering = i < len(weights.manifest)
            yield found

    def rest(self) -> None:
        if self.sleeps:
            self._surviving(lambda: asyncio.run(self._on_all(self._put_to_sleep)))
            self._asleep = True

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Response]]:  # fmt: skip
        if self._version is None or self._asleep:
            raise ServerError("the servers must be refreshed before they are sampled from")
        # vLLM gives the i-th of a prompt's responses the prompt's seed + i: prompts' seeds lie far apart.
        wanted = [
            Sampling(
                n=n, temperature=temperature, max_tokens=max_tokens, seed=seed, eos=self.eos,
                version=self._version,
                context=getattr(self.policy.transformer.config, "max_position_embeddings", None),
            )
            for seed in seeds
        ]  # fmt: skip
        found: dict[int, list[Response]] = {}
        self._surviving(lambda: asyncio.run(self._sample(prompts, wanted, found, progress)))
        return [found[i] for i in range(len(prompts))]

    async def _sample(
        self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sampling], found: dict[int, list[Response]],
        progress: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Adds to `found` what it has not got yet."""
        sampled = 0
        async with connected(self.urls, self.deadline) as servers:
            pool, free = Pool(servers), asyncio.Semaphore(CONCURRENCY * len(servers))

            async def one(i: int) -> None:
                nonlocal sampled
                async with free:
                    found[i] = await pool.generate(prompts[i], wanted[i])
                sampled += sum(len(response.tokens) for response in found[i])

            def look() -> None:
                nonlocal sampled
                told, sampled = sampled, 0
                progress(told)

            await self._watched([one(i) for i in range(len(prompts)) if i not in found], look)

    async def _on_all(self, act: Callable[[Sequence[Server]], Coroutine[Any, Any, None]]) -> None:
        async with connected(self.urls, self.deadline) as servers:
            await self._watched([act(servers)])

    async def _load(self, servers: Sequence[Server]) -> None:
        """Gives the servers the weights last published and makes sure that these are what they serve."""
        assert self._version is not None
        if self._asleep:
            self._make_room()
            await together(server.call("POST", "/wake_up?tags=weights", long=True) for server in servers)
        await self.transport.load(servers, self._version)
        if self._asleep:
            self._make_room()
            await together(server.call("POST", "/wake_up?tags=kv_cache", long=True) for server in servers)
        await together(self._take_up(server) for server in servers)

    async def _take_up(self, server: Server) -> None:
        """Has the server go over to the weights that it was given."""

        async def forget() -> None:
            # Keys and values of the old weights; while a request that nobody waits for any more is being dropped, the
            # server answers that it could not.
            if not (await server.attempt("POST", "/reset_prefix_cache")).get("success"):
                raise Unavailable(f"{server.url}: requests still run that nobody waits for")

        await persistently(forget, self.deadline)
        await server.call("POST", "/update_weight_version", {"new_version": self._version})
        serves = (await server.call("GET", "/weight_info")).get("weight_version")
        if serves != self._version:
            raise ServerError(f"{server.url} says that it serves weights {serves} after it was given {self._version}")

    async def _put_to_sleep(self, servers: Sequence[Server]) -> None:
        await together(server.call("POST", "/sleep?level=2", long=True) for server in servers)

    async def _part(self) -> None:
        """A server of the engine's own is about to end: nothing has to be freed in it."""
        async with connected(self._urls, self.deadline) as servers:
            await self.transport.close(servers)

    async def _watched(
        self, work: Sequence[Coroutine[Any, Any, None]], look: Callable[[], None] = lambda: None
    ) -> None:
        """Waits for all of the work, of which the first error, or one that `look` raises, ends the rest."""
        tasks = {asyncio.create_task(w) for w in work}
        pending = tasks
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=TICK_S, return_when=asyncio.FIRST_EXCEPTION)
                if self.process is not None and (pending or any(task.exception() for task in done)):
                    self.process.check()
                for task in done:
                    task.result()
                look()
                self._tick()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _surviving(self, act: Callable[[], None]) -> None:
        """Acts; when the server of its own dies over it, starts another one with the same weights and acts again."""
        for restart in range(RESTARTS + 1):
            try:
                if restart:
                    self._revive()
                return act()
            except ServerDied:
                if restart == RESTARTS:
                    raise

    def _revive(self) -> None:
        assert self.process is not None
        self.process.stop()
        self._make_room()
        self.process.start(self._tick)
        self._asleep = False
        asyncio.run(self._on_all(self._load))

    def _tick(self) -> None:
        if not self._gathering:
            self._waiting()

    def _make_room(self) -> None:
        """What torch keeps of freed memory is what the server is about to take; on the other processes' GPUs too, which
        have done the same when they hear of this one."""
        release_memory()
        self._tick()


def release_memory() -> None:
    """Gives the GPU's memory that no tensor holds to whoever wants it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
