"""Fused ops from hidden states to log-probs and losses, without the [tokens, vocabulary] logits."""

from . import reference
from .head import LogProbHead
from .logprob import linear_logprob
from .ppo import linear_ppo_loss, ppo_clip_loss
from .prm import linear_prm_loss, prm_loss
from .reward import implicit_reward
from .token_loss import linear_token_loss
from .types import PPOLoss, PPOStats, PRMLoss, TokenLogProbs, TokenLoss
from .workspace import set_workspace

__all__ = [
    "LogProbHead",
    "PPOLoss",
    "PPOStats",
    "PRMLoss",
    "TokenLogProbs",
    "TokenLoss",
    "implicit_reward",
    "linear_logprob",
    "linear_ppo_loss",
    "linear_prm_loss",
    "linear_token_loss",
    "ppo_clip_loss",
    "prm_loss",
    "reference",
    "set_workspace",
]
