"""Implicit process rewards on given log-probs, a token, a step or a sequence at a time."""

from typing import Any

import torch
from torch import Tensor

from . import gemm
from .calls import strategy_for, working_on
from .checks import check_number, check_rows
from .kernels import losses as kernels
from .sequences import boundaries, cu_seqlens_of, flat, token_reward

GRANULARITIES = ("token", "whole", "step")


@torch.library.custom_op("prime_kernels::implicit_reward", mutates_args=())
def _implicit_reward(
    prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, step_ends: Tensor | None,
    beta: float, use_triton: bool,
) -> Tensor:  # fmt: skip
    """Rewards [T] summed over steps, or over sequences without step_ends; each token's own without cu_seqlens."""
    T = len(prm_logp)
    # Tokens on their own have no boundaries; these share them out to programs.
    bounds = [*range(0, T, kernels.SEQUENCE_BLOCK), T] if cu_seqlens is None else boundaries(cu_seqlens, T)
    if use_triton:
        cuts = torch.tensor(bounds, dtype=torch.int64).to(prm_logp.device, non_blocking=True)
        with working_on(prm_logp):
            return kernels.reward(prm_logp, ref_logp, mask, cuts, step_ends, beta, each=cu_seqlens is None)
    reward = token_reward(prm_logp, ref_logp, mask, beta)
    if cu_seqlens is None:
        return reward
    return torch.zeros_like(reward).index_add_(0, _landing(T, mask, cu_seqlens, step_ends, reward.device), reward)


@_implicit_reward.register_fake
def _(
    prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, step_ends: Tensor | None,
    beta: float, use_triton: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(prm_logp)


def _landing(
    T: int, mask: Tensor | None, cu_seqlens: Tensor, step_ends: Tensor | None, device: torch.device
) -> Tensor:  # fmt: skip
    """The token onto which each token's reward is summed [T]: the nearest closing token at or after it."""
    cuts = cu_seqlens.to(device, torch.int64)
    index = torch.arange(T, device=device)
    sequence = torch.arange(len(cuts) - 1, device=device).repeat_interleave(cuts.diff(), output_size=T)
    counted = index if mask is None else torch.where(mask != 0, index, -1)
    last = index.new_full((len(cuts) - 1,), -1).scatter_reduce(0, sequence, counted, "amax")[sequence]
    closes = index == last
    if step_ends is not None:
        closes = closes | step_ends
    lands = torch.where(closes, index, T).flip(0).cummin(0).values.flip(0)
    # Tokens after a sequence's last closing one count for nothing.
    return torch.where(lands < cuts[1:][sequence], lands, index)


def _setup_reward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, mask, cu_seqlens, step_ends, ctx.beta, _ = inputs
    ctx.save_for_backward(mask, cu_seqlens, step_ends)


def _backward_reward(ctx: Any, upstream: Tensor) -> tuple:
    mask, cu_seqlens, step_ends = ctx.saved_tensors
    if cu_seqlens is not None:
        upstream = upstream[_landing(len(upstream), mask, cu_seqlens, step_ends, upstream.device)]
    gradient = ctx.beta * upstream
    gradient = gradient if mask is None else torch.where(mask == 0, 0, gradient * mask)
    return gradient, -gradient, *(None,) * 5


_implicit_reward.register_autograd(_backward_reward, setup_context=_setup_reward)


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
        prm_logp, ref_logp, mask: [T] packed, or [S, L] padded; where the mask is 0 nothing else is looked at.
        cu_seqlens: [S + 1] boundaries of packed tokens on the host; needed for "whole" and "step" unless padded.
        step_ends: bool, of the log-probs' shape, true at the last token of each step; for "step".
        backend: "auto", "triton" or "torch".

    Returns:
        Rewards of the log-probs' shape in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument is off, beta is not positive, a sequence is empty.
    """
    check_number("beta", beta, above=0.0)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be 'token', 'whole' or 'step', got {granularity!r}")
    check_rows(prm_logp, ref_logp=ref_logp, mask=mask, step_ends=step_ends)
    if (granularity == "step") != (step_ends is not None):
        raise ValueError(f"step_ends must be given for granularity 'step' and for it alone, got {granularity!r}")
    dtype = gemm.stats_dtype(prm_logp.dtype)
    cuts = None if granularity == "token" else cu_seqlens_of(prm_logp, cu_seqlens)
    ends = None if step_ends is None else step_ends.bool().reshape(-1).contiguous()
    use_triton = strategy_for(prm_logp, backend) != "torch"
    reward = _implicit_reward(
        flat(prm_logp, dtype), flat(ref_logp, dtype), flat(mask, dtype), cuts, ends, float(beta), use_triton
    )
    return reward.view(prm_logp.shape)
