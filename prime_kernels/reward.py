"""Implicit process rewards on given log-probs, a token, a step or a sequence at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import gemm
from .calls import flat, strategy_for, working_on
from .checks import (
    check_choice,
    check_gets_no_gradient,
    check_logp,
    check_number,
    check_reverse_mode,
    check_rows,
    real_number,
)
from .operators import Derivative, Saved, register
from .sequences import Sequences, cu_seqlens_of, moved, token_reward

GRANULARITIES = ("token", "whole", "step")


@dataclass(frozen=True, slots=True)
class RewardCall:
    """Arguments of `prime_kernels::implicit_reward`: packed, in the log-probs' dtype.

    Rewards are summed over steps, or over sequences without step_ends; each token has its own without cu_seqlens.
    """

    prm_logp: Tensor  # [T]
    ref_logp: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None  # [S + 1]
    step_ends: Tensor | None
    beta: float
    use_triton: bool


def _reward(call: RewardCall) -> Tensor:
    prm_logp, mask = call.prm_logp, call.mask
    with working_on(prm_logp):
        sequences = None if call.cu_seqlens is None else Sequences.of(call.cu_seqlens, prm_logp)
        if call.use_triton:
            from .kernels import losses

            bounds = _shares(prm_logp, losses.SEQUENCE_BLOCK) if sequences is None else sequences.bounds
            reward = losses.reward(
                prm_logp, call.ref_logp, mask, bounds, call.step_ends, call.beta, each=sequences is None
            )  # fmt: skip
        else:
            reward = token_reward(prm_logp, call.ref_logp, mask, call.beta)
            if sequences is not None:
                lands = _landing(sequences, mask, call.step_ends, prm_logp.shape[0])
                reward = _summed(reward, lands)
        if sequences is not None and sequences.poison is not None:
            reward = reward + sequences.poison
    return reward


def _summed(reward: Tensor, lands: Tensor) -> Tensor:
    """Each token's reward [T] added to where it lands, in the same order every time."""
    total = torch.zeros_like(reward)
    # On CUDA the one adds in any order, and the other sorts first.
    return total.index_put_((lands,), reward, accumulate=True) if reward.is_cuda else total.index_add_(0, lands, reward)


def _shares(tokens: Tensor, size: int) -> Tensor:
    """Boundaries that share out tokens on their own to programs."""
    T = tokens.shape[0]
    return torch.arange(0, T + size, size, device=tokens.device).clamp_(max=T)


def _reward_fake(call: RewardCall) -> Tensor:
    return torch.empty_like(call.prm_logp)


def _landing(sequences: Sequences, mask: Tensor | None, step_ends: Tensor | None, T: int) -> Tensor:
    """The token onto which each of T tokens' reward is summed [T]: the nearest closing token at or after it."""
    index = torch.arange(T, device=sequences.bounds.device)
    sequence = sequences.of_tokens(T)
    counted = index if mask is None else torch.where(mask != 0, index, -1)
    last = index.new_full((sequences.count,), -1).scatter_reduce(0, sequence, counted, "amax")[sequence]
    closes = index == last
    if step_ends is not None:
        closes = closes | step_ends
    lands = torch.where(closes, index, T).flip(0).cummin(0).values.flip(0)
    # Tokens after a sequence's last closing one count for nothing.
    return torch.where(lands < sequences.bounds[1:][sequence], lands, index)


def _reward_gradients(saved: Saved[RewardCall], upstream: Tensor) -> dict[str, Tensor]:
    mask, cu_seqlens, step_ends = saved.tensors
    if cu_seqlens is not None:
        T = upstream.shape[0]
        bounds = moved("cu_seqlens", cu_seqlens, upstream.device).clamp(0, T)  # those on a device were not read
        upstream = upstream[_landing(Sequences(bounds, None, None), mask, step_ends, T)]
    gradient = saved.options.beta * upstream
    gradient = gradient if mask is None else torch.where(mask == 0, 0, gradient * mask)
    return {"prm_logp": gradient, "ref_logp": -gradient}


# The rewards are linear in both log-probs, and the gradient is plain torch: it can be differentiated like any other.
_implicit_reward = register(
    "implicit_reward", RewardCall, 1, _reward, _reward_fake,
    Derivative(
        results=1, gradients=_reward_gradients, twice=True,
        keep=lambda call, _: (call.mask, call.cu_seqlens, call.step_ends),
    ),
)  # fmt: skip


def implicit_reward(
    prm_logp: Tensor, ref_logp: Tensor, *, beta: float = 0.05, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, granularity: str = "token", step_ends: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Implicit process rewards β·(prm_logp − ref_logp)·mask, differentiable in both.

        "token"  each token has its own
        "whole"  a sequence's sum stands on its last token that counts, 0 elsewhere
        "step"   each step's sum stands on the step's last token; what follows a sequence's last step is one more step

    Args:
        prm_logp, ref_logp, mask: [T] packed, or [S, L] padded; where the mask, which gets no gradient, is 0, nothing
            else is looked at.
        cu_seqlens: [S + 1] boundaries of packed tokens, on the host or on the device; needed for "whole" and "step"
            unless padded. Kernels use those on the device unread, as in `prm_loss`.
        step_ends: bool, of the log-probs' shape, true at the last token of each step; for "step".
        backend: "auto", "triton" or "torch".

    Returns:
        Rewards of the log-probs' shape in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument is off, beta is not positive, a sequence is empty.
    """
    check_number("beta", beta, above=0.0)
    check_choice("granularity", granularity, GRANULARITIES)
    check_logp("prm_logp", prm_logp)
    check_rows(
        "prm_logp's", prm_logp, optional=("mask", "step_ends"), ref_logp=ref_logp, mask=mask, step_ends=step_ends
    )  # fmt: skip
    check_gets_no_gradient(mask=mask)
    check_reverse_mode("implicit_reward", prm_logp=prm_logp, ref_logp=ref_logp, mask=mask)
    if (granularity == "step") != (step_ends is not None):
        raise ValueError(f"step_ends must be given for granularity 'step' and for it alone, got {granularity!r}")
    dtype, use_triton = gemm.stats_dtype(prm_logp.dtype), strategy_for(prm_logp, backend) != "torch"
    reward = _implicit_reward(
        prm_logp=flat(prm_logp, dtype), ref_logp=flat(ref_logp, dtype), mask=flat(mask, dtype),
        cu_seqlens=None if granularity == "token" else cu_seqlens_of(prm_logp, cu_seqlens, use_triton),
        step_ends=None if step_ends is None else step_ends.bool().reshape(-1).contiguous(),
        beta=real_number(beta), use_triton=use_triton,
    )  # fmt: skip
    return reward.view(prm_logp.shape)
