"""The losses of the implicit process reward model, on given log-probs or in one pass from hidden states.

r_t = β·(log π_prm(y_t) − log π_ref(y_t)), and the sequence's logit is Σ_t r_t (arXiv 2412.01981, 2502.01456).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import gemm
from .calls import HeadCall, flat, head_arguments, open_head, strategy_for, trained, working_on
from .checks import (
    check_choice,
    check_gets_no_gradient,
    check_host_or,
    check_logp,
    check_number,
    check_plain_tensor,
    check_reverse_mode,
    check_rows,
    may_read,
    real_number,
)
from .constants import IGNORED
from .kept import exponentials_like, keeps_exponentials, loss_and_exponentials, of_exponentials
from .onepass import Epilogue, Gradients, Wanted, loss_and_gradients, of_stored_gradients
from .operators import Derivative, Results, Saved, register
from .sequences import Sequences, checked_cu_seqlens, cu_seqlens_of, moved, token_reward
from .tiles import Head, Rows, RowStats, Tiles
from .types import PRMLoss
from .workspace import one_pass_workspace

KINDS = ("ce", "dpo")


@dataclass(frozen=True, slots=True)
class GivenPRMCall:
    """Arguments of `prime_kernels::prm_loss`: packed, in the log-probs' dtype; with group_ids the loss is "dpo"."""

    prm_logp: Tensor  # [T]
    ref_logp: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor  # [S + 1]
    outcomes: Tensor  # [S]
    group_ids: Tensor | None
    beta: float
    use_triton: bool


@dataclass(frozen=True, slots=True)
class LinearPRMCall(HeadCall):
    """Arguments of `prime_kernels::linear_prm_loss`."""

    ref_logp: Tensor  # [T]
    mask: Tensor | None
    cu_seqlens: Tensor
    outcomes: Tensor
    group_ids: Tensor | None
    beta: float
    need_dh: bool
    need_dw: bool
    need_dbias: bool


