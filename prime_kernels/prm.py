"""The losses of the implicit process reward model, on given log-probs or in one pass from hidden states.

r_t = β·(log π_prm(y_t) − log π_ref(y_t)), and the sequence's logit is Σ_t r_t (arXiv 2412.01981, 2502.01456).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import gemm
from .calls import HeadArgs, flatten, open_head, strategy_for, working_on
from .checks import check_number, check_rows
from .kernels import losses as kernels
from .kernels.common import IGNORED
from .onepass import Wanted, loss_and_gradients, register_stored_gradients
from .sequences import boundaries, checked_cu_seqlens, cu_seqlens_of, flat, lengths, token_reward
from .tiles import RowStats
from .types import PRMLoss
from .workspace import one_pass_workspace

KINDS = ("ce", "dpo")


def _sequence_terms(
    logp: Tensor, ref: Tensor, mask: Tensor | None, bounds: list[int], outcomes: Tensor, group_ids: Tensor | None,
    beta: float, sequences: int, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(reward [T], logits [S], loss [S], dlogp [T]) of whole sequences; dlogp is that of Σ loss/sequences.

    With group_ids the loss is "dpo", without it "ce".
    """
    device_bounds = torch.tensor(bounds, dtype=torch.int64).to(logp.device, non_blocking=True)
    if use_triton and group_ids is None:
        return kernels.prm(logp, ref, mask, device_bounds, outcomes, beta, sequences)
    if use_triton:
        reward, logits, _, _ = kernels.prm(logp, ref, mask, device_bounds, None, beta, sequences)
    else:
        reward = token_reward(logp, ref, mask, beta)
        logits = torch.stack([part.sum() for part in reward.split(lengths(bounds))])
    if group_ids is None:
        loss = softplus(-logits.abs()) + logits.clamp(min=0) - logits * outcomes
        dlogit = logits.sigmoid() - outcomes
    else:
        loss, dlogit = _dpo(logits, outcomes, group_ids)
    scale = dlogit * (beta / sequences)
    dlogp = scale.repeat_interleave(device_bounds.diff(), output_size=len(logp))
    return reward, logits, loss, dlogp if mask is None else dlogp * mask


