"""Fused ops from hidden states to log-probs and losses, without the [tokens, vocabulary] logits."""

from . import reference
from .logprob import linear_logprob
from .types import TokenLogProbs
from .workspace import set_workspace

__all__ = ["TokenLogProbs", "linear_logprob", "reference", "set_workspace"]
