"""How what transports carry is kept, cut and described for vLLM."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.served import TensorInfo
from ...models.snapshot import Piece, take


class Kept:
    """Tensors that can be gone through again and again, the second time from copies in host memory.

    Whoever stops in the middle leaves the rest to the next.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._coming = iter(tensors)
        self._copies: list[tuple[str, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._copies
        for name, tensor in self._coming:
            self._copies.append((name, tensor.to("cpu", copy=True)))
            yield name, tensor


def cut_past(manifest: Sequence[TensorInfo], limit: int) -> list[Piece]:
    """Pieces that end with the tensor that takes them past `limit` bytes, which is where vLLM expects a broadcast to
    end."""
    pieces: list[list[TensorInfo]] = []
    size = limit + 1
    for info in manifest:
        if size > limit:
            pieces.append([])
            size = 0
        pieces[-1].append(info)
        size += info.nbytes
    return [tuple(piece) for piece in pieces]


def fill(buffer: Tensor, piece: Piece, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes the piece's tensors, the next ones, one behind the other into the bytes of the buffer."""
    at = 0
    for info, tensor in zip(piece, take(piece, tensors), strict=True):
        buffer[at : at + info.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        at += info.nbytes


def described(piece: Iterable[TensorInfo]) -> dict[str, Any]:
    """The piece as vLLM is told of it."""
    infos = tuple(piece)
    return {
        "names": [info.name for info in infos],
        "dtype_names": [str(info.dtype).removeprefix("torch.") for info in infos],
        "shapes": [list(info.shape) for info in infos],
    }
