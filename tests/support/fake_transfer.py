"""The receiving side of vLLM's weight transfer without vLLM, by the same rules; for a server in fake_vllm.py.

What arrives is kept as bytes. They come through a libnccl (tests/support/standin/nccl.c) or, for CUDA IPC, from a file.
"""

import base64
import ctypes
import hashlib
import math
import pickle
import threading
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "uint8": 1}


class Refused(Exception):
    """What the server answers with 500."""


class _Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


class Receiver:
    """The workers of one server.

    Args:
        library: libnccl's path; without one weights come by CUDA IPC.
    """

    def __init__(self, library: str | None = None, workers: int = 1) -> None:
        self.workers = workers
        self.library = None if library is None else ctypes.CDLL(library)
        self.updating = self.half_done = False
        self.members: list[ctypes.c_void_p] = []
        self.init: dict[str, Any] = {}
        self.received: list[dict[str, bytes]] = [{} for _ in range(workers)]
        self.pieces: list[list[str]] = []

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """None to any other route."""
        routes = {
            "/get_world_size": lambda: {"world_size": self.workers},
            "/init_weight_transfer_engine": lambda: self.join(body["init_info"]),
            "/shutdown_weight_transfer_engine": self.leave,
            "/start_weight_update": self.start,
            "/update_weights": lambda: self.update(body["update_info"]),
            "/finish_weight_update": self.finish,
            "/digest": lambda: {"digest": digest(self.received[0])},
        }
        return (routes[path]() or {"message": "done"}) if path in routes else None

    def join(self, info: dict[str, Any]) -> None:
        self.init = info
        if self.library is None:
            if set(info) != {"packed"}:
                raise Refused(f"Invalid init_info: {sorted(info)}")
            return
        self.members = [ctypes.c_void_p() for _ in range(self.workers)]
        self.each(self.join_as)

    def join_as(self, k: int) -> None:
        info = self.init
        unique_id = _Id.from_buffer_copy(base64.b64decode(info["nccl_unique_id_b64"], validate=True))
        one = ctypes.c_float(0)
        self.call(
            "ncclCommInitRank", ctypes.byref(self.members[k]), info["world_size"], unique_id, info["rank_offset"] + k
        )
        self.call("ncclAllReduce", ctypes.byref(one), ctypes.byref(one), ctypes.c_size_t(1), 7, 0, self.members[k], 0)

    def leave(self) -> None:
        if self.updating:
            raise Refused("Cannot release a trainer connection during a weight update")
        for member in self.members:
            self.call("ncclCommAbort", member)
        self.members = []

    def start(self) -> None:
        if self.updating:
            raise Refused("start_weight_update called while a weight update is already active.")
        self.updating, self.received, self.pieces = True, [{} for _ in range(self.workers)], []

    def update(self, info: dict[str, Any]) -> None:
        if not self.updating:
            raise Refused("start_weight_update must be called before update_weights")
        if self.half_done:
            raise Refused("'Parameter' object has no attribute 'weight_loader'")
        sizes = {
            name: BYTES[dtype] * math.prod(shape)
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        }
        try:
            if self.library is None:
                self.open(info, sizes)
            elif not self.members:
                raise Refused("NCCL weight transfer not initialized")
            else:
                self.each(lambda k: self.receive(k, sizes))
        except Refused:
            self.updating, self.half_done = False, True
            raise

    def receive(self, k: int, sizes: dict[str, int]) -> None:
        """A broadcast ends with the tensor that takes it past the limit."""
        left = list(sizes)
        while left:
            piece: list[str] = []
            while left and sum(sizes[name] for name in piece) <= self.init["packed_buffer_size_bytes"]:
                piece.append(left.pop(0))
            size = sum(sizes[name] for name in piece)
            buffer = ctypes.create_string_buffer(size)
            self.call("ncclBroadcast", buffer, buffer, ctypes.c_size_t(size), 1, 0, self.members[k], 0)
            self.unpack(k, piece, sizes, buffer.raw)

    def open(self, info: dict[str, Any], sizes: dict[str, int]) -> None:
        [arguments] = pickle.loads(base64.b64decode(info["ipc_handles_pickled"])).values()
        if info["tensor_sizes"] != list(sizes.values()):
            raise Refused(f"tensor_sizes are {info['tensor_sizes']}, not {sizes}")
        with open(arguments[7], "rb") as file:
            self.unpack(0, list(sizes), sizes, file.read(sum(sizes.values())))

    def unpack(self, k: int, piece: list[str], sizes: dict[str, int], found: bytes) -> None:
        if k == 0:
            self.pieces.append(piece)
        for name in piece:
            self.received[k][name], found = found[: sizes[name]], found[sizes[name] :]

    def finish(self) -> None:
        if not self.updating:
            raise Refused("finish_weight_update called without a matching start_weight_update")
        self.updating = self.half_done = False

    def each(self, act: Any) -> None:
        """All workers at once, as they are processes of their own."""
        errors: list[BaseException] = []

        def run(k: int) -> None:
            try:
                act(k)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(k,)) for k in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def call(self, name: str, *arguments: Any) -> None:
        if result := getattr(self.library, name)(*arguments):
            raise Refused(f"{name}: NCCL error {result}")


def digest(tensors: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(name.encode() + content for name, content in sorted(tensors.items()))).hexdigest()
