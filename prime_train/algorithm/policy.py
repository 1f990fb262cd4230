"""The policy's update: PPO with a clipped ratio on advantages of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prime_kernels import LogProbHead, PPOStats

from ..config.keys import Policy
from ..models import optim
from ..models.language_model import LanguageModel
from ..models.packing import Layout, micro_batches
from ..records import Batch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyUpdate:
    """What the policy's optimizer steps on one batch came to: means over the mini-batches, over tokens within."""

    loss: float
    grad_norm: float
    skipped: int
    clip_fraction: float
    approx_kl: float
    """Old policy from new, k3, nats."""
    ratio_max: float


def update(
    config: Policy, policy: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, scores: Scores,
    advantages: Tensor, layout: Layout, *, importance: Tensor | None = None, temperature: float, max_tokens: int,
    seed: int,
) -> PolicyUpdate:  # fmt: skip
    """`epochs` passes over the batch in shuffled mini-batches, one optimizer step each.

    Args:
        advantages: fp32 [T].
        importance: fp32 [T], factors of the tokens' losses; None for none.
        temperature, max_tokens: those of sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = batch.sequences.cu_responses.diff()
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip}
    tempered = scores.reference_tempered
    stats: list[tuple[int, PPOStats]] = []

    def losses(rows: Tensor) -> Iterator[Tensor]:
        weight = torch.zeros(len(lengths))
        weight[rows] = token_weights(config.aggregate, lengths[rows], max_tokens)
        for micro in micro_batches(batch.sequences, rows, layout, policy.device):
            out = policy(
                micro, LogProbHead.ppo_loss,
                *(t[micro.tokens].to(policy.device) for t in (scores.old, advantages)),
                weight[micro.sequences].repeat_interleave(micro.cu_seqlens.diff()).to(policy.device),
                **clip, temperature=temperature, entropy_coef=config.entropy_coef, kl_coef=config.kl_coef,
                ref_logp=None if tempered is None else tempered[micro.tokens].to(policy.device),
                importance=None if importance is None else importance[micro.tokens].to(policy.device),
            )  # fmt: skip
            stats.append((len(micro.tokens), out.stats))
            yield out.loss

    steps = []
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch.outcomes), generator=generator).split(config.mini_batch):
            steps.append(optim.step(policy, optimizer, losses(rows), grad_clip=config.grad_clip, world=layout.world))
    sums = torch.tensor([[n, n * found.clip_fraction, n * found.approx_kl] for n, found in stats]).sum(0)
    tokens, clipped, kl = layout.world.sum(sums).tolist()
    ratio_max = layout.world.max(torch.stack([found.ratio_max.cpu() for _, found in stats]).max())
    return PolicyUpdate(
        loss=sum(s.loss for s in steps) / len(steps),
        grad_norm=sum(s.grad_norm for s in steps) / len(steps),
        skipped=sum(not s.applied for s in steps),
        clip_fraction=clipped / tokens,
        approx_kl=kl / tokens,
        ratio_max=float(ratio_max),
    )


def token_weights(aggregate: str, lengths: Tensor, max_tokens: int) -> Tensor:
    """The weight of each token of each of a mini-batch's responses [s], whose tokens are `lengths` [s].

    token      1/Σ lengths              every token alike
    sequence   1/(s·length)             every response alike
    fixed      1/(s·max_tokens)         no preference for length at all (Dr. GRPO, arXiv 2503.20783)
    """
    if aggregate == "token":
        return torch.full(lengths.shape, 1 / float(lengths.sum()))
    if aggregate == "sequence":
        return 1 / (len(lengths) * lengths.float())
    return torch.full(lengths.shape, 1 / (len(lengths) * max_tokens))
