"""The implicit PRM: its rewards for a batch, and what it learns from the batch's outcomes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prime_kernels import LogProbHead, implicit_reward

from ..config.keys import PRM
from ..models import optim
from ..models.language_model import LanguageModel, idle
from ..models.packing import Layout, micro_batches
from ..records import Batch, ProcessRewards
from .scoring import token_logp


@dataclass(frozen=True, slots=True, kw_only=True)
class PRMUpdate:
    """What the PRM's optimizer steps on one batch came to, over its mini-batches."""

    loss: float
    grad_norm: float
    skipped: int


def reward_and_update(
    config: PRM, prm: LanguageModel, optimizer: torch.optim.Optimizer | None, batch: Batch, reference: Tensor,
    layout: Layout,
) -> tuple[ProcessRewards, PRMUpdate | None]:  # fmt: skip
    """Process rewards of the batch, and the PRM's steps on it, in the configured order.

    `after`: a mini-batch's rewards come out of the very forward that the PRM then learns from.
    `before`: the PRM learns from the whole batch, then scores it again. `none`: it only scores.

    Args:
        reference: fp32 [T], the log-probs that rewards are relative to.
    """
    if config.update == "none" or optimizer is None:
        return score(config, prm, batch, reference, layout), None
    rewards, update = learn(config, prm, optimizer, batch, reference, layout)
    return rewards if config.update == "after" else score(config, prm, batch, reference, layout), update


def score(config: PRM, prm: LanguageModel, batch: Batch, reference: Tensor, layout: Layout) -> ProcessRewards:
    """Rewards of the PRM as it is."""
    logp, _ = token_logp(prm, batch.sequences, layout)
    token = implicit_reward(logp, reference, beta=config.beta)
    return ProcessRewards(token=token, logits=sequence_sums(token, batch.sequences.cu_responses))


def learn(
    config: PRM, prm: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, reference: Tensor, layout: Layout
) -> tuple[ProcessRewards, PRMUpdate]:
    """One optimizer step a mini-batch, and the rewards as each mini-batch's forward saw them."""
    token, logits = torch.zeros_like(reference), torch.zeros_like(batch.outcomes)
    units = batch.groups if config.loss == "dpo" else None

    def losses(rows: Tensor) -> Iterator[Tensor]:
        for micro in micro_batches(batch.sequences, rows, layout, prm.device, units=units):
            if len(micro.sequences) == 0:
                yield idle(prm, micro)
                continue
            out = prm(
                micro, LogProbHead.prm_loss, reference[micro.tokens].to(prm.device), micro.cu_seqlens,
                batch.outcomes[micro.sequences], beta=config.beta, kind=config.loss,
                group_ids=None if units is None else units[micro.sequences],
            )  # fmt: skip
            token[micro.tokens], logits[micro.sequences] = out.reward.cpu(), out.logits.cpu()
            yield out.loss * (len(micro.sequences) / len(rows))

    steps = [
        optim.step(prm, optimizer, losses(rows), grad_clip=config.grad_clip, world=layout.world)
        for rows in torch.arange(len(batch.outcomes)).split(config.mini_batch)
    ]
    update = PRMUpdate(
        loss=sum(s.loss for s in steps) / len(steps),
        grad_norm=sum(s.grad_norm for s in steps) / len(steps),
        skipped=sum(not s.applied for s in steps),
    )
    # Each sequence is learnt from by one process, and 0 on the others.
    return ProcessRewards(token=layout.world.sum(token), logits=layout.world.sum(logits)), update


def placed(config: PRM, rewards: ProcessRewards, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rewards [T] bounded and standing where the granularity puts them, and which tokens carry one [T] (bool)."""
    token, cu = rewards.token, batch.sequences.cu_responses
    if config.max_log_ratio is not None:
        bound = config.beta * config.max_log_ratio
        token = token.clamp(-bound, bound)
    if config.granularity == "token":
        return token, torch.ones_like(token, dtype=torch.bool)
    ends = batch.step_ends.clone() if config.granularity == "step" else torch.zeros_like(batch.step_ends)
    ends[cu[1:] - 1] = True
    return implicit_reward(
        token, torch.zeros_like(token), beta=1.0, cu_seqlens=cu, granularity="step", step_ends=ends
    ), ends


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [S] of packed values [T]."""
    sequence = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    return torch.zeros(len(cu_seqlens) - 1).index_add_(0, sequence, values)


def pairwise_accuracy(logits: Tensor, outcomes: Tensor, groups: Tensor) -> float:
    """How often, of two responses to one prompt, the better one has the higher logit: weighted by the difference in
    outcome, ties of logits count half; 0.5 where no group has two outcomes."""
    gap = outcomes[:, None] - outcomes
    weight = torch.where((groups[:, None] == groups) & (gap > 0), gap, 0)
    right = (torch.sign(logits[:, None] - logits) + 1) / 2
    return float((weight * right).sum() / weight.sum()) if weight.any() else 0.5
