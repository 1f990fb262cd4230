"""How the policy's weights get into the servers.

A transport takes a snapshot of the weights and then has each server load it, as often as that is needed: a server that
was started anew loads the snapshot again. `FileTransport` works everywhere. vLLM's own routes for GPUs
(`--weight-transfer-config` with backend nccl or ipc; /init_weight_transfer_engine, /start_weight_update,
/update_weights, /finish_weight_update) fit the same three methods; their sending side is Python code inside vLLM, or an
NCCL rendezvous, and not HTTP, so they are left out.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

import torch

from ..models import LanguageModel
from .client import Server


class Transport(Protocol):
    def publish(self, model: LanguageModel) -> None:
        """Takes a snapshot of the weights, in the precision that the model computes in."""

    async def load(self, server: Server) -> None:
        """Has the server load the last snapshot; returns when it has."""

    def close(self) -> None:
        """Frees the snapshot."""


class FileTransport:
    """Snapshots as safetensors in a directory of their own below `directory`, which the servers must see as well, by
    the same name.

    In shared memory a snapshot costs a copy. One is held at a time, and is complete where its directory exists.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._root = Path(tempfile.mkdtemp(prefix=f"prime-weights-{os.getpid()}-", dir=directory))
        # Servers may run as another user.
        self._root.chmod(0o755)
        self._count = 0

    @property
    def snapshot(self) -> Path:
        return self._root / f"snapshot-{self._count}"

    def publish(self, model: LanguageModel) -> None:
        shutil.rmtree(self.snapshot, ignore_errors=True)
        partial = self._root / "partial"
        weights = {
            name: tensor.to(model.compute_dtype) if tensor.is_floating_point() else tensor
            for name, tensor in model.transformer.state_dict().items()
        }
        with torch.no_grad():
            model.transformer.save_pretrained(partial, state_dict=weights)
        self._count += 1
        partial.rename(self.snapshot)

    async def load(self, server: Server) -> None:
        # Always with the path: without one vLLM loads again what it was started with.
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.snapshot)}}
        await server.call("POST", "/collective_rpc", body)

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
