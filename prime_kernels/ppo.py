"""PPO's clipped loss, on given log-probs or in one pass from hidden states.

One epilogue serves both: [n] numbers in, per-token loss, its derivatives and partial statistics out; a Triton kernel,
and the same in torch for CPUs and fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .calls import HeadCall, flat, head_arguments, open_head, strategy_for, trained, working_on
from .checks import check_logp, check_number, check_reverse_mode, check_rows, real_number
from .constants import IGNORED, PPO_STATS
from .kept import exponentials_like, keeps_exponentials, loss_and_exponentials, of_exponentials
from .onepass import Epilogue, Gradients, Wanted, loss_and_gradients, of_stored_gradients
from .operators import Derivative, Results, Saved, own, register
from .tiles import Head, Rows, RowStats, Tiles
from .types import PPOLoss, PPOStats
from .workspace import one_pass_workspace


@dataclass(frozen=True, slots=True)
class GivenPPOCall:
    """Arguments of `prime_kernels::ppo_clip_loss`: flat, in the log-probs' dtype; None leaves a term out."""

    logp: Tensor
    entropy: Tensor | None
    old_logp: Tensor
    advantages: Tensor
    token_weight: Tensor
    ref_logp: Tensor | None
    importance: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float | None
    kl_coef: float
    use_triton: bool


@dataclass(frozen=True, slots=True)
class LinearPPOCall(HeadCall):
    """Arguments of `prime_kernels::linear_ppo_loss`."""

    old_logp: Tensor
    advantages: Tensor
    token_weight: Tensor
    ref_logp: Tensor | None
    importance: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float | None
    kl_coef: float
    need_dh: bool
    need_dw: bool
    need_dbias: bool

    def given(self, at: slice, logp: Tensor, entropy: Tensor, token_weight: Tensor, use_triton: bool) -> GivenPPOCall:
        """The loss of tokens `at` once their log-probs are there."""

        def part(t: Any) -> Any:
            return None if t is None else t[at]

        return GivenPPOCall(
            logp, entropy, part(self.old_logp), part(self.advantages), token_weight[at], part(self.ref_logp),
            part(self.importance), self.clip_low, self.clip_high, self.dual_clip, self.entropy_coef, self.kl_coef,
            use_triton,
        )  # fmt: skip


