"""PPO's clipped loss, on given log-probs or in one pass from hidden states.

One epilogue serves both: [n] numbers in, per-token loss, its derivatives and partial statistics out; a Triton kernel,
and the same in torch for CPUs and fp64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .calls import HeadArgs, flatten, open_head, strategy_for, working_on
from .checks import check_number, check_rows
from .kernels import losses as kernels
from .kernels.common import IGNORED
from .onepass import Wanted, loss_and_gradients, register_stored_gradients
from .tiles import RowStats
from .types import PPOLoss, PPOStats
from .workspace import one_pass_workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOOptions:
    """Numbers of the loss; None leaves a term out."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float | None
    kl_coef: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PPORows:
    """Per-token inputs [n] in the log-probs' dtype."""

    old_logp: Tensor
    advantages: Tensor
    token_weight: Tensor
    ref_logp: Tensor | None
    importance: Tensor | None

    def __getitem__(self, at: slice) -> "PPORows":
        ref = None if self.ref_logp is None else self.ref_logp[at]
        importance = None if self.importance is None else self.importance[at]
        return PPORows(
            old_logp=self.old_logp[at], advantages=self.advantages[at], token_weight=self.token_weight[at],
            ref_logp=ref, importance=importance,
        )  # fmt: skip


def _terms(
    logp: Tensor, entropy: Tensor | None, x: PPORows, o: PPOOptions, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(loss [n], dlogp [n], dentropy [n] | None, partial statistics [P, 6])."""
    if use_triton:
        return kernels.ppo(
            logp, entropy, x.old_logp, x.advantages, x.token_weight, x.ref_logp, x.importance,
            o.clip_low, o.clip_high, o.dual_clip, o.entropy_coef, o.kl_coef,
        )  # fmt: skip
    # As kernels.losses.ppo_kernel, which has the comments.
    trained = x.token_weight != 0
    log_ratio = logp - x.old_logp
    ratio = log_ratio.exp()
    free = -x.advantages * ratio
    bounded = -x.advantages * ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    clipped = bounded > free
    s, ds = torch.where(clipped, bounded, free), free.masked_fill(clipped, 0)
    if o.dual_clip is not None:
        limit = -x.advantages * o.dual_clip
        capped = (x.advantages < 0) & (s > limit)
        s, ds = torch.where(capped, limit, s), ds.masked_fill(capped, 0)
    poison = (x.old_logp + x.advantages + x.token_weight + logp) * 0
    if x.importance is not None:
        poison = poison + x.importance * 0
        s, ds = s * x.importance, ds * x.importance
    if x.ref_logp is not None:
        poison = poison + x.ref_logp * 0
        delta = x.ref_logp - logp
        s, ds = s + o.kl_coef * (delta.expm1() - delta), ds - o.kl_coef * delta.expm1()
    dentropy = None
    if entropy is not None and o.entropy_coef is not None:
        poison = poison + entropy * 0
        s = s - o.entropy_coef * entropy
        dentropy = torch.where(trained, poison - o.entropy_coef * x.token_weight, 0)
    loss = torch.where(trained, x.token_weight * s + poison, 0)
    dlogp = torch.where(trained, x.token_weight * ds + poison, 0)

    def over_trained(t: Tensor) -> Tensor:
        return torch.where(trained, t, 0)

    summed = (trained, trained & clipped, over_trained(log_ratio.expm1() - log_ratio), over_trained(ratio))
    stats = [t.to(logp.dtype).sum() for t in summed]
    stats.append(over_trained(logp * 0 if entropy is None else entropy).sum())
    # Of no tokens the largest ratio is 0.
    stats.append(torch.cat((over_trained(ratio), logp.new_zeros(1))).amax())
    return loss, dlogp, dentropy, torch.stack(stats)[None]


def _stats(partials: list[Tensor], like: Tensor) -> Tensor:
    """(clip_fraction, approx_kl, ratio_mean, ratio_max, entropy_mean) [5] from partial statistics."""
    parts = torch.cat([*partials, like.new_zeros((1, len(kernels.PPO_STATS)))])
    tokens, clipped, kl, ratio, entropy, _ = parts.sum(0).unbind()
    count = tokens.clamp(min=1)
    return torch.stack((clipped / count, kl / count, ratio / count, parts[:, 5].amax(), entropy / count))


@torch.library.custom_op("prime_kernels::ppo_clip_loss", mutates_args=())
def _ppo_clip_loss(
    logp: Tensor, entropy: Tensor | None, old_logp: Tensor, advantages: Tensor, token_weight: Tensor,
    ref_logp: Tensor | None, importance: Tensor | None, clip_low: float, clip_high: float, dual_clip: float | None,
    entropy_coef: float | None, kl_coef: float, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, stats [5], dlogp [n], dentropy [n] or empty) of flat inputs."""
    rows = PPORows(
        old_logp=old_logp, advantages=advantages, token_weight=token_weight, ref_logp=ref_logp, importance=importance
    )
    options = PPOOptions(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, entropy_coef=entropy_coef, kl_coef=kl_coef
    )
    with working_on(logp):
        loss, dlogp, dentropy, partial = _terms(logp, entropy, rows, options, use_triton)
    return loss.sum(), _stats([partial], logp), dlogp, logp.new_empty(0) if dentropy is None else dentropy


@_ppo_clip_loss.register_fake
def _(
    logp: Tensor, entropy: Tensor | None, old_logp: Tensor, advantages: Tensor, token_weight: Tensor,
    ref_logp: Tensor | None, importance: Tensor | None, clip_low: float, clip_high: float, dual_clip: float | None,
    entropy_coef: float | None, kl_coef: float, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with_entropy = entropy is not None and entropy_coef is not None
    dentropy = logp.new_empty(logp.shape if with_entropy else (0,))
    return logp.new_empty(()), logp.new_empty(5), torch.empty_like(logp), dentropy


def _setup_given(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward_given(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
    dlogp, dentropy = ctx.saved_tensors
    return upstream * dlogp, upstream * dentropy if len(dentropy) else None, *(None,) * 11


_ppo_clip_loss.register_autograd(_backward_given, setup_context=_setup_given)


@torch.library.custom_op("prime_kernels::linear_ppo_loss", mutates_args=())
def _linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str,
    old_logp: Tensor, advantages: Tensor, token_weight: Tensor, ref_logp: Tensor | None, importance: Tensor | None,
    clip_low: float, clip_high: float, dual_clip: float | None, entropy_coef: float | None, kl_coef: float,
    need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, stats [5], logp [N], entropy [N], dhidden, dweight, dbias), empty gradients where not needed."""
    args = HeadArgs(hidden, weight, targets, bias, temperature, softcap, ignore_index, backend)
    N, dtype = len(hidden), gemm.stats_dtype(hidden.dtype)
    token_loss, logp, entropy = (hidden.new_zeros(N, dtype=dtype) for _ in range(3))
    partials: list[Tensor] = []
    use_triton = strategy_for(hidden, backend) != "torch"
    options = PPOOptions(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, entropy_coef=entropy_coef, kl_coef=kl_coef
    )
    with open_head(args) as (tiles, rows, head):
        inputs = PPORows(
            old_logp=old_logp, advantages=advantages, token_weight=token_weight.masked_fill(rows.codes == IGNORED, 0),
            ref_logp=ref_logp, importance=importance,
        )  # fmt: skip

        def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
            logp[at], entropy[at] = stats.logp, stats.entropy
            token_loss[at], dlogp, dentropy, partial = _terms(
                stats.logp, stats.entropy, inputs[at], options, use_triton
            )
            partials.append(partial)
            return dlogp, dentropy

        wanted = Wanted(hidden=need_dh, weight=need_dw, bias=need_dbias)
        found = loss_and_gradients(tiles, rows, head, epilogue, wanted, workspace=one_pass_workspace())
    return token_loss.sum(), _stats(partials, logp), logp, entropy, found.hidden, found.weight, found.bias


@_linear_ppo_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str,
    old_logp: Tensor, advantages: Tensor, token_weight: Tensor, ref_logp: Tensor | None, importance: Tensor | None,
    clip_low: float, clip_high: float, dual_clip: float | None, entropy_coef: float | None, kl_coef: float,
    need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    N, dtype = len(hidden), gemm.stats_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype), hidden.new_empty(5, dtype=dtype),
        hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(hidden.shape if need_dh else (0,)), hidden.new_empty(weight.shape if need_dw else (0,)),
        hidden.new_empty(len(weight) if need_dbias else 0),
    )  # fmt: skip


register_stored_gradients(_linear_ppo_loss, results=4)


def _checked_options(
    clip_low: float, clip_high: float, dual_clip: float | None, entropy_coef: float, kl_coef: float,
    ref_logp: Tensor | None,
) -> tuple[float, float, float | None, float | None, float]:  # fmt: skip
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("kl_coef", kl_coef)):
        check_number(name, value, at_least=0.0)
    check_number("entropy_coef", entropy_coef)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    if kl_coef and ref_logp is None:
        raise ValueError(f"ref_logp must be given where kl_coef is not 0, got None with kl_coef={kl_coef}")
    return float(clip_low), float(clip_high), dual_clip, float(entropy_coef) or None, float(kl_coef)


def _flat_rows(like: Tensor, dtype: torch.dtype, **rows: Tensor | None) -> list[Any]:
    """Per-token inputs, checked, detached, flat and in the log-probs' dtype."""
    check_rows(like, **rows)
    return [None if t is None else t.detach().to(dtype).reshape(-1).contiguous() for t in rows.values()]


def _stats_tuple(stats: Tensor) -> PPOStats:
    return PPOStats(*stats.unbind())


def ppo_clip_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, token_weight: Tensor, *, clip_low: float = 0.2,
    clip_high: float = 0.2, dual_clip: float | None = None, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    kl_coef: float = 0.0, ref_logp: Tensor | None = None, importance: Tensor | None = None, backend: str = "auto",
) -> PPOLoss:  # fmt: skip
    """The loss of `linear_ppo_loss` on given log-probs, in one kernel launch; differentiable in logp and entropy.

    Args:
        logp, old_logp, advantages, token_weight, ref_logp, importance: [...] of one shape, packed or padded (padding
            has token_weight 0, and whatever else stands there is not looked at).
        entropy: [...]; needed where entropy_coef is not 0.
        backend: "auto", "triton" or "torch".

    Returns:
        PPOLoss(loss, logp, entropy, stats), logp and entropy as given, detached.
    """
    dtype = gemm.stats_dtype(logp.dtype)
    options = _checked_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, ref_logp)
    if options[3] is not None and entropy is None:
        raise ValueError(f"entropy must be given where entropy_coef is not 0, got None with {entropy_coef}")
    rows = _flat_rows(
        logp, dtype, old_logp=old_logp, advantages=advantages, token_weight=token_weight, ref_logp=ref_logp,
        importance=importance,
    )  # fmt: skip
    check_rows(logp, entropy=entropy)
    flat_entropy = None if entropy is None else entropy.to(dtype).reshape(-1).contiguous()
    use_triton = strategy_for(logp, backend) != "torch"
    flat = logp.to(dtype).reshape(-1).contiguous()
    loss, stats, *_ = _ppo_clip_loss(flat, flat_entropy, *rows, *options, use_triton)
    return PPOLoss(loss, logp.detach(), None if entropy is None else entropy.detach(), _stats_tuple(stats))


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logp: Tensor, advantages: Tensor, token_weight: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, entropy_coef: float = 0.0,
    kl_coef: float = 0.0, ref_logp: Tensor | None = None, importance: Tensor | None = None, bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, softcap: float | None = None, ignore_index: int = -100, backend: str = "auto",
) -> PPOLoss:  # fmt: skip
    """PPO's clipped loss of a linear head and all its gradients, in one pass over the vocabulary (6NDV FLOP).

        loss = Σ_i token_weight_i · ℓ_i
        ρ = exp(logp − old_logp)
        s = max(−A·ρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high)),  with dual_clip c and A < 0: s = min(s, −A·c)
        ℓ = importance·s + kl_coef·(exp(δ) − δ − 1) − entropy_coef·entropy,  δ = ref_logp − logp   (k3)

    logp and entropy as in `linear_logprob`. Clipping: Schulman et al. 2017; asymmetric: DAPO; dual: Ye et al. 2020;
    k3: Schulman 2020, "Approximating KL divergence".

    Args:
        hidden, weight, targets, bias, temperature, softcap, ignore_index, backend: as in `linear_logprob`.
        old_logp, advantages: [...] of the targets' shape; no gradient, like the three below.
        token_weight: [...] mask and normaliser in one; 0 contributes exactly nothing, whatever else stands there.
        ref_logp: [...], needed where kl_coef is not 0.
        importance: [...] a factor on the clipped term, such as truncated importance weights; 1 where None.

    Returns:
        PPOLoss(loss, logp, entropy, stats): everything but the loss is detached; stats stay on the device.

    Cost and backward as `linear_token_loss`. An infinite or NaN input of a trained token makes the loss NaN.

    Raises:
        TypeError, ValueError: as `linear_logprob`, and where an argument above is off.
    """
    args = flatten(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    options = _checked_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, ref_logp)
    rows = _flat_rows(
        targets, gemm.stats_dtype(args.hidden.dtype), old_logp=old_logp, advantages=advantages,
        token_weight=token_weight, ref_logp=ref_logp, importance=importance,
    )  # fmt: skip
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (args.hidden, args.weight, args.bias)
    ]
    loss, stats, logp, entropy, *_ = _linear_ppo_loss(*args, *rows, *options, *needs)
    shape = targets.shape
    return PPOLoss(loss, logp.view(shape), entropy.view(shape), _stats_tuple(stats))
