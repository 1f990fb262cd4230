"""What the ops return."""

from typing import NamedTuple

from torch import Tensor


class TokenLogProbs(NamedTuple):
    """Per-token results, of the targets' shape; fp32, or fp64 for fp64 inputs."""

    logp: Tensor
    """log p(target), 0 for ignored tokens."""
    entropy: Tensor | None
    """Entropy of the token's distribution in nats, 0 for ignored tokens; None unless asked for."""


class TokenLoss(NamedTuple):
    """A loss over tokens, and the detached per-token results it was made of."""

    loss: Tensor
    """Scalar, fp32 (fp64 for fp64 inputs): the sum over tokens that are not ignored. Differentiable."""
    logp: Tensor
    entropy: Tensor | None


class PPOStats(NamedTuple):
    """Means over the tokens of non-zero weight, on the device; 0 where there are none."""

    clip_fraction: Tensor
    """Share of tokens where the clipped term is the larger one."""
    approx_kl: Tensor
    """KL of the old policy from the new, k3: mean of (ρ − 1) − log ρ."""
    ratio_mean: Tensor
    ratio_max: Tensor
    entropy_mean: Tensor
    """0 where no entropy is at hand."""


class PPOLoss(NamedTuple):
    """A PPO loss and what to log about it."""

    loss: Tensor
    """Scalar; differentiable."""
    logp: Tensor
    """Detached, of the targets' shape."""
    entropy: Tensor | None
    stats: PPOStats


class PRMLoss(NamedTuple):
    """An implicit reward model's loss, and its rewards from the same forward."""

    loss: Tensor
    """Scalar, mean over sequences; differentiable."""
    reward: Tensor
    """β·(log π_prm − log π_ref)·mask of each token, detached."""
    logits: Tensor
    """Σ reward of each sequence [S], detached."""
