"""Every op in plain torch on full logits: the oracle of the tests, in fp64 where exactness is judged.

Written for reading. Memory is [N, V]; use the ops of this package for anything of size.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .types import PPOLoss, PPOStats, PRMLoss, TokenLogProbs, TokenLoss


def head_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """z = softcap·tanh((hidden·weightᵀ + bias)/softcap)/temperature, [..., V]."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)[..., None]
    return z / temperature


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float | Tensor = 1.0,
    softcap: float | None = None, ignore_index: int = -100, entropy: bool = False,
) -> TokenLogProbs:  # fmt: skip
    """log softmax(z) at the targets and the entropy of softmax(z); see `prime_kernels.linear_logprob`.

    Results are in the inputs' dtype: on fp64 inputs an oracle, on others what plain torch makes of that dtype.
    """
    z = head_logits(hidden, weight, bias=bias, temperature=temperature, softcap=softcap)
    logp = torch.log_softmax(z, dim=-1)
    ignored = targets == ignore_index
    chosen = logp.gather(-1, targets.masked_fill(ignored, 0)[..., None]).squeeze(-1).masked_fill(ignored, 0)
    if not entropy:
        return TokenLogProbs(chosen, None)
    # 0·log 0 is 0, also where a bias of −inf bans a token.
    p_logp = torch.where(logp > -torch.inf, logp, 0) * logp.exp()
    return TokenLogProbs(chosen, (-p_logp.sum(-1)).masked_fill(ignored, 0))


def linear_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor], inputs: Sequence[Tensor] = (), *,
    ignore_index: int = -100, entropy: bool = False, **head: Any,
) -> TokenLoss:  # fmt: skip
    """Σ loss_fn(logp, entropy, *inputs) over tokens that are not ignored; see `prime_kernels.linear_token_loss`."""
    out = linear_logprob(hidden, weight, targets, ignore_index=ignore_index, entropy=entropy, **head)
    loss = loss_fn(out.logp, out.entropy, *inputs).masked_fill(targets == ignore_index, 0).sum()
    return TokenLoss(loss, out.logp.detach(), None if out.entropy is None else out.entropy.detach())


def ppo_clip_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, token_weight: Tensor, *, clip_low: float = 0.2,
    clip_high: float = 0.2, dual_clip: float | None = None, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    kl_coef: float = 0.0, ref_logp: Tensor | None = None, importance: Tensor | None = None,
) -> PPOLoss:  # fmt: skip
    """See `prime_kernels.linear_ppo_loss` for the formula. Tokens of weight 0 are left out before anything else."""
    keep = token_weight != 0
    weight, old, A = token_weight[keep], old_logp[keep], advantages[keep]
    lp = logp[keep]
    ratio = torch.exp(lp - old)
    free, bounded = -A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high)
    s = torch.maximum(free, bounded)
    if dual_clip is not None:
        s = torch.where(A < 0, torch.minimum(s, -A * dual_clip), s)
    if importance is not None:
        s = importance[keep] * s
    if ref_logp is not None:
        delta = ref_logp[keep] - lp
        s = s + kl_coef * (torch.exp(delta) - delta - 1)
    if entropy is not None:
        s = s - entropy_coef * entropy[keep]
    n = max(int(keep.sum()), 1)
    largest = ratio.max() if len(ratio) else ratio.sum()
    mean_entropy = entropy[keep].sum() / n if entropy is not None else ratio.sum() * 0
    kl = (ratio - 1 - (lp - old)).sum() / n
    stats = ((bounded > free).to(lp.dtype).sum() / n, kl, ratio.sum() / n, largest, mean_entropy)
    return PPOLoss((weight * s).sum(), logp.detach(), entropy, PPOStats(*(t.detach() for t in stats)))


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logp: Tensor, advantages: Tensor, token_weight: Tensor, *,
    bias: Tensor | None = None, temperature: float | Tensor = 1.0, softcap: float | None = None,
    ignore_index: int = -100, **options: Any,
) -> PPOLoss:  # fmt: skip
    """`ppo_clip_loss` of `linear_logprob`; ignored tokens have weight 0."""
    out = linear_logprob(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        entropy=True,
    )  # fmt: skip
    token_weight = token_weight.masked_fill(targets == ignore_index, 0)
    return ppo_clip_loss(out.logp, old_logp, advantages, token_weight, entropy=out.entropy, **options)


def prm_loss(
    prm_logp: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, outcomes: Tensor, *, beta: float = 0.05,
    mask: Tensor | None = None, kind: str = "ce", group_ids: Tensor | None = None,
) -> PRMLoss:  # fmt: skip
    """See `prime_kernels.prm_loss`. One sequence after the other."""
    reward = implicit_reward(prm_logp, ref_logp, beta=beta, mask=mask)
    logits = torch.stack([reward[a:b].sum() for a, b in pairwise(cu_seqlens.tolist())])
    outcomes = outcomes.to(logits.dtype)
    losses = []
    for i, (logit, outcome) in enumerate(zip(logits, outcomes, strict=True)):
        if kind == "ce":
            losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logit, outcome))
            continue
        assert group_ids is not None
        others = [
            logits[j].detach()
            for j in range(len(logits))
            if group_ids[j] == group_ids[i] and (outcomes[j] < outcome if outcome > 0 else outcomes[j] > outcome)
        ]
        other = torch.stack(others).mean() if others else torch.zeros_like(logit)
        losses.append(-torch.nn.functional.logsigmoid((logit - other) * (1 if outcome > 0 else -1)))
    return PRMLoss(torch.stack(losses).mean(), reward.detach(), logits.detach())


def linear_prm_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, outcomes: Tensor, *,
    beta: float = 0.05, mask: Tensor | None = None, kind: str = "ce", group_ids: Tensor | None = None,
    ignore_index: int = -100, **head: Any,
) -> PRMLoss:  # fmt: skip
    """`prm_loss` of `linear_logprob`; ignored tokens have mask 0."""
    out = linear_logprob(hidden, weight, targets, ignore_index=ignore_index, **head)
    mask = torch.ones_like(ref_logp) if mask is None else mask
    mask = mask.masked_fill(targets == ignore_index, 0)
    return prm_loss(out.logp, ref_logp, cu_seqlens, outcomes, beta=beta, mask=mask, kind=kind, group_ids=group_ids)


def implicit_reward(
    prm_logp: Tensor, ref_logp: Tensor, *, beta: float = 0.05, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, granularity: str = "token", step_ends: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `prime_kernels.implicit_reward`. One token after the other, packed."""
    reward = beta * (prm_logp - ref_logp)
    if mask is not None:
        reward = torch.where(mask == 0, 0, reward * mask)
    if granularity == "token":
        return reward
    assert cu_seqlens is not None
    placed = list(torch.zeros_like(reward))
    for begin, end in pairwise(cu_seqlens.tolist()):
        counted = [t for t in range(begin, end) if mask is None or mask[t] != 0]
        open_sum = reward.new_zeros(())
        for t in range(begin, end):
            open_sum = open_sum + reward[t]
            if (counted and t == counted[-1]) or (step_ends is not None and step_ends[t]):
                placed[t], open_sum = open_sum, reward.new_zeros(())
    return torch.stack(placed)
