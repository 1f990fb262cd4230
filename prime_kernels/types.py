"""What the ops return."""

from typing import NamedTuple

from torch import Tensor


class TokenLogProbs(NamedTuple):
    """Per-token results, of the targets' shape; fp32, or fp64 for fp64 inputs."""

    logp: Tensor
    """log p(target), 0 for ignored tokens."""
    entropy: Tensor | None
    """Entropy of the token's distribution in nats, 0 for ignored tokens; None unless asked for."""
