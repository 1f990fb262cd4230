"""How the policy's weights get into the servers.

`FileTransport`, here, works everywhere. `NcclTransport` (nccl.py) and `IpcTransport` (ipc.py) speak vLLM's own weight
transfer, whose four routes `Update` asks: its HTTP side by HTTP, its tensors through NCCL and CUDA IPC.
"""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from ...models.snapshot import Weights, nbytes, write_snapshot
from .client import FIRST_PAUSE, Server, together
from .errors import ServerError
from .room import Claim, Room


class Transport(Protocol):
    """Weights are published once and loaded at least once: a server that was started anew needs them again.

    Raises:
        ServerError: from `load`, where a server cannot be given the weights in time; says which and why. From
            `publish`, where there is no place for them; says where.
    """

    def publish(self, weights: Weights) -> None:
        """Takes new weights in the old ones' place. They are gone through now, or in the first `load`."""

    async def load(self, servers: Sequence[Server], version: str) -> None:
        """Has all these servers, which share the work, hold the weights last published when it returns.

        Args:
            version: by which the servers will be told to call them afterwards.
        """

    async def close(self, servers: Sequence[Server]) -> None:
        """Frees what the weights took, in the servers too where they are still there; raises nothing."""


class FileTransport:
    """Snapshots as safetensors in a directory of their own below `directory`, which the servers must see as well, by
    the same name.

    In shared memory a snapshot costs a copy. One is held at a time, and is complete where its directory exists. What a
    killed process left is removed when the next one starts.

    Raises:
        ServerError: nothing can be written there.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._claim = Claim(directory)
        except OSError as error:
            raise ServerError(f"{directory}: there can be no snapshots of weights: {error}") from error
        self._count = 0

    @property
    def snapshot(self) -> Path:
        return self._claim.path / f"snapshot-{self._count}"

    def publish(self, weights: Weights) -> None:
        shutil.rmtree(self.snapshot, ignore_errors=True)
        try:
            self._write(weights)
        except (OSError, SafetensorError) as error:
            room = Room.now(self._claim.directory, nbytes(weights.manifest))
            raise ServerError(f"weights could not be written: {error}; {room}") from error

    def _write(self, weights: Weights) -> None:
        """All of them or nothing."""
        partial = self._claim.path / "partial"
        try:
            partial.mkdir()
            write_snapshot(partial, weights)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._count += 1
        partial.rename(self.snapshot)

    async def load(self, servers: Sequence[Server], version: str) -> None:
        # Always with the path: without one vLLM loads again what it was started with.
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.snapshot)}}
        await together(server.call("POST", "/collective_rpc", body, long=True) for server in servers)

    async def close(self, servers: Sequence[Server]) -> None:
        self._claim.release()


class Update:
    """vLLM's routes of weight transfer, on several servers at once.

    Each is asked once: a server that is told to start, or to finish, a second time refuses, and one that missed a
    broadcast cannot catch up. So a fault on the way is an error, which names the server.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers

    async def settle(self) -> None:
        """Has servers be done with an update that an earlier trainer began and did not finish.

        While one is open vLLM refuses any other, and the tensors of one that failed on the way it counts among the next
        one's. An update of nothing ends both: when vLLM finishes, it puts back what did not come.
        """

        async def one(server: Server) -> None:
            try:
                await server.attempt("POST", "/start_weight_update")
            except ServerError:  # one is open, and after a refusal vLLM hangs up
                await asyncio.sleep(FIRST_PAUSE)
            try:
                await server.attempt("POST", "/finish_weight_update")
            except ServerError as error:
                raise ServerError(
                    f"{error}; the server cannot end what an earlier run may have left half done: restart {server.url}"
                ) from None

        await together(one(server) for server in self.servers)

    async def init(self, infos: Sequence[dict[str, Any]]) -> None:
        await self._ask("/init_weight_transfer_engine", [{"init_info": info} for info in infos])

    async def start(self) -> None:
        await self._ask("/start_weight_update", [None] * len(self.servers))

    async def update(self, infos: Sequence[dict[str, Any]]) -> None:
        """Has each server receive what its info says."""
        await self._ask("/update_weights", [{"update_info": info} for info in infos])

    async def finish(self) -> None:
        await self._ask("/finish_weight_update", [None] * len(self.servers))

    async def _ask(self, path: str, bodies: Sequence[Any]) -> None:
        waited_for = [server.url for server in self.servers]

        async def one(server: Server, body: Any) -> None:
            try:
                await server.attempt("POST", path, body, limit=server.deadline)
            except ServerError as error:
                # Members of a group wait for each other, so who is late first need not be who is to blame.
                others = ", ".join(url for url in waited_for if url != server.url)
                raise type(error)(f"{error}{others and f'; not done yet either: {others}'}") from None
            waited_for.remove(server.url)

        await together(one(server, body) for server, body in zip(self.servers, bodies, strict=True))
