"""Sizes of a language model by unit, from its config.json alone: no weight is read or allocated."""

import copy
import json
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of parameters, and of what a token takes in attention and cache."""

    hidden: int
    """D."""
    vocabulary: int
    """V."""
    layers: int
    tied: bool
    """Whether head and embedding are one weight."""
    block: int
    """Parameters of the largest block."""
    blocks: int
    """Of all blocks."""
    products: int
    """Of all blocks, those in matrix products: 2 FLOP each for a token."""
    linear_ends: int
    """Input plus output features of the linear layers of all blocks: an adapter of rank r has r times so many
    parameters."""
    embedding: int
    head: int
    """Weight and bias of the head, whether tied or not."""
    rest: int
    """The final norm, and whatever else is in neither of the above."""
    attention: int
    """Width of the queries, heads × head size, summed over layers."""
    cache: int
    """Elements of keys and values that a token takes in the cache, all layers together."""

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.blocks + self.embedding + self.rest + (0 if self.tied else self.head)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Sizes of the causal language model with this configuration, counted on its own class."""
    return _sizes(config_key(config))


def config_key(config: PretrainedConfig) -> str:
    """All that a model's shape follows from, as text: equal for equal shapes."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


@cache
def _sizes(key: str) -> Sizes:
    config = config_of(key)
    with torch.device("meta"):
        model = build(config)
    decoder, head, embedding = blocks_of(model), model.get_output_embeddings(), model.get_input_embeddings()
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    linear = [m for m in decoder.modules() if isinstance(m, nn.Linear)]
    blocks, at_head, at_embedding = count(decoder), count(head), count(embedding)
    tied = head.weight is embedding.weight
    return Sizes(
        hidden=text.hidden_size, vocabulary=head.weight.shape[0], layers=len(decoder), tied=tied,
        block=max(count(block) for block in decoder), blocks=blocks,
        products=sum(p.numel() for p in decoder.parameters() if p.ndim > 1),
        linear_ends=sum(m.in_features + m.out_features for m in linear), embedding=at_embedding, head=at_head,
        rest=count(model) - blocks - at_embedding - (0 if tied else at_head),
        attention=len(decoder) * heads * head_dim,
        cache=2 * len(decoder) * (getattr(text, "num_key_value_heads", None) or heads) * head_dim,
    )  # fmt: skip


def config_of(key: str) -> PretrainedConfig:
    """The configuration that a key stands for."""
    values = json.loads(key)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def build(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, attention: str = "eager") -> PreTrainedModel:
    """The model on the default device with weights of no meaning; leaves the state of random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with its first few layers alone."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: the longest list of modules directly in it."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(math.prod(p.shape) for p in module.parameters())
