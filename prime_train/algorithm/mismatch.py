"""How far the sampler's distribution is from the trainer's, and what corrects the policy's loss for it.

An engine with kernels, a precision or weights of its own draws tokens from another distribution than the one whose
log-probs the trainer computes. ratio = π_old(token) / π_sampler(token) makes expectations over the sampler's tokens
those over the policy's own; truncated at C their variance is bounded (truncated importance sampling, Ionides 2008):
importance = min(ratio, C). A token whose sampler log-prob is not known has ratio 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALARMING = 1.1
"""Mean ratio above which sampler and trainer cannot be taken for the same policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Sampler against trainer over the T response tokens of a batch."""

    importance: Tensor | None
    """fp32 [T], a factor of each token's policy loss; None without a correction."""
    kl: float
    """KL(sampler ‖ trainer), the k3 estimate ratio − 1 − log ratio, nats."""
    ratio_mean: float
    """1 where both are the same policy."""
    ratio_max: float
    clipped: float
    """Share of the ratios above the bound."""

    @property
    def alarm(self) -> str | None:
        """What to warn of, with the figures."""
        if self.ratio_mean <= ALARMING:
            return None
        return (
            f"the sampler is not the policy that is trained: their probabilities' ratio is {self.ratio_mean:.3f} on "
            f"average and at most {self.ratio_max:.3g}, KL {self.kl:.4f} nats, {self.clipped:.1%} of tokens clipped"
        )


def compare(sampler_logp: Tensor, old_logp: Tensor, clamp: float) -> Mismatch:
    """Compares log-probs [T] of the same tokens.

    Args:
        sampler_logp: at the sampling temperature; NaN where not known.
        old_logp: the trainer's, of the policy that is about to be trained, at that temperature.
        clamp: bound C of the importance weights; 0 for none of them.
    """
    gap = old_logp - sampler_logp
    gap = torch.where(gap.isnan(), 0.0, gap)
    ratio = gap.exp()
    return Mismatch(
        importance=ratio.clamp(max=clamp) if clamp else None,
        kl=float((ratio - 1 - gap).mean()),
        ratio_mean=float(ratio.mean()),
        ratio_max=float(ratio.max()),
        clipped=float((ratio > clamp).float().mean()) if clamp else 0.0,
    )
