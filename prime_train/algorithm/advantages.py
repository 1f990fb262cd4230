"""Advantages of response tokens from process rewards and outcomes. Pure functions of padded tensors.

Shapes: S responses, L the longest one's tokens, padded on the right; `group` [S] int64 says which prompt a response
answers. K responses answer a prompt. Formulas: PRIME (arXiv 2502.01456), section 3, and its released code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.keys import Advantage


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages of a batch, padded, 0 where there is no token."""

    token: Tensor
    """fp32 [S, L]."""
    process_share: float
    """Share of the process rewards in the advantages: mean |process| / (mean |process| + mean |outcome|)."""


def advantages(
    config: Advantage, process: Tensor | None, carries: Tensor | None, outcomes: Tensor, mask: Tensor, group: Tensor
) -> Advantages:
    """A = process_coef·G(process) + outcome_coef·G(outcome), whitened over all tokens if so configured.

    Args:
        process: [S, L] process rewards; None trains on outcomes alone.
        carries: [S, L] bool, the tokens that carry a process reward.
        outcomes: [S]. mask: [S, L] bool, the response tokens.
    """
    # In fp64, so that rounding of equal rewards is not taken for a spread of them.
    outcomes = outcomes.double()
    process = None if process is None else process.double()
    last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    outcome = torch.where(last, outcomes[:, None], 0)
    outcome = returns_to_go(baselined(config, outcome, last, group), config.outcome_gamma) * mask * config.outcome_coef
    total, share = outcome, 0.0
    if process is not None and carries is not None:
        if config.process_norm:
            process = process / return_scale(process)
        process = returns_to_go(baselined(config, process, carries, group), config.process_gamma)
        process = process * mask * config.process_coef
        total = process + outcome
        size, other = process.abs().sum(), outcome.abs().sum()
        share = float(size / (size + other)) if size > 0 else 0.0
    return Advantages(token=(whiten(total, mask) if config.whiten else total).float(), process_share=share)


def baselined(config: Advantage, rewards: Tensor, carries: Tensor, group: Tensor) -> Tensor:
    """Rewards of one source less the estimator's baseline, where a token carries that source; 0 elsewhere."""
    if config.estimator in ("rloo", "rloo_released"):
        return leave_one_out(rewards, carries, group, released=config.estimator == "rloo_released")
    if config.estimator == "grpo":
        return group_normalized(rewards, carries, group)
    return torch.where(carries, rewards, 0)


def leave_one_out(rewards: Tensor, carries: Tensor, group: Tensor, *, released: bool = False) -> Tensor:
    """RLOO: r_{i,t} less the mean over the K − 1 other responses j of m_j, the mean reward of j's carrying tokens.

    paper      r_{i,t} − (1/(K−1)) Σ_{j≠i} m_j                     Eq. 5
    released   r_{i,t}·K/(K−1) − (1/(K−1)) Σ_j m_j                 differs by (r_{i,t} − m_i)/(K−1)
    """
    means = masked_mean(rewards, carries)
    K = group_sum(torch.ones_like(means), group)
    sums = group_sum(means, group)
    if released:
        baselined = rewards * (K / (K - 1))[:, None] - (sums / (K - 1))[:, None]
    else:
        baselined = rewards - ((sums - means) / (K - 1))[:, None]
    return torch.where(carries, baselined, 0)


def group_normalized(rewards: Tensor, carries: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO: (r_{i,t} − mean_j m_j) / (std_j m_j + eps), m_j as in `leave_one_out`, the deviation unbiased."""
    means = masked_mean(rewards, carries)
    K = group_sum(torch.ones_like(means), group)
    centre = group_sum(means, group) / K
    deviation = (group_sum((means - centre) ** 2, group) / (K - 1)).sqrt()
    return torch.where(carries, (rewards - centre[:, None]) / (deviation + eps)[:, None], 0)


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = Σ_{s ≥ t} γ^{s−t} r_s along each row."""
    if gamma == 1:
        return rewards.flip(1).cumsum(1).flip(1)
    returns = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = rewards[:, t] + gamma * following
        returns[:, t] = following
    return returns


def return_scale(process: Tensor, eps: float = 1e-6) -> Tensor:
    """The largest |G_t| (γ = 1) of the batch, plus eps; 1 where every reward is rounding, as from an untrained PRM."""
    largest = returns_to_go(process, 1.0).abs().max()
    return torch.where(largest > eps, largest + eps, 1)


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(values − mean)/sqrt(variance + eps) over all masked tokens, the variance unbiased; 0 elsewhere."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + eps) * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over its masked tokens; 0 for a row without any."""
    return torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp(min=1)


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """For each response [S] the sum over the responses of its group."""
    groups = int(group.max()) + 1
    return torch.zeros(groups, dtype=values.dtype).index_add_(0, group, values)[group]


def padded(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed values [T] as [S, L] with zeros, and the mask of what is there."""
    lengths = cu_seqlens.diff()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    out = torch.zeros(mask.shape, dtype=packed.dtype)
    out[mask] = packed
    return out, mask
