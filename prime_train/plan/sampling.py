"""What the embedded engine is asked for at once, and what one process holds while it samples: see `rollout/sampler.py`.

A round of rollouts has `rollout.samples` responses to each prompt; an evaluation goes over all of its prompts greedily,
and once more with `eval.samples` responses to each. As many of them as the cache has room for are sampled together. The
worst moments, W tokens a prompt and L a prompt with its response:

    prefill   the cache of all prompts [prompts, W], and the forward of the last piece of them
    decode    the cache [rows, L] while one layer's keys grow by a copy, and the forward of one token a row
    choice    the cache, and logits [rows, V]
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from transformers.integrations import sdpa_attention

from ..config.keys import Config
from ..models.generation import CHOICE, PREFILL, choice_rows
from .activations import Activations
from .records import GIB, Item
from .sizes import Sizes

SAMPLED = 20
"""Bytes of a token that is sampled, beside its cache: its number in fp64, the token, its log-prob."""
PACKS_GROUPS = hasattr(sdpa_attention, "pack_gqa")
"""Whether `transformers` decodes grouped queries under a mask without keys and values for every head: 5.23 does, 5.17
does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one process samples in one call of the engine."""

    stage: str
    prompts: int
    samples: int
    """Responses to each prompt."""
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    """What of it is sampled together."""

    prompts: int
    rows: int
    """Responses."""


def asked_of(config: Config, processes: int) -> tuple[Asked, ...]:
    """Rounds of rollouts and evaluations, a process's share of them where it has most."""
    held_out = math.ceil(config.eval.prompts / processes)
    asked = [
        Asked(stage="rollout", prompts=math.ceil(config.rollout.prompts / processes), samples=config.rollout.samples),
        Asked(stage="evaluation", prompts=held_out, samples=1, greedy=True),
    ]
    if config.eval.samples:
        asked.append(Asked(stage="evaluation", prompts=held_out, samples=config.eval.samples))
    return tuple(asked)


def together(asked: Asked, sizes: Sizes, *, itemsize: int, width: int, cache_gib: float) -> Together:
    """As `LocalEngine` does it for prompts and responses that are as long as they may be.

    Args:
        itemsize: bytes of a number in the cache.
        width: tokens of a prompt and its response, L.
    """
    fit = max(1, int(cache_gib * GIB / (sizes.cache * itemsize * width)))
    prompts = max(1, min(asked.prompts, fit // asked.samples))
    return Together(prompts, prompts * min(asked.samples, fit))


def moments(
    found: Together, asked: Asked, sizes: Sizes, activations: Activations, config: Config, *, itemsize: int, cuda: bool
) -> Iterator[list[Item]]:
    """What each moment holds beside weights."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_tokens
    token, V = sizes.cache * itemsize, sizes.vocabulary
    piece = min(found.prompts, max(1, PREFILL // prompt))
    cache = token * found.rows * (prompt + response)
    layer = cache // sizes.layers
    noise = 0 if cuda else 8 * response * (asked.prompts * asked.samples + found.rows)
    tokens = SAMPLED * response * found.rows + noise
    logits = 4 * V * found.rows
    yield [
        Item("key-value cache", token * found.prompts * prompt), Item("sampling", logits + tokens),
        Item("activations", _prefill(piece, prompt, sizes, activations, itemsize)),
    ]  # fmt: skip
    yield [
        Item("key-value cache", cache + max(layer // 2, round(layer * expanded(config, sizes)))),
        Item("sampling", tokens), Item("activations", activations.scoring_peak(found.rows)),
    ]  # fmt: skip
    rounded = logits // 4 * itemsize if itemsize < 4 else 0
    drawing = (4 if asked.greedy else CHOICE - 4) * V * min(found.rows, choice_rows(V))
    yield [Item("key-value cache", cache), Item("sampling", logits + max(rounded, drawing) + tokens)]


def _prefill(rows: int, width: int, sizes: Sizes, activations: Activations, itemsize: int) -> int:
    """Of a forward of prompts of several lengths, which takes a mask [rows, W, W]: a bool all the while, and in the
    computation's dtype while a block attends, beside its input, queries, keys and values (these for every query head,
    too) and result."""
    mask, queries = rows * width**2, sizes.attention // sizes.layers
    attending = rows * width * itemsize * (sizes.hidden + 4 * queries + sizes.cache // sizes.layers)
    return mask + max(activations.scoring_peak(rows * width), attending + itemsize * mask)


def expanded(config: Config, sizes: Sizes) -> float:
    """Copies of a layer's cache that attention to it makes where prompts have several lengths, which takes a mask.

    With `eager`, and with `sdpa` where `transformers` does not pack groups, of keys and values for every query head;
    flash_attention_2 gathers what is no padding.
    """
    attention = config.model.attention
    if attention == "auto":
        attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    heads = 2 * sizes.attention / sizes.cache
    if attention == "flash_attention_2":
        return 1.0
    return 0.0 if heads == 1 or (attention == "sdpa" and PACKS_GROUPS) else heads