def _dpo(logits: Tensor, outcomes: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """−log σ(±(logit − other)) and its derivative, other the detached mean logit of the group's opposites.

    Opposites of a sequence with outcome > 0 are those of its group with a lower outcome, of one with outcome 0 those
    with a higher one; without any, other is 0. The sign is + for outcome > 0.
    """
    right = outcomes > 0
    lower, higher = outcomes[None, :] < outcomes[:, None], outcomes[None, :] > outcomes[:, None]
    opposite = (group_ids[None, :] == group_ids[:, None]) & torch.where(right[:, None], lower, higher)
    other = torch.where(opposite, logits[None, :], 0).sum(1) / opposite.sum(1).clamp(min=1)
    sign = torch.where(right, 1.0, -1.0).to(logits.dtype)
    margin = sign * (logits - other)
    return softplus(-margin), -sign * (-margin).sigmoid()


@torch.library.custom_op("prime_kernels::prm_loss", mutates_args=())
def _prm_loss(
    prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor, outcomes: Tensor,
    group_ids: Tensor | None, beta: float, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, reward [T], logits [S], dlogp [T]) of packed tokens."""
    with working_on(prm_logp):
        reward, logits, loss, dlogp = _sequence_terms(
            prm_logp, ref_logp, mask, boundaries(cu_seqlens, len(prm_logp)), outcomes, group_ids, beta, len(outcomes),
            use_triton,
        )  # fmt: skip
    return loss.mean(), reward, logits, dlogp


@_prm_loss.register_fake
def _(
    prm_logp: Tensor, ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor, outcomes: Tensor,
    group_ids: Tensor | None, beta: float, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return prm_logp.new_empty(()), torch.empty_like(prm_logp), torch.empty_like(outcomes), torch.empty_like(prm_logp)


def _setup_given(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3])


def _backward_given(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
    return upstream * ctx.saved_tensors[0], *(None,) * 7


_prm_loss.register_autograd(_backward_given, setup_context=_setup_given)


@torch.library.custom_op("prime_kernels::linear_prm_loss", mutates_args=())
def _linear_prm_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str,
    ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor, outcomes: Tensor, group_ids: Tensor | None,
    beta: float, need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, reward [T], logits [S], dhidden, dweight, dbias), empty gradients where not needed."""
    args = HeadArgs(hidden, weight, targets, bias, temperature, softcap, ignore_index, backend)
    S, bounds = len(outcomes), boundaries(cu_seqlens, len(hidden))
    reward = hidden.new_zeros(len(hidden), dtype=ref_logp.dtype)
    logits, loss = torch.zeros_like(outcomes), torch.zeros_like(outcomes)
    use_triton = strategy_for(hidden, backend) != "torch"
    index_of = {start: i for i, start in enumerate(bounds)}
    with open_head(args) as (tiles, rows, head):
        kept = (rows.codes != IGNORED).to(ref_logp.dtype)
        kept = kept if mask is None else torch.where(rows.codes == IGNORED, 0, mask)

        def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, None]:
            first, last = index_of[at.start], index_of[at.stop]
            here = slice(first, last)
            groups = None if group_ids is None else group_ids[here]
            inside = [b - at.start for b in bounds[first : last + 1]]
            reward[at], logits[here], loss[here], dlogp = _sequence_terms(
                stats.logp, ref_logp[at], kept[at], inside, outcomes[here], groups, beta, S, use_triton
            )
            return dlogp, None

        wanted = Wanted(hidden=need_dh, weight=need_dw, bias=need_dbias)
        found = loss_and_gradients(
            tiles, rows, head, epilogue, wanted, workspace=one_pass_workspace(), sequences=bounds,
            together=group_ids is not None,
        )  # fmt: skip
    return loss.mean(), reward, logits, found.hidden, found.weight, found.bias


@_linear_prm_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str,
    ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor, outcomes: Tensor, group_ids: Tensor | None,
    beta: float, need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        ref_logp.new_empty(()), torch.empty_like(ref_logp), torch.empty_like(outcomes),
        hidden.new_empty(hidden.shape if need_dh else (0,)), hidden.new_empty(weight.shape if need_dw else (0,)),
        hidden.new_empty(len(weight) if need_dbias else 0),
    )  # fmt: skip


register_stored_gradients(_linear_prm_loss, results=3)


