"""Kernels on [n] per-token numbers: the losses' values, derivatives and statistics, one launch each.

1. `ppo`     one thread a token: ratio, clips, entropy bonus, KL, the derivatives, and partial statistics a program
2. `prm`     one program a sequence: implicit rewards, their sum, cross-entropy with the outcome, the derivative
3. `reward`  one program a sequence: implicit rewards, summed over steps or not
"""

import triton
import triton.language as tl
from torch import Tensor

from ..constants import PPO_STATS
from .common import log1p

PPO_BLOCK, SEQUENCE_BLOCK = 512, 1024


@triton.jit
def expm1(x):
    """e^x − 1, exact to rounding near 0: the error of e^x cancels in (e^x − 1)/log(e^x)."""
    y = tl.exp(x)
    d = y - 1.0
    near = tl.where(d == 0.0, x, d * (x / tl.log(y)))
    return tl.where(tl.abs(x) < 0.5, near, d)


@triton.jit
def ppo_kernel(
    logp_ptr, entropy_ptr, old_ptr, advantage_ptr, weight_ptr, ref_ptr, importance_ptr,
    loss_ptr, dlogp_ptr, dentropy_ptr, stats_ptr, N, clip_low, clip_high, dual_clip, entropy_coef, kl_coef,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < N
    logp = tl.load(logp_ptr + offs, mask=inside, other=0.0)
    old = tl.load(old_ptr + offs, mask=inside, other=0.0)
    advantage = tl.load(advantage_ptr + offs, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0)
    trained = weight != 0.0

    # s = max(−A·ρ, −A·clip(ρ)), s = min(s, −A·c) for A < 0; ∂s/∂logp = −A·ρ where neither clip has taken over.
    # A comparison with NaN is false, so NaN stays in s.
    ratio = tl.exp(logp - old)
    free = tl.where(advantage == 0.0, 0.0, -advantage * ratio)  # of an infinite ratio, too
    bounded = -advantage * tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    clipped = bounded > free
    s = tl.where(clipped, bounded, free)
    ds = tl.where(clipped, 0.0, free)
    if dual_clip is not None:
        limit = -advantage * dual_clip
        capped = (advantage < 0) & (s > limit)
        s = tl.where(capped, limit, s)
        ds = tl.where(capped, 0.0, ds)
    # 0, or NaN where an input is infinite: a clip must not turn that into a number.
    poison = (old + advantage + weight + logp) * 0.0
    if importance_ptr is not None:
        importance = tl.load(importance_ptr + offs, mask=inside, other=0.0)
        poison += importance * 0.0
        s = tl.where(importance == 0.0, 0.0, s * importance)
        ds = tl.where(importance == 0.0, 0.0, ds * importance)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + offs, mask=inside, other=0.0)
        poison += ref * 0.0
        delta = ref - logp
        grown = expm1(delta)
        s += kl_coef * (grown - delta)
        ds -= kl_coef * grown
    entropy = tl.zeros((BLOCK,), tl.float32)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + offs, mask=inside, other=0.0)
        if entropy_coef is not None:
            poison += entropy * 0.0
            s -= entropy_coef * entropy
            tl.store(dentropy_ptr + offs, tl.where(trained, -entropy_coef * weight + poison, 0.0), mask=inside)
    tl.store(loss_ptr + offs, tl.where(trained, weight * s + poison, 0.0), mask=inside)
    tl.store(dlogp_ptr + offs, tl.where(trained, weight * ds + poison, 0.0), mask=inside)

    out = stats_ptr + pid * 6
    tl.store(out, tl.sum(tl.where(trained, 1.0, 0.0), axis=0))
    tl.store(out + 1, tl.sum(tl.where(trained & clipped, 1.0, 0.0), axis=0))
    # k3 of old against new, (ρ − 1) − log ρ
    tl.store(out + 2, tl.sum(tl.where(trained, expm1(logp - old) - (logp - old), 0.0), axis=0))
    tl.store(out + 3, tl.sum(tl.where(trained, ratio, 0.0), axis=0))
    tl.store(out + 4, tl.sum(tl.where(trained, entropy, 0.0), axis=0))
    tl.store(out + 5, tl.max(tl.where(trained, ratio, 0.0), axis=0))


@triton.jit
def token_reward(prm_ptr, ref_ptr, mask_ptr, offs, inside, beta):
    """β·(prm − ref)·mask; exactly 0 where the mask is, whatever stands there."""
    r = beta * (tl.load(prm_ptr + offs, mask=inside, other=0.0) - tl.load(ref_ptr + offs, mask=inside, other=0.0))
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + offs, mask=inside, other=0.0)
        r = tl.where(kept == 0.0, 0.0, r * kept)
    return tl.where(inside, r, 0.0)


