"""Weights from the trainer's GPU to those of the servers, through NCCL.

The trainer and every worker of every server are one NCCL group: the trainer is rank 0, the servers' workers follow in
the servers' order, a server's own by their rank in it (tensor, pipeline and data parallel). The group finds together by
an NCCL unique id that each server is sent over HTTP, so the only address that matters is the one that NCCL takes for
its own, which NCCL_SOCKET_IFNAME chooses. NCCL wants the same version of itself everywhere and a GPU a member.

Tensors are broadcast packed: their bytes one behind the other, cut after the tensor that passes `PACKED_BYTES`. Servers
receive while they answer the request that says what is coming, so requests and broadcasts run side by side, in one
thread that never waits for either alone.

What a GPU has not confirmed yet: NCCL itself, CUDA's streams and events, and speed. Everything else has been run, the
receiving side's own code included, with a stand-in for libnccl that carries the same bytes.
"""

import asyncio
import base64
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from ...models.snapshot import Weights, nbytes
from .client import Server, together
from .errors import ServerError
from .libnccl import LIBRARY, Communicator, Library, NcclError
from .transport import Update
from .weights import Kept, cut_past, described, fill

PACKED_BYTES, PACKED_BUFFERS = 2**28, 2
"""Of a broadcast, and how many a server holds at a time; both sides must agree, so servers are told."""
POLL_S = 0.001
MARGIN_S = 5.0
"""By which the trainer waits longer than it lets a server wait: the server's failure has a name in it."""
FAREWELL_S = 10.0
"""That a server may take to leave the group at the end."""
STRANDED = "servers that were receiving may wait for the rest for ever: restart them (the run's own server is)"
"""vLLM receives without a limit of time, and NCCL does not tell it of every member that is gone."""


class NcclTransport:
    """Broadcasts from `device`, this process's GPU.

    The group is made at the first load, and again when a server has been started anew or stopped serving what it was
    given last.

    Args:
        keep: weights can be loaded more than once, from a copy in host memory. Without it once: gathering the tensors
            again may not be this process's to decide.

    Raises:
        OSError: there is no libnccl.
    """

    def __init__(self, device: torch.device, *, keep: bool, library: str = LIBRARY) -> None:
        self._device, self._keep, self._library = device, keep, Library(library)
        self._weights: Weights | None = None
        self._group: Communicator | None = None
        self._members: list[str] = []
        self._version: str | None = None

    def publish(self, weights: Weights) -> None:
        self._weights = replace(weights, tensors=Kept(weights.tensors)) if self._keep else weights

    async def load(self, servers: Sequence[Server], version: str) -> None:
        assert self._weights is not None
        if not await self._joined(servers):
            await self._join(servers)
        update = Update(servers)
        try:
            await update.start()
            await self._broadcast(self._weights, update)
            await update.finish()
        except BaseException:
            # Some member may be in the middle of a broadcast that nobody will end.
            self._leave()
            raise
        self._version = version

    async def close(self, servers: Sequence[Server]) -> None:
        if self._group is not None:
            self._leave()
            with contextlib.suppress(ServerError):
                await together(_leaving(server, FAREWELL_S) for server in servers)

    async def _joined(self, servers: Sequence[Server]) -> bool:
        """Whether these servers are the group's and still what they were: one that was started anew has forgotten."""
        if self._group is None or self._members != [server.url for server in servers]:
            return False
        serving = [await server.call("GET", "/weight_info") for server in servers]
        return all(info.get("weight_version") == self._version for info in serving)

    async def _join(self, servers: Sequence[Server]) -> None:
        self._leave()
        sizes = [int((await server.call("GET", "/get_world_size"))["world_size"]) for server in servers]
        await Update(servers).settle()
        await together(_leaving(server) for server in servers)
        *offsets, size = accumulate(sizes, initial=1)
        try:
            unique_id = self._library.unique_id()
            self._group = Communicator(self._library, unique_id, size, self._device)
        except NcclError as error:
            raise ServerError(f"no NCCL group with {_named(servers)}: {error}") from None
        infos = [membership(unique_id, offset, size) for offset in offsets]
        try:
            await together([self._in_time(self._assemble(), servers, "an NCCL group"), Update(servers).init(infos)])
        except BaseException:
            self._leave()
            raise
        self._members = [server.url for server in servers]

    async def _assemble(self) -> None:
        assert self._group is not None
        await _until(self._group.ready)
        self._group.reduce_one()
        await _until(self._group.ready)
        await _until(self._group.sent())

    async def _broadcast(self, weights: Weights, update: Update) -> None:
        sending = self._in_time(self._send(weights), update.servers, "a broadcast")
        try:
            await together([sending, update.update([described(weights.manifest)] * len(update.servers))])
        except ServerError as error:
            raise type(error)(f"{error}; {STRANDED}") from None

    async def _send(self, weights: Weights) -> None:
        assert self._group is not None
        tensors = iter(weights.tensors)
        for piece in cut_past(weights.manifest, PACKED_BYTES):
            buffer = torch.empty(nbytes(piece), dtype=torch.uint8, device=self._device)
            fill(buffer, piece, tensors)
            self._group.broadcast(buffer)
            await _until(self._group.ready)
            # Before anything else is asked of the GPU. Gathering and filling the next piece meanwhile would save little
            # and hang for ever where a server dies: a copy to or from the host and the allocator's cudaFree wait for
            # the broadcast inside CUDA, where no limit of time applies.
            await _until(self._group.sent())

    async def _in_time(self, work: Coroutine[Any, Any, None], servers: Sequence[Server], what: str) -> None:
        limit = max(server.deadline for server in servers) + MARGIN_S
        try:
            async with asyncio.timeout(limit):
                await work
        except TimeoutError:
            raise ServerError(f"{what} with {_named(servers)} was not complete after {limit:.3g} s") from None
        except NcclError as error:
            raise ServerError(f"{what} with {_named(servers)} failed: {error}") from None

    def _leave(self) -> None:
        group, self._group, self._members, self._version = self._group, None, [], None
        if group is not None:
            with contextlib.suppress(NcclError):
                group.abort()


def membership(unique_id: bytes, offset: int, size: int) -> dict[str, Any]:
    """How a server whose first worker is rank `offset` joins a group."""
    return {
        "nccl_unique_id_b64": base64.b64encode(unique_id).decode(), "rank_offset": offset, "world_size": size,
        "packed": True, "packed_buffer_size_bytes": PACKED_BYTES, "packed_num_buffers": PACKED_BUFFERS,
    }  # fmt: skip


async def _leaving(server: Server, limit: float | None = None) -> None:
    """Whatever group an earlier run left the server in."""
    if limit is None:
        await server.call("POST", "/shutdown_weight_transfer_engine")
    else:
        await server.attempt("POST", "/shutdown_weight_transfer_engine", limit=limit)


async def _until(condition: Callable[[], bool]) -> None:
    await asyncio.sleep(0)  # whatever answers have come in are looked at, however fast NCCL is
    while not condition():
        await asyncio.sleep(POLL_S)


def _named(servers: Sequence[Server]) -> str:
    return ", ".join(server.url for server in servers)
