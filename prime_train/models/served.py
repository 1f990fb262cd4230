"""A policy's weights as servers get them: by the names that `transformers` saves, whole, one tensor at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from .distributed import whole
from .language_model import LanguageModel

BASE, ADAPTERS = ".base_layer.", ".lora_"
"""In names of what peft puts around a linear layer with adapters, and of these."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model as it is saved, and so as servers load it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def served_weights(model: LanguageModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names that `transformers` saves them under, whole, in `dtype`, which is by default
    that of the computation.

    One at a time, in the model's order, tied ones once, adapters added to what they adapt. Of a sharded model every
    process must go through all of them, for each is gathered when its turn comes; nothing else is communicated. Where
    `transformers` saves several tensors as one or one as several, all are held at once.
    """
    stored, dtype = _stored(model), dtype or model.compute_dtype
    makes = _with_adapters(model)
    found = ((_served(name), makes.get(name, whole)(_cast(tensor, dtype))) for name, tensor in stored.items())
    if _as_saved(model, stored, dtype):
        yield from found
    else:
        yield from revert_weight_conversion(model.transformer, dict(found)).items()


def served_manifest(model: LanguageModel, dtype: torch.dtype | None = None) -> list[TensorInfo]:
    """What `served_weights` will yield, in its order; nothing is gathered."""
    stored, dtype = _stored(model), dtype or model.compute_dtype
    found = _outlines(stored, dtype)
    if not _as_saved(model, stored, dtype):
        found = revert_weight_conversion(model.transformer, found)
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]


def served_files(model: LanguageModel, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Names and contents of what `transformers` saves beside the weights."""
    transformer = model.transformer
    config = type(transformer.config).from_dict(transformer.config.to_dict())
    config.dtype = str(dtype or model.compute_dtype).removeprefix("torch.")
    config.architectures = [type(transformer).__name__.removeprefix("FSDP")]
    files = {"config.json": config.to_json_string()}
    if transformer.generation_config is not None:
        files["generation_config.json"] = transformer.generation_config.to_json_string()
    return files


def _stored(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, by the model's own names; of tied ones the first, and no adapters."""
    seen: set[int] = set()
    ignored = model.transformer._keys_to_ignore_on_save or ()
    found = {}
    for name, tensor in model.transformer.state_dict(keep_vars=True).items():
        if name not in ignored and ADAPTERS not in name and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def _served(name: str) -> str:
    return name.replace(BASE, ".")


def _with_adapters(model: LanguageModel) -> dict[str, Callable[[Tensor], Tensor]]:
    """What makes W + scaling·B·A of a weight W that has adapters, by its name; in fp32, rounded once."""

    def adapted(layer: nn.Module, weight: Tensor) -> Tensor:
        with torch.no_grad():
            found = whole(weight).float()
            for name, scaling in layer.scaling.items():  # type: ignore[union-attr, operator]
                A, B = (whole(getattr(layer, side)[name].weight) for side in ("lora_A", "lora_B"))
                found = found + scaling * (B.float() @ A.float())
        return found.to(weight.dtype)

    return {
        f"{name}{BASE}weight": lambda weight, layer=module: adapted(layer, weight)  # type: ignore[misc]
        for name, module in model.transformer.named_modules()
        if hasattr(module, "base_layer")
    }


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _outlines(stored: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As they are served, without contents."""
    return {
        _served(name): torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="meta")
        for name, t in stored.items()
    }


def _as_saved(model: LanguageModel, stored: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether saving leaves names and shapes as they are, as it does but for mixtures of experts and the like."""
    before = _outlines(stored, dtype)
    shapes = {name: tensor.shape for name, tensor in before.items()}
    saved = revert_weight_conversion(model.transformer, before)
    return {name: tensor.shape for name, tensor in saved.items()} == shapes