@triton.jit
def prm_kernel(
    prm_ptr, ref_ptr, mask_ptr, bounds_ptr, outcome_ptr, reward_ptr, logit_ptr, loss_ptr, dlogp_ptr, beta, mean,
    BLOCK: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    begin = tl.load(bounds_ptr + seq).to(tl.int64)
    end = tl.load(bounds_ptr + seq + 1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < end
        r = token_reward(prm_ptr, ref_ptr, mask_ptr, offs, inside, beta)
        tl.store(reward_ptr + offs, r, mask=inside)
        total += r
    logit = tl.sum(total, axis=0)
    logit += logit * 0.0  # NaN of an infinite reward: a sigmoid must not turn that into a number
    tl.store(logit_ptr + seq, logit)

    if outcome_ptr is not None:
        # BCE with logits: max(l, 0) − l·y + log(1 + e^{−|l|}), derivative σ(l) − y
        y = tl.load(outcome_ptr + seq)
        y = tl.where((y >= 0) & (y <= 1), y, float("nan"))  # the host has not looked at it
        e = tl.exp(-tl.abs(logit))
        positive = tl.where(logit < 0, 0.0, logit)  # NaN stays
        tl.store(loss_ptr + seq, positive - logit * y + log1p(e))
        sigmoid = tl.where(logit < 0, e, 1.0) / (1.0 + e)
        d = (sigmoid - y) * mean * beta
        for start in range(begin, end, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            inside = offs < end
            dlogp = tl.zeros((BLOCK,), tl.float32) + d
            if mask_ptr is not None:
                kept = tl.load(mask_ptr + offs, mask=inside, other=0.0)
                dlogp = tl.where(kept == 0.0, 0.0, dlogp * kept)
            tl.store(dlogp_ptr + offs, dlogp, mask=inside)


@triton.jit
def _segmented_add(sum_a, first_a, sum_b, first_b):
    return tl.where(first_b != 0, sum_b, sum_a + sum_b), first_a | first_b


@triton.jit
def reward_kernel(
    prm_ptr, ref_ptr, mask_ptr, bounds_ptr, end_ptr, reward_ptr, beta, EACH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    seq = tl.program_id(0)
    begin = tl.load(bounds_ptr + seq).to(tl.int64)
    end = tl.load(bounds_ptr + seq + 1).to(tl.int64)
    # The sequence's last token that counts closes its last step.
    last = end - 1
    if mask_ptr is not None and not EACH:
        latest = tl.full((BLOCK,), -1, tl.int64)
        for start in range(begin, end, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            kept = tl.load(mask_ptr + offs, mask=offs < end, other=0.0) != 0.0
            latest = tl.maximum(latest, tl.where(kept, offs, -1))
        last = tl.max(latest, axis=0)

    carried = 0.0  # rewards of the step that the previous block left open
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < end
        r = token_reward(prm_ptr, ref_ptr, mask_ptr, offs, inside, beta)
        if not EACH:
            closes = offs == last
            opens = (offs == begin) | (offs == last + 1)
            if end_ptr is not None:
                closes = closes | (tl.load(end_ptr + offs, mask=inside, other=0) != 0)
                opens = opens | (tl.load(end_ptr + offs - 1, mask=inside & (offs > begin), other=0) != 0)
            sums, opened = tl.associative_scan((r, opens.to(tl.int32)), 0, _segmented_add)
            sums = tl.where(opened != 0, sums, sums + carried)
            carried = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, sums, 0.0), axis=0)
            r = tl.where(closes, sums, 0.0)
        tl.store(reward_ptr + offs, r, mask=inside)


def ppo(
    logp: Tensor, entropy: Tensor | None, old_logp: Tensor, advantages: Tensor, token_weight: Tensor,
    ref_logp: Tensor | None, importance: Tensor | None, clip_low: float, clip_high: float, dual_clip: float | None,
    entropy_coef: float | None, kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Per-token loss [n], its derivatives dlogp [n] and dentropy [n] (None without coefficient), statistics [P, 6]."""
    n = len(logp)
    programs = triton.cdiv(n, PPO_BLOCK)
    loss, dlogp = logp.new_empty(n), logp.new_empty(n)
    dentropy = logp.new_empty(n) if entropy_coef is not None else None
    stats = logp.new_empty((programs, len(PPO_STATS)))
    if n:
        ppo_kernel[(programs,)](
            logp, entropy, old_logp, advantages, token_weight, ref_logp, importance, loss, dlogp, dentropy, stats,
            n, clip_low, clip_high, dual_clip, entropy_coef, kl_coef, BLOCK=PPO_BLOCK, num_warps=4,
        )  # fmt: skip
    return loss, dlogp, dentropy, stats


def prm(
    prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, bounds: Tensor, outcomes: Tensor | None, beta: float,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(reward [T], logits [S], loss [S], dlogp [T]) of packed tokens; the last two are written only with outcomes.

    dlogp is the derivative of Σ loss/sequences.
    """
    S = len(bounds) - 1
    reward, dlogp = prm_logp.new_zeros(len(prm_logp)), prm_logp.new_zeros(len(prm_logp))
    logits, loss = prm_logp.new_empty(S), prm_logp.new_empty(S)
    prm_kernel[(S,)](
        prm_logp, ref_logp, mask, bounds, outcomes, reward, logits, loss, dlogp, beta, 1.0 / sequences,
        BLOCK=SEQUENCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return reward, logits, loss, dlogp


def reward(
    prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, bounds: Tensor, step_ends: Tensor | None, beta: float,
    each: bool,
) -> Tensor:  # fmt: skip
    """Rewards [T] of packed tokens, summed over each step onto its last token; one step where step_ends is None.

    With `each`, every token is a step; `bounds` then only shares out the work.
    """
    out = prm_logp.new_zeros(len(prm_logp))
    reward_kernel[(len(bounds) - 1,)](
        prm_logp, ref_logp, mask, bounds, step_ends, out, beta, EACH=each, BLOCK=SEQUENCE_BLOCK, num_warps=4
    )
    return out