def _sequence_terms(
    logp: Tensor, ref: Tensor, mask: Tensor | None, sequences: Sequences, outcomes: Tensor, group_ids: Tensor | None,
    beta: float, total: int, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(reward [T], logits [S], loss [S], dlogp [T]) of whole sequences; dlogp is that of Σ loss/total.

    With group_ids the loss is "dpo", without it "ce".
    """
    if use_triton:
        from .kernels import losses

        of_ce = outcomes if group_ids is None else None
        reward, logits, loss, dlogp = losses.prm(logp, ref, mask, sequences.bounds, of_ce, beta, total)
    else:
        reward = token_reward(logp, ref, mask, beta)
        logits = sequences.sums(reward)
        logits = logits + logits * 0  # NaN of an infinite reward: a sigmoid must not turn that into a number
    if not use_triton or group_ids is not None:
        # Those on a device were not read.
        outcomes = torch.where((outcomes >= 0) & (outcomes <= 1), outcomes, torch.nan)
        if group_ids is None:
            loss = softplus(-logits.abs()) + logits.clamp(min=0) - logits * outcomes
            dlogit = logits.sigmoid() - outcomes
        else:
            loss, dlogit = _dpo(logits, outcomes, group_ids)
        dlogp = (dlogit * (beta / total))[sequences.of_tokens(logp.shape[0])]
        dlogp = dlogp if mask is None else torch.where(mask == 0, 0, dlogp * mask)
    if sequences.poison is not None:
        reward, logits, loss, dlogp = (t + sequences.poison for t in (reward, logits, loss, dlogp))
    return reward, logits, loss, dlogp


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
    margin = sign * (logits - other) + outcomes * 0
    return softplus(-margin), -sign * (-margin).sigmoid()


def _check_outcomes(outcomes: Tensor) -> None:
    if may_read(outcomes) and not ((outcomes >= 0) & (outcomes <= 1)).all():
        at = int((~((outcomes >= 0) & (outcomes <= 1))).nonzero()[0])
        raise ValueError(f"outcomes must be in [0, 1], got {float(outcomes[at]):g} of sequence {at}")


def _given(call: GivenPRMCall) -> Results:
    """(loss, reward [T], logits [S], dlogp [T]) of packed tokens."""
    _check_outcomes(call.outcomes)
    with working_on(call.prm_logp):
        sequences = Sequences.of(call.cu_seqlens, call.prm_logp, read=not call.use_triton)
        reward, logits, loss, dlogp = _sequence_terms(
            call.prm_logp, call.ref_logp, call.mask, sequences, call.outcomes, call.group_ids, call.beta,
            sequences.count, call.use_triton,
        )  # fmt: skip
        return loss.mean(), reward, logits, dlogp


def _given_fake(call: GivenPRMCall) -> Results:
    logp = call.prm_logp
    return logp.new_empty(()), torch.empty_like(logp), torch.empty_like(call.outcomes), torch.empty_like(logp)


def _given_gradients(saved: Saved[GivenPRMCall], upstream: Tensor) -> dict[str, Tensor]:
    return {"prm_logp": upstream * saved.tensors[0]}


_prm_loss = register(
    "prm_loss", GivenPRMCall, 4, _given, _given_fake,
    Derivative(results=1, gradients=_given_gradients, keep=lambda _, results: results[3:]),
)  # fmt: skip


def _linear(call: LinearPRMCall) -> Results:
    """(loss, reward [T], logits [S], and the fields of `Gradients`)."""

    def finish(tiles: Tiles, rows: Rows, head: Head, epilogue: Epilogue, sequences: Sequences) -> Results:
        found = loss_and_gradients(
            tiles, rows, head, epilogue, Wanted.of(call), workspace=one_pass_workspace(), sequences=sequences.host,
            together=call.group_ids is not None or sequences.host is None,
        )  # fmt: skip
        return tuple(found.shaped(call.hidden))

    return _with_loss(call, finish)


def _linear_kept(call: LinearPRMCall) -> Results:
    """(loss, reward [T], logits [S], E [T, V], v [T])."""
    return _with_loss(call, lambda *opened: loss_and_exponentials(*opened[:4]))


def _with_loss(
    call: LinearPRMCall, finish: Callable[[Tiles, Rows, Head, Epilogue, Sequences], Results]
) -> Results:  # fmt: skip
    """(loss, reward [T], logits [S]), and what `finish` makes of the loss's epilogue."""
    _check_outcomes(call.outcomes)
    ref_logp, outcomes, group_ids = call.ref_logp, call.outcomes, call.group_ids
    reward, logits, loss = torch.zeros_like(ref_logp), torch.zeros_like(outcomes), torch.zeros_like(outcomes)
    use_triton = strategy_for(call.hidden, call.backend) != "torch"
    with open_head(call, entropy=False, one_pass=True) as (tiles, rows, head):
        # Chunks are cut on the host. Where it may not read the boundaries, a captured graph, all tokens are one.
        sequences = Sequences.of(call.cu_seqlens, ref_logp, read=True)
        first_of = {start: s for s, start in enumerate(sequences.host or ())}
        kept = (rows.codes != IGNORED).to(ref_logp.dtype)
        kept = kept if call.mask is None else torch.where(rows.codes == IGNORED, 0, call.mask)

        def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, None]:
            here, inside = slice(None), sequences
            if sequences.host is not None:
                here = slice(first_of[at.start], first_of[at.stop])
                inside = sequences[here]
            groups = None if group_ids is None else group_ids[here]
            reward[at], logits[here], loss[here], dlogp = _sequence_terms(
                stats.logp, ref_logp[at], kept[at], inside, outcomes[here], groups, call.beta, sequences.count,
                use_triton,
            )  # fmt: skip
            return dlogp, None

        found = finish(tiles, rows, head, epilogue, sequences)
        return loss.mean(), reward, logits, *found


def _linear_fake(call: LinearPRMCall) -> Results:
    found = Gradients.empty(call.hidden, call.weight, Wanted.of(call))
    ref = call.ref_logp
    return ref.new_empty(()), torch.empty_like(ref), torch.empty_like(call.outcomes), *found


def _linear_kept_fake(call: LinearPRMCall) -> Results:
    return *_linear_fake(call)[:3], *exponentials_like(call)


_linear_prm_loss = register("linear_prm_loss", LinearPRMCall, 7, _linear, _linear_fake, of_stored_gradients(3))
_linear_prm_loss_kept = register(
    "linear_prm_loss_kept", LinearPRMCall, 5, _linear_kept, _linear_kept_fake, of_exponentials(3)
)  # fmt: skip