def _terms(x: GivenPPOCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(loss [n], dlogp [n], dentropy [n] | None, partial statistics [P, 6])."""
    logp, entropy = x.logp, x.entropy
    if x.use_triton:
        from .kernels import losses

        return losses.ppo(
            logp, entropy, x.old_logp, x.advantages, x.token_weight, x.ref_logp, x.importance,
            x.clip_low, x.clip_high, x.dual_clip, x.entropy_coef, x.kl_coef,
        )  # fmt: skip
    # As kernels.losses.ppo_kernel, which has the comments.
    trained = x.token_weight != 0
    log_ratio = logp - x.old_logp
    ratio = log_ratio.exp()
    free = (-x.advantages * ratio).masked_fill_(x.advantages == 0, 0)
    bounded = -x.advantages * ratio.clamp(1 - x.clip_low, 1 + x.clip_high)
    clipped = bounded > free
    s, ds = torch.where(clipped, bounded, free), free.masked_fill(clipped, 0)
    if x.dual_clip is not None:
        limit = -x.advantages * x.dual_clip
        capped = (x.advantages < 0) & (s > limit)
        s, ds = torch.where(capped, limit, s), ds.masked_fill(capped, 0)
    poison = (x.old_logp + x.advantages + x.token_weight + logp) * 0
    if x.importance is not None:
        poison = poison + x.importance * 0
        nothing = x.importance == 0
        s, ds = (s * x.importance).masked_fill_(nothing, 0), (ds * x.importance).masked_fill_(nothing, 0)
    if x.ref_logp is not None:
        poison = poison + x.ref_logp * 0
        delta = x.ref_logp - logp
        s, ds = s + x.kl_coef * (delta.expm1() - delta), ds - x.kl_coef * delta.expm1()
    dentropy = None
    if entropy is not None and x.entropy_coef is not None:
        poison = poison + entropy * 0
        s = s - x.entropy_coef * entropy
        dentropy = torch.where(trained, poison - x.entropy_coef * x.token_weight, 0)
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
    parts = torch.cat([*partials, like.new_zeros((1, len(PPO_STATS)))])
    tokens, clipped, kl, ratio, entropy, _ = parts.sum(0).unbind()
    count = tokens.clamp(min=1)
    return torch.stack((clipped / count, kl / count, ratio / count, parts[:, 5].amax(), entropy / count))


def _given(call: GivenPPOCall) -> Results:
    """(loss, stats [5], dlogp [n], dentropy [n] or empty) of flat inputs."""
    with working_on(call.logp):
        loss, dlogp, dentropy, partial = _terms(call)
        return (
            loss.sum(), _stats([partial], call.logp), dlogp, call.logp.new_empty(0) if dentropy is None else dentropy,
        )  # fmt: skip


def _given_fake(call: GivenPPOCall) -> Results:
    logp = call.logp
    with_entropy = call.entropy is not None and call.entropy_coef is not None
    dentropy = logp.new_empty(logp.shape if with_entropy else (0,))
    return logp.new_empty(()), logp.new_empty(5), torch.empty_like(logp), dentropy


def _given_gradients(saved: Saved[GivenPPOCall], upstream: Tensor) -> dict[str, Tensor]:
    dlogp, dentropy = saved.tensors
    gradients = {"logp": upstream * dlogp}
    return gradients if saved.options.entropy_coef is None else gradients | {"entropy": upstream * dentropy}


_ppo_clip_loss = register(
    "ppo_clip_loss", GivenPPOCall, 4, _given, _given_fake,
    Derivative(results=1, gradients=_given_gradients, keep=lambda _, results: results[2:]),
)  # fmt: skip


def _linear(call: LinearPPOCall) -> Results:
    """(loss, stats [5], logp [...], entropy [...], and the fields of `Gradients`)."""

    def finish(tiles: Tiles, rows: Rows, head: Head, epilogue: Epilogue) -> Results:
        workspace = one_pass_workspace()
        return tuple(
            loss_and_gradients(tiles, rows, head, epilogue, Wanted.of(call), workspace=workspace).shaped(call.hidden)
        )

    return _with_loss(call, finish)


def _linear_kept(call: LinearPPOCall) -> Results:
    """(loss, stats [5], logp [...], entropy [...], E [N, V], v [N])."""
    return _with_loss(call, loss_and_exponentials)


def _with_loss(call: LinearPPOCall, finish: Callable[[Tiles, Rows, Head, Epilogue], Results]) -> Results:
    """(loss, stats [5], logp [...], entropy [...]), and what `finish` makes of the loss's epilogue."""
    dtype = gemm.stats_dtype(call.hidden.dtype)
    token_loss, logp, entropy = (call.hidden.new_zeros(call.targets.numel(), dtype=dtype) for _ in range(3))
    partials: list[Tensor] = []
    use_triton = strategy_for(call.hidden, call.backend) != "torch"
    trains_entropy = call.entropy_coef is not None
    with open_head(call, entropy=True, one_pass=True, entropy_gradient=trains_entropy) as (tiles, rows, head):
        token_weight = call.token_weight.masked_fill(rows.codes == IGNORED, 0)

        def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
            assert stats.entropy is not None
            logp[at], entropy[at] = stats.logp, stats.entropy
            terms = _terms(call.given(at, stats.logp, stats.entropy, token_weight, use_triton))
            token_loss[at], dlogp, dentropy, partial = terms
            partials.append(partial)
            return dlogp, dentropy

        found = finish(tiles, rows, head, epilogue)
        loss, stats = token_loss.sum(), _stats(partials, logp)
    shape = call.targets.shape
    return loss, stats, own(logp, shape), own(entropy, shape), *found


def _linear_fake(call: LinearPPOCall) -> Results:
    found = Gradients.empty(call.hidden, call.weight, Wanted.of(call))
    new, dtype = call.hidden.new_empty, found.unit.dtype
    shape = call.targets.shape
    return new((), dtype=dtype), new(5, dtype=dtype), new(shape, dtype=dtype), new(shape, dtype=dtype), *found


def _linear_kept_fake(call: LinearPPOCall) -> Results:
    return *_linear_fake(call)[:4], *exponentials_like(call)


_linear_ppo_loss = register("linear_ppo_loss", LinearPPOCall, 8, _linear, _linear_fake, of_stored_gradients(4))
_linear_ppo_loss_kept = register(
    "linear_ppo_loss_kept", LinearPPOCall, 6, _linear_kept, _linear_kept_fake, of_exponentials(4)
)  # fmt: skip


def _checked_options(
    clip_low: float, clip_high: float, dual_clip: float | None, entropy_coef: float, kl_coef: float,
    ref_logp: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("kl_coef", kl_coef)):
        check_number(name, value, at_least=0.0)
    check_number("entropy_coef", entropy_coef)
    check_number("dual_clip", dual_clip, above=1.0, optional=True)
    if kl_coef and ref_logp is None:
        raise ValueError(f"ref_logp must be given where kl_coef is not 0, got None with kl_coef={kl_coef}")
    return {
        "clip_low": real_number(clip_low), "clip_high": real_number(clip_high),
        "dual_clip": None if dual_clip is None else real_number(dual_clip),
        "entropy_coef": real_number(entropy_coef) or None, "kl_coef": real_number(kl_coef),
    }  # fmt: skip


def _flat_rows(whose: str, like: Tensor, dtype: torch.dtype, kl_coef: float, **rows: Tensor | None) -> dict[str, Any]:
    """Per-token inputs, checked, detached, flat and in the log-probs' dtype; no reference where it has no weight."""
    check_rows(whose, like, optional=("ref_logp", "importance"), **rows)
    if not kl_coef:
        rows["ref_logp"] = None
    return {name: None if t is None else flat(t.detach(), dtype) for name, t in rows.items()}


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
    check_logp("logp", logp)
    options = _checked_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, ref_logp)
    if options["entropy_coef"] is not None and entropy is None:
        raise ValueError(f"entropy must be given where entropy_coef is not 0, got None with {entropy_coef}")
    dtype = gemm.stats_dtype(logp.dtype)
    rows = _flat_rows(
        "logp's", logp, dtype, kl_coef, old_logp=old_logp, advantages=advantages, token_weight=token_weight,
        ref_logp=ref_logp, importance=importance,
    )  # fmt: skip
    check_rows("logp's", logp, optional=("entropy",), entropy=entropy)
    check_reverse_mode("ppo_clip_loss", logp=logp, entropy=entropy)
    loss, stats, *_ = _ppo_clip_loss(
        logp=flat(logp, dtype), entropy=flat(entropy, dtype), **rows, **options,
        use_triton=strategy_for(logp, backend) != "torch",
    )  # fmt: skip
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
    head = head_arguments(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    check_reverse_mode("linear_ppo_loss", hidden=hidden, weight=weight, bias=bias, temperature=temperature)
    options = _checked_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, ref_logp)
    rows = _flat_rows(
        "the targets'", targets, gemm.stats_dtype(head["hidden"].dtype), kl_coef, old_logp=old_logp,
        advantages=advantages, token_weight=token_weight, ref_logp=ref_logp, importance=importance,
    )  # fmt: skip
    wanted = trained(head)
    keeps = keeps_exponentials(
        head["hidden"], head["weight"], head["softcap"], backend, trains_weight=wanted["need_dw"],
        entropy_gradient=options["entropy_coef"] is not None,
    )  # fmt: skip
    op = _linear_ppo_loss_kept if keeps else _linear_ppo_loss
    loss, stats, logp, entropy, *_ = op(**head, **rows, **options, **wanted)
    return PPOLoss(loss, logp, entropy, _stats_tuple(stats))
