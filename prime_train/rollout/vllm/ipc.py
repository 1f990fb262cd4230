"""Weights within one GPU's memory, to servers that share it with the trainer, by CUDA IPC.

One buffer of the trainer's is opened by the server (its handle travels over HTTP, pickled, which the server accepts
with `ALLOW_PICKLES` in its environment), filled again and again, and copied from while the server answers. So a server
with one worker alone can be served, on the very GPU that the trainer uses.

What a GPU has not confirmed yet: CUDA's handles and their reference counts, and speed. The requests have been run
against the receiving side's own code, with a file in the place of the GPU's memory.
"""

import base64
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ...models.snapshot import Piece, Weights, cut, nbytes
from .client import Server
from .errors import ServerError
from .transport import Update
from .weights import Kept, described, fill

BUFFER_BYTES = 2**28
"""Of the buffer, where neither a single tensor is larger nor all of them smaller."""
ALLOW_PICKLES = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Whoever reaches such a server can have it run any code, so it must listen on this machine alone."""


class IpcTransport:
    """Hands over pieces of the weights through a buffer on `device`, this process's GPU.

    Args:
        keep: weights can be loaded more than once, from a copy in host memory; without it once.
    """

    def __init__(self, device: torch.device, *, keep: bool) -> None:
        self._device, self._keep = device, keep
        self._weights: Weights | None = None
        self._served: list[str] = []
        """URLs of servers whose last update is known to be finished."""

    def publish(self, weights: Weights) -> None:
        self._weights = replace(weights, tensors=Kept(weights.tensors)) if self._keep else weights

    async def load(self, servers: Sequence[Server], version: str) -> None:
        assert self._weights is not None
        for server in servers:
            workers = (await server.call("GET", "/get_world_size")).get("world_size")
            if workers != 1:
                raise ServerError(
                    f"{server.url} has {workers} workers; vllm.transport ipc reaches one, use nccl or file"
                )
        update, urls = Update(servers), [server.url for server in servers]
        await update.init([{"packed": True}] * len(servers))
        if self._served != urls:
            await update.settle()
        self._served = []
        await self._hand_over(update, self._weights)
        self._served = urls
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()

    async def close(self, servers: Sequence[Server]) -> None:
        self._weights = None

    async def _hand_over(self, update: Update, weights: Weights) -> None:
        """The buffer outlives `finish`, where servers let go of it."""
        largest = max(info.nbytes for info in weights.manifest)
        buffer = allocate(max(largest, min(BUFFER_BYTES, nbytes(weights.manifest))), self._device)
        # A handle for each server: CUDA counts those who have let go, and each handle counts for one.
        handles = [export(buffer) for _ in update.servers]
        tensors = iter(weights.tensors)
        await update.start()
        for piece in cut(weights.manifest, len(buffer)):
            fill(buffer, piece, tensors)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            await update.update([handed_over(piece, handle) for handle in handles])
        await update.finish()


def allocate(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def export(buffer: Tensor) -> dict[str, tuple[Any, ...]]:
    """The GPU, by its UUID, and what its owner's memory is opened with in another process."""
    _, arguments = reduce_tensor(buffer)
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): arguments}


def handed_over(piece: Piece, handle: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What a server is told of a piece that lies in the buffer."""
    return described(piece) | {
        "tensor_sizes": [info.nbytes for info in piece],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handle)).decode(),
    }
