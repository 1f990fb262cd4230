"""Floating-point operations of forwards and training steps, for plans and for metrics.

A product of a weight with a token is 2 FLOP a parameter. Attention to n earlier tokens is 4·n FLOP a unit of the
queries' width (scores and values), and a token of a causal sequence sees half of the sequence on average. Backward is
twice the forward; what `checkpoint` computes again is not counted: model FLOPs, as in "MFU" (arXiv 2204.02311).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..config.keys import Config
from ..records import Sequences
from .sizes import Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What of some sequences FLOPs depend on."""

    all: int = 0
    """Prompt and response tokens."""
    responses: int = 0
    """Those that the head sees."""
    pairs: int = 0
    """Σ length²: pairs of tokens in the same sequence."""

    @classmethod
    def of(cls, lengths: Iterable[int], responses: int) -> "Tokens":
        """Of sequences with these lengths, prompts included, and so many response tokens together."""
        found = list(lengths)
        return cls(all=sum(found), responses=responses, pairs=sum(n * n for n in found))

    def times(self, factor: float) -> "Tokens":
        """As of so many times the sequences."""
        return Tokens(
            all=round(self.all * factor), responses=round(self.responses * factor), pairs=round(self.pairs * factor)
        )


def tokens_of(sequences: Sequences) -> Tokens:
    """Of a batch."""
    return Tokens.of(sequences.cu_tokens.diff().tolist(), int(sequences.cu_responses[-1]))


def block_flops(sizes: Sizes, tokens: Tokens, *, causal: bool = True) -> float:
    """Forward of all blocks. Without `causal`, attention to all of the sequence, as some kernels compute it."""
    attention = 4 * sizes.attention * tokens.pairs
    return 2 * sizes.products * tokens.all + attention * (0.5 if causal else 1)


def head_flops(sizes: Sizes, tokens: Tokens) -> float:
    """Forward of the head: 2·N·D·V."""
    return 2 * sizes.vocabulary * sizes.hidden * tokens.responses


def forward_flops(sizes: Sizes, tokens: Tokens, *, causal: bool = True) -> float:
    """Hidden states of all tokens and log-probs of the responses."""
    return block_flops(sizes, tokens, causal=causal) + head_flops(sizes, tokens)


def training_flops(sizes: Sizes, tokens: Tokens, *, lora: bool = False) -> float:
    """Forward and backward. With adapters the frozen weights get no gradients, which leaves 4 FLOP of 6 a parameter;
    those of the adapters themselves are left out."""
    attention = 2 * sizes.attention * tokens.pairs
    products = 2 * sizes.products * tokens.all + head_flops(sizes, tokens)
    return 3 * attention + (2 if lora else 3) * products


def sampling_flops(sizes: Sizes, tokens: Tokens) -> float:
    """Prefill and decode with a cache: each token goes through once."""
    return forward_flops(sizes, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How often a step takes its batch through each model."""

    policy_scored: int
    reference_scored: int
    prm_scored: int
    prm_trained: int
    policy_trained: int


def passes_of(config: Config) -> Passes:
    """As `scoring.score`, `prm.reward_and_update` and `policy.update` do it."""
    with_prm, tempered = config.advantage.process_coef > 0, config.rollout.temperature != 1
    frozen = with_prm and config.prm.reference == "frozen"
    kl = config.policy.kl_coef > 0 and (tempered or not frozen)
    return Passes(
        policy_scored=1 + int(with_prm and not frozen and tempered),
        reference_scored=int(frozen) + int(kl),
        prm_scored=int(with_prm and config.prm.update != "after"),
        prm_trained=int(with_prm and config.prm.update != "none"),
        policy_trained=config.policy.epochs,
    )


def stage_flops(
    config: Config, tokens: Tokens, *, policy: Sizes, prm: Sizes | None = None, reference: Sizes | None = None
) -> dict[str, float]:
    """Model FLOPs of a step's score, PRM and policy stages, all processes together.

    Args:
        tokens: of the whole batch.
        prm, reference: the policy's where left out; what the configuration has no use for counts nothing.
    """
    passes, lora = passes_of(config), config.model.lora > 0
    prm, reference = prm or policy, reference or policy
    found = {
        "score": passes.policy_scored * forward_flops(policy, tokens)
        + passes.reference_scored * forward_flops(reference, tokens),
        "prm": passes.prm_scored * forward_flops(prm, tokens)
        + passes.prm_trained * training_flops(prm, tokens, lora=lora),
        "policy": passes.policy_trained * training_flops(policy, tokens, lora=lora),
    }
    return {stage: flops for stage, flops in found.items() if flops}
