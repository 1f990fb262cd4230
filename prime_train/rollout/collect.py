"""Prompts to verified groups of responses, filtered by their accuracy, until a batch is full."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..config.keys import Filter, Rollout
from ..data.prompts import Stream
from ..records import Group, Prompt, Response
from .engine import Engine
from .outcomes import Outcomes

Sampled = Callable[[int], None]
"""Told the number of tokens sampled since its last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The groups of one batch, and what became of the prompts that it took."""

    groups: tuple[Group, ...]
    seen: int
    """Prompts sampled from."""
    dropped: Counter[str]
    """Prompts by why they were dropped: "too easy", "too hard", "truncated", "surplus"."""
    accuracy: float
    """Mean outcome of all prompts seen."""
    truncated: float
    """Share of their responses that were cut off."""
    verdicts: Counter[str]
    """Answers by the verifier's status."""
    position: int
    too_long: int
    """Where the stream stood when the batch was complete: what `Progress` records."""


def collect(
    rollout: Rollout, wanted: Filter, stream: Stream[Prompt], engine: Engine, outcomes: Outcomes,
    tokenizer: PreTrainedTokenizerBase, *, seed: int, sampled: Sampled = lambda tokens: None,
) -> Collected:  # fmt: skip
    """Samples and verifies rounds of prompts until `rollout.prompts` of them pass the filter, or the limit is reached.

    A batch that stays short is returned short: prompts that fail the filter never fill it.
    """
    kept: list[Group] = []
    everything: list[Group] = []
    dropped: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    limit = int(wanted.max_prompts * rollout.prompts)
    for round_ in range(limit):
        missing = rollout.prompts - len(kept)
        left = limit - len(everything)
        if missing <= 0 or left <= 0:
            break
        # As many as should fill the batch, judged by how many passed so far; few are sampled only to be surplus.
        passing = (len(kept) + 1) / (len(everything) + 1)
        prompts = stream.take(min(rollout.prompts, left, math.ceil(missing / passing)))
        groups, statuses = sample_groups(
            prompts, rollout, engine, outcomes, tokenizer, seed=seed * 1000 + round_, sampled=sampled
        )
        everything += groups
        verdicts += statuses
        for group in groups:
            reason = why_dropped(group, wanted)
            if reason is None and len(kept) == rollout.prompts:
                reason = "surplus"
            if reason is None:
                kept.append(group)
            else:
                dropped[reason] += 1
    responses = [response for group in everything for response in group.responses]
    return Collected(
        groups=tuple(kept), seen=len(everything), dropped=dropped,
        accuracy=sum(group.accuracy for group in everything) / max(1, len(everything)),
        truncated=sum(not response.finished for response in responses) / max(1, len(responses)), verdicts=verdicts,
        position=stream.position, too_long=stream.dropped,
    )  # fmt: skip


def why_dropped(group: Group, wanted: Filter) -> str | None:
    """The reason not to train on this group; None to keep it."""
    if group.accuracy < wanted.low:
        return "too hard"
    if group.accuracy > wanted.high:
        return "too easy"
    if wanted.drop_truncated and not all(response.finished for response in group.responses):
        return "truncated"
    return None


def sample_groups(
    prompts: Sequence[Prompt], rollout: Rollout, engine: Engine, outcomes: Outcomes,
    tokenizer: PreTrainedTokenizerBase, *, seed: int, n: int | None = None, temperature: float | None = None,
    sampled: Sampled = lambda tokens: None,
) -> tuple[list[Group], Counter[str]]:  # fmt: skip
    """Samples responses and has them verified; n and temperature are the configured ones unless given."""
    responses = engine.sample(
        [prompt.tokens for prompt in prompts], n=rollout.samples if n is None else n,
        temperature=rollout.temperature if temperature is None else temperature, max_tokens=rollout.max_tokens,
        seeds=[random.Random(f"{seed} {i}").getrandbits(48) for i in range(len(prompts))], progress=sampled,
    )  # fmt: skip
    texts = [[text_of(tokenizer, response) for response in found] for found in responses]
    scored = outcomes([(prompt, text) for prompt, found in zip(prompts, texts, strict=True) for text in found])
    scores = iter(verdict.score for verdict in scored)
    groups = [
        Group(
            prompt=prompt, responses=tuple(found), texts=tuple(written), outcomes=tuple(next(scores) for _ in written)
        )
        for prompt, found, written in zip(prompts, responses, texts, strict=True)
    ]
    return groups, Counter(verdict.status for verdict in scored)


def text_of(tokenizer: PreTrainedTokenizerBase, response: Response) -> str:
    """What the response says, without its end-of-sequence token."""
    return str(tokenizer.decode(list(response.tokens[:-1] if response.finished else response.tokens)))
