"""Accuracy on held-out prompts."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..config.keys import Evaluation, Rollout
from ..records import Group, Prompt
from ..rollout.collect import Sampled, sample_groups
from ..rollout.engine import Engine
from ..rollout.outcomes import Outcomes
from ..rollout.sampler import GREEDY
from ..show.measures import Figures, of_evaluation

SEED = 20250203
"""Of sampled evaluations: the same at each, so that they differ by the policy alone."""


def evaluate(
    config: Evaluation, rollout: Rollout, prompts: Sequence[Prompt], engine: Engine, outcomes: Outcomes,
    tokenizer: PreTrainedTokenizerBase, sampled: Sampled = lambda tokens: None,
) -> tuple[Figures, list[Group]]:  # fmt: skip
    """Greedy accuracy, and that of `samples` sampled responses a prompt; and the greedy responses."""

    def answers(n: int, temperature: float) -> list[Group]:
        return sample_groups(
            prompts, rollout, engine, outcomes, tokenizer, seed=SEED, n=n, temperature=temperature, sampled=sampled
        )[0]

    greedy = answers(1, GREEDY)
    drawn = answers(config.samples, rollout.temperature) if config.samples else []
    return of_evaluation(greedy, drawn), greedy
