"""Responses to held-out prompts, and whether they are right."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..config.keys import Evaluation, Rollout
from ..records import Group, Prompt
from ..rollout.collect import Sampled, sample_groups
from ..rollout.engine import Engine
from ..rollout.outcomes import Outcomes
from ..rollout.sampler import GREEDY

SEED = 20250203
"""Of sampled evaluations: the same at each, so that they differ by the policy alone."""


def evaluate(
    config: Evaluation, rollout: Rollout, prompts: Sequence[Prompt], engine: Engine, outcomes: Outcomes,
    tokenizer: PreTrainedTokenizerBase, sampled: Sampled = lambda tokens: None,
) -> tuple[list[Group], list[Group]]:  # fmt: skip
    """A greedy response to each prompt, and `samples` sampled ones to each, verified; the latter empty for 0."""

    def answers(n: int, temperature: float) -> list[Group]:
        return sample_groups(
            prompts, rollout, engine, outcomes, tokenizer, seed=SEED, n=n, temperature=temperature, sampled=sampled
        )[0]

    greedy = answers(1, GREEDY)
    drawn = answers(config.samples, rollout.temperature) if config.samples else []
    return greedy, drawn
