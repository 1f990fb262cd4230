"""Models on disk in the format of `transformers`, written file by file as their tensors come."""

import json
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .distributed import ALONE, World
from .language_model import LanguageModel
from .served import TensorInfo, served_files, served_manifest, served_weights

SHARD = 2**30
"""Bytes of a file of a snapshot, and so of what is held beside the model while one is written."""
ONE_FILE, SHARDED, INDEX = "model.safetensors", "model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"
Piece = tuple[TensorInfo, ...]
"""Tensors that travel together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's weights on their way to files or servers."""

    manifest: Sequence[TensorInfo]
    tensors: Iterable[tuple[str, Tensor]]
    """Names and tensors, as the manifest says. Gone through once, at the time that suits the transport: gathering them
    may be work for several processes."""
    files: Mapping[str, str]
    """Names and contents of what is saved beside them."""

    @classmethod
    def of(cls, model: LanguageModel, dtype: torch.dtype | None = None) -> Self:
        """The model's as they are when they are gone through; in the dtype of its computation unless given."""
        return cls(
            manifest=served_manifest(model, dtype), tensors=served_weights(model, dtype),
            files=served_files(model, dtype),
        )  # fmt: skip


def save_model(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, directory: Path, world: World = ALONE, *,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """The model and its tokenizer; what is cut off in the middle leaves no such directory. Collective."""
    weights = Weights.of(model, dtype)

    def write() -> None:
        try:
            if world.leads:
                partial = directory.with_name(f"{directory.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_snapshot(partial, weights)
                tokenizer.save_pretrained(partial)
                partial.rename(directory)
        finally:
            for _ in weights.tensors:  # gathering them takes every process
                pass

    world.each(write)


def write_snapshot(directory: Path, weights: Weights, shard: int = SHARD) -> None:
    """Writes what `save_pretrained` writes, file by file as the tensors come."""
    pieces = cut(weights.manifest, shard)
    names = [SHARDED.format(i + 1, len(pieces)) for i in range(len(pieces))] if len(pieces) > 1 else [ONE_FILE]
    tensors = iter(weights.tensors)
    for name, piece in zip(names, pieces, strict=True):
        found = zip(piece, take(piece, tensors), strict=True)
        _save_file({info.name: tensor.contiguous().cpu() for info, tensor in found}, directory / name)
    if len(pieces) > 1:
        places = {info.name: name for name, piece in zip(names, pieces, strict=True) for info in piece}
        index = {"metadata": {"total_size": nbytes(weights.manifest)}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, content in weights.files.items():
        (directory / name).write_text(content)


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Readable by whom the umask lets read; `save_file` replaces what is there by a file for this user alone."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def cut(manifest: Sequence[TensorInfo], limit: int) -> list[Piece]:
    """Pieces of at most `limit` bytes, but for single tensors that are larger."""
    pieces: list[list[TensorInfo]] = []
    size = 0
    for info in manifest:
        if not pieces or size + info.nbytes > limit:
            pieces.append([])
            size = 0
        pieces[-1].append(info)
        size += info.nbytes
    return [tuple(piece) for piece in pieces]


def nbytes(piece: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in piece)


def take(piece: Piece, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """The piece's tensors, the next ones.

    Raises:
        ValueError: another tensor comes than the manifest says; sent all the same, it would be taken for that one.
    """
    for info in piece:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        found = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        if found != info:
            raise ValueError(f"weights must come as their manifest says, {info}, got {found}")
        yield tensor