def _checked_sequences(
    cu_seqlens: Tensor, outcomes: Tensor, beta: float, kind: str, group_ids: Tensor | None, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """What both operators take of sequences, but for their boundaries."""
    check_number("beta", beta, above=0.0)
    check_choice("kind", kind, KINDS)
    S = cu_seqlens.shape[0] - 1
    check_plain_tensor("outcomes", outcomes, None)
    if outcomes.shape != (S,):
        raise ValueError(
            f"outcomes must have shape [{S}], one for each sequence of cu_seqlens, got {list(outcomes.shape)}"
        )
    if outcomes.is_complex():
        raise TypeError(f"outcomes must hold real numbers, got {outcomes.dtype}")
    check_host_or("outcomes", outcomes, device)
    check_gets_no_gradient(outcomes=outcomes)
    outcomes = moved("outcomes", outcomes.detach().to(dtype).contiguous(), device)
    found = {"beta": real_number(beta), "outcomes": outcomes, "group_ids": None}
    if kind == "ce":
        return found
    if group_ids is None:
        raise ValueError(f"group_ids must have shape [{S}] where kind is 'dpo', got None")
    check_plain_tensor("group_ids", group_ids, None)
    if group_ids.shape != (S,):
        raise ValueError(f"group_ids must have shape [{S}] where kind is 'dpo', got {list(group_ids.shape)}")
    check_host_or("group_ids", group_ids, device)
    return found | {"group_ids": moved("group_ids", group_ids, device)}


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
            is looked at. ref_logp is detached; a mask or outcomes that require a gradient are refused.
        cu_seqlens: [S + 1] int32 or int64 boundaries, on the host or on the device. Kernels use those on the device as
            they are, unread: boundaries that do not cut the tokens then make every result NaN.
        outcomes: [S] in [0, 1].
        group_ids: [S] the prompt of each sequence, for "dpo".
        backend: "auto", "triton" or "torch".

    Returns:
        PRMLoss(loss, reward of prm_logp's shape, logits [S]).

    Raises:
        TypeError, ValueError: an argument is off, beta is not positive, a sequence is empty.
    """
    check_logp("prm_logp", prm_logp)
    use_triton = strategy_for(prm_logp, backend) != "torch"
    cu_seqlens = cu_seqlens_of(prm_logp, cu_seqlens, use_triton)
    check_rows("prm_logp's", prm_logp, optional=("mask",), ref_logp=ref_logp, mask=mask)
    check_gets_no_gradient(mask=mask)
    check_reverse_mode("prm_loss", prm_logp=prm_logp, ref_logp=ref_logp, mask=mask)
    dtype = gemm.stats_dtype(prm_logp.dtype)
    loss, reward, logits, _ = _prm_loss(
        prm_logp=flat(prm_logp, dtype), ref_logp=flat(ref_logp.detach(), dtype), mask=flat(mask, dtype),
        cu_seqlens=cu_seqlens, use_triton=use_triton,
        **_checked_sequences(cu_seqlens, outcomes, beta, kind, group_ids, dtype, prm_logp.device),
    )  # fmt: skip
    return PRMLoss(loss, reward.view(prm_logp.shape), logits)


def linear_prm_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, outcomes: Tensor, *,
    beta: float = 0.05, mask: Tensor | None = None, kind: str = "ce", group_ids: Tensor | None = None,
    bias: Tensor | None = None, temperature: float | Tensor = 1.0, softcap: float | None = None,
    ignore_index: int = -100, backend: str = "auto",
) -> PRMLoss:  # fmt: skip
    """`prm_loss` of a linear head with all its gradients, and the token rewards from the same pass.

    "ce" takes one pass over the vocabulary (6NDV FLOP) on chunks aligned to sequences; tokens of a sequence longer than
    a chunk, and "dpo", whose groups span chunks, take two (8NDV). This is PRIME's single-forward update.

    Args:
        hidden: [T, D] packed tokens; weight, targets [T], bias, temperature, softcap, ignore_index, backend: as in
            `linear_logprob`. Ignored tokens have no reward.
        ref_logp, mask: [T]. outcomes, beta, kind, group_ids: as in `prm_loss`.
        cu_seqlens: [S + 1] int32 or int64 boundaries on the host. On the device the host reads them once; where it may
            not, as a CUDA graph is captured, all tokens take two passes, unless they fit one chunk.

    Returns:
        PRMLoss(loss, reward [T], logits [S]); reward and logits are detached.

    Cost and backward as `linear_token_loss`. Raises as `linear_logprob` and `prm_loss`.
    """
    head = head_arguments(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    check_reverse_mode("linear_prm_loss", hidden=hidden, weight=weight, bias=bias, temperature=temperature, mask=mask)
    if targets.dim() != 1:
        raise ValueError(f"targets must have shape [T], packed, got {list(targets.shape)}")
    checked_cu_seqlens(cu_seqlens, targets)
    check_rows("the targets'", targets, optional=("mask",), ref_logp=ref_logp, mask=mask)
    check_gets_no_gradient(mask=mask)
    dtype = gemm.stats_dtype(head["hidden"].dtype)
    wanted = trained(head)
    keeps = keeps_exponentials(
        head["hidden"], head["weight"], head["softcap"], backend, trains_weight=wanted["need_dw"],
        entropy_gradient=False,
    )  # fmt: skip
    op = _linear_prm_loss_kept if keeps else _linear_prm_loss
    loss, reward, logits, *_ = op(
        **head, ref_logp=flat(ref_logp.detach(), dtype), mask=flat(mask, dtype), cu_seqlens=cu_seqlens,
        **_checked_sequences(cu_seqlens, outcomes, beta, kind, group_ids, dtype, hidden.device), **wanted,
    )  # fmt: skip
    return PRMLoss(loss, reward, logits)
