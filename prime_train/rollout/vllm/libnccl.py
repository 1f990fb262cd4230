"""NCCL by ctypes: what it takes to broadcast from one process to others that PyTorch's own groups cannot reach.

Nothing here waits. A communicator is made non-blocking (`ncclConfig_t.blocking = 0`, NCCL ≥ 2.14), so that whoever
waits can also look at a clock, and give up.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import torch
from torch import Tensor

LIBRARY = "libnccl.so.2"
"""The one that PyTorch for CUDA comes with is found by this name once torch is imported."""
SUCCESS, IN_PROGRESS = 0, 7
UINT8, FLOAT32, SUM = 1, 7, 0


class NcclError(RuntimeError):
    """What NCCL says went wrong."""


class UniqueId(ctypes.Structure):
    """Tells every member of a group where its first one waits for them."""

    _fields_ = [("internal", c_char * 128)]


class _Config(ctypes.Structure):
    """`ncclConfig_t` as of the version it names; NCCL gives whatever was added later its default."""

    _fields_ = [("size", c_size_t), ("magic", c_uint), ("version", c_uint), ("blocking", c_int)]


_MAGIC, _VERSION = 0xCAFEBEEF, 21400
_SIGNATURES: dict[str, list[Any]] = {
    "ncclGetErrorString": [c_int],
    "ncclGetVersion": [POINTER(c_int)],
    "ncclGetUniqueId": [POINTER(UniqueId)],
    "ncclCommInitRankConfig": [POINTER(c_void_p), c_int, UniqueId, c_int, POINTER(_Config)],
    "ncclCommGetAsyncError": [c_void_p, POINTER(c_int)],
    "ncclAllReduce": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclBroadcast": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclCommAbort": [c_void_p],
}


class Library:
    """A loaded libnccl.

    Raises:
        OSError: there is none, or one too old.
    """

    def __init__(self, path: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            try:
                getattr(self._library, name).argtypes = arguments
            except AttributeError:
                raise OSError(f"{path} has no {name}; NCCL 2.14 or newer is needed") from None
        self._library.ncclGetErrorString.restype = c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Raises NcclError unless the call succeeded, or will."""
        self.check(getattr(self._library, name)(*arguments))

    def check(self, result: int) -> None:
        if result not in (SUCCESS, IN_PROGRESS):
            said = self._library.ncclGetErrorString(result).decode()
            raise NcclError(f"NCCL {self.version}: {said} (NCCL_DEBUG=WARN in the environment has it say more)")

    @property
    def version(self) -> str:
        found = c_int()
        self._library.ncclGetVersion(byref(found))
        return f"{found.value // 10000}.{found.value // 100 % 100}.{found.value % 100}"

    def unique_id(self) -> bytes:
        """128 bytes by which a new group finds together; its first member must be in this process."""
        found = UniqueId()
        self.call("ncclGetUniqueId", byref(found))
        return bytes(found)


class Communicator:
    """The first member, rank 0, of a group of `size` on a device. Before each call the last must be `ready`.

    Raises:
        NcclError: from every method.
    """

    def __init__(self, library: Library, unique_id: bytes, size: int, device: torch.device) -> None:
        self._library, self._device = library, device
        # NCCL takes the process's current device, which this is, and which has a context once something lies on it.
        self._one = torch.zeros(1, dtype=torch.float32, device=device)
        self._handle = c_void_p()
        config = _Config(ctypes.sizeof(_Config), _MAGIC, _VERSION, 0)
        library.call(
            "ncclCommInitRankConfig", byref(self._handle), size, UniqueId.from_buffer_copy(unique_id), 0, byref(config)
        )

    def ready(self) -> bool:
        """Whether the last call has come through: for the first, whether all members are there."""
        state = c_int()
        self._library.call("ncclCommGetAsyncError", self._handle, byref(state))
        self._library.check(state.value)
        return state.value == SUCCESS

    def reduce_one(self) -> None:
        """Sums one number over the group, as vLLM's side does first of all."""
        at = self._one.data_ptr()
        self._library.call("ncclAllReduce", at, at, 1, FLOAT32, SUM, self._handle, self._stream())

    def broadcast(self, buffer: Tensor) -> None:
        """Sends the buffer's bytes to the group, in the order of the device's current stream."""
        at = buffer.data_ptr()
        self._library.call("ncclBroadcast", at, at, buffer.numel(), UINT8, 0, self._handle, self._stream())

    def sent(self) -> Callable[[], bool]:
        """Tells whether all that was called for until now has happened on the device."""
        if self._device.type != "cuda":
            return lambda: True
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.query

    def abort(self) -> None:
        """Leaves the group, whatever the others are doing."""
        self._library.call("ncclCommAbort", self._handle)

    def _stream(self) -> int:
        """A CPU has none; there only a stand-in for NCCL can run."""
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
