"""Every op in plain torch on full logits: the oracle of the tests, in fp64 where exactness is judged.

Written for reading. Memory is [N, V]; use the ops of this package for anything of size.
"""

import torch
from torch import Tensor

from .types import TokenLogProbs


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