def _checked_sequences(
    cu_seqlens: Tensor, outcomes: Tensor, beta: float, kind: str, group_ids: Tensor | None, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    check_number("beta", beta, above=0.0)
    if kind not in KINDS:
        raise ValueError(f"kind must be 'ce' or 'dpo', got {kind!r}")
    S = len(cu_seqlens) - 1
    if not isinstance(outcomes, Tensor) or outcomes.shape != (S,):
        found = list(outcomes.shape) if isinstance(outcomes, Tensor) else type(outcomes).__name__
        raise ValueError(f"outcomes must have shape [{S}], one a sequence, got {found}")
    if kind == "ce":
        return outcomes.detach().to(device, dtype), None
    if group_ids is None or group_ids.shape != (S,):
        shape = None if group_ids is None else list(group_ids.shape)
        raise ValueError(f"group_ids must have shape [{S}] where kind is 'dpo', got {shape}")
    return outcomes.detach().to(device, dtype), group_ids.to(device)


def prm_loss(
    prm_logp: Tensor, ref_logp: Tensor, cu_seqlens: Tensor | None, outcomes: Tensor, *, beta: float = 0.05,
    mask: Tensor | None = None, kind: str = "ce", group_ids: Tensor | None = None, backend: str = "auto",
) -> PRMLoss:  # fmt: skip
    """The loss of an implicit reward model on given log-probs; differentiable in prm_logp.

        logit_s = Σ_{t in s} β·(prm_logp_t − ref_logp_t)·mask_t
        "ce"    L = mean_s BCE-with-logits(logit_s, outcome_s); fractional outcomes are soft labels
        "dpo"   L = mean_s −log σ(±(logit_s − other_s)), + where outcome_s > 0; other_s, detached, is the mean logit of
                the sequences of its group with a lower outcome (for outcome_s = 0: a higher one), 0 without any

    One kernel launch for "ce". Source: PRIME (arXiv 2502.01456) and its released code.

    Args:
        prm_logp, ref_logp, mask: [T] packed, or [S, L] padded with cu_seqlens None; where the mask is 0 nothing else
            is looked at.
        cu_seqlens: [S + 1] int32 or int64 boundaries, on the host (on CUDA it costs a synchronisation).
        outcomes: [S] in [0, 1].
        group_ids: [S] the prompt of each sequence, for "dpo".
        backend: "auto", "triton" or "torch".

    Returns:
        PRMLoss(loss, reward of prm_logp's shape, logits [S]).

    Raises:
        TypeError, ValueError: an argument is off, beta is not positive, a sequence is empty.
    """
    cu_seqlens = cu_seqlens_of(prm_logp, cu_seqlens)
    check_rows(prm_logp, ref_logp=ref_logp, mask=mask)
    dtype = gemm.stats_dtype(prm_logp.dtype)
    outcomes, groups = _checked_sequences(cu_seqlens, outcomes, beta, kind, group_ids, dtype, prm_logp.device)
    use_triton = strategy_for(prm_logp, backend) != "torch"
    loss, reward, logits, _ = _prm_loss(
        flat(prm_logp, dtype), flat(ref_logp.detach(), dtype), flat(mask, dtype), cu_seqlens, outcomes, groups,
        float(beta), use_triton,
    )  # fmt: skip
    return PRMLoss(loss, reward.view(prm_logp.shape), logits)


def linear_prm_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, outcomes: Tensor, *,
    beta: float = 0.05, mask: Tensor | None = None, kind: str = "ce", group_ids: Tensor | None = None,
    bias: Tensor | None = None, temperature: float | Tensor = 1.0, softcap: float | None = None,
    ignore_index: int = -100, backend: str = "auto",
) -> PRMLoss:  # fmt: skip
    """`prm_loss` of a linear head with all its gradients, and the token rewards from the same pass.

    "ce" takes one pass over the vocabulary (6NDV FLOP) on chunks aligned to sequences; a sequence longer than a chunk,
    and "dpo", whose groups span chunks, take two (8NDV). This is PRIME's single-forward update.

    Args:
        hidden: [T, D] packed tokens; weight, targets [T], bias, temperature, softcap, ignore_index, backend: as in
            `linear_logprob`. Ignored tokens have no reward.
        ref_logp, mask: [T]. cu_seqlens, outcomes, beta, kind, group_ids: as in `prm_loss`.

    Returns:
        PRMLoss(loss, reward [T], logits [S]); reward and logits are detached.

    Cost and backward as `linear_token_loss`. Raises as `linear_logprob` and `prm_loss`.
    """
    args = flatten(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    if targets.dim() != 1:
        raise ValueError(f"targets must have shape [T], packed, got {list(targets.shape)}")
    checked_cu_seqlens(cu_seqlens)
    check_rows(targets, ref_logp=ref_logp, mask=mask)
    dtype = gemm.stats_dtype(args.hidden.dtype)
    outcomes, groups = _checked_sequences(cu_seqlens, outcomes, beta, kind, group_ids, dtype, hidden.device)
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (args.hidden, args.weight, args.bias)
    ]
    loss, reward, logits, *_ = _linear_prm_loss(
        *args, flat(ref_logp.detach(), dtype), flat(mask, dtype), cu_seqlens, outcomes, groups, float(beta), *needs
    )
    return PRMLoss(loss, reward, logits)
