"""Hidden states × vocabulary → log-prob and entropy of one token each, without the [N, V] logits.

Forward saves log-prob, entropy and the log-sum-exp of each token. Backward recomputes the logits (8NDV FLOP in all).
The work is in `sweep.py`; here it becomes a torch operator with a derivative, and a public function.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from . import gemm, vocab_parallel
from .calls import HeadCall, head_arguments, open_head, open_rows, trained
from .checks import check_flag, check_reverse_mode
from .onepass import Gradients, Wanted, loss_and_gradients, scale_rows
from .operators import Derivative, Results, Saved, own, register
from .plan import HALF_DTYPES, Tiling, keeps_logp_gradient, plan_tiling
from .sweep import sweep_backward, sweep_forward
from .tiles import RowGrads, RowStats, Tiles
from .types import TokenLogProbs
from .workspace import logprob_workspace


@dataclass(frozen=True, slots=True)
class LogProbCall(HeadCall):
    """Arguments of `prime_kernels::linear_logprob`."""

    group: str  # the name of the process group over which the vocabulary is sharded, or ""
    entropy: bool = True


@dataclass(frozen=True, slots=True)
class LogProbBackwardCall:
    """Arguments of `prime_kernels::linear_logprob_backward`."""

    dlogp: Tensor  # [...]
    dentropy: Tensor | None
    logp: Tensor
    entropy: Tensor
    row_max: Tensor
    logsum: Tensor
    codes: Tensor
    hidden: Tensor  # [..., D]
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor | None
    softcap: float | None
    backend: str
    group: str
    need_dh: bool
    need_dw: bool
    need_dbias: bool


def _forward(call: LogProbCall) -> Results:
    """(logp, entropy, max, logsum, codes), each [...]: results, the log-sum-exp in two parts, targets as columns."""
    group, shape = call.group, call.targets.shape
    with open_head(call, group, entropy=call.entropy) as (tiles, rows, head):
        gather = partial(vocab_parallel.gather_partials, group_name=group) if group else None
        stats = sweep_forward(tiles, rows, head, _tiling(tiles, rows.hidden, call.weight), gather)
    entropy = torch.zeros_like(stats.logp) if stats.entropy is None else stats.entropy
    return tuple(own(t, shape) for t in (stats.logp, entropy, stats.max, stats.logsum, rows.codes))


def _forward_fake(call: LogProbCall) -> Results:
    row = partial(call.hidden.new_empty, call.targets.shape, dtype=gemm.stats_dtype(call.hidden.dtype))
    return row(), row(), row(), row(), row(dtype=torch.int64)


def _backward(call: LogProbBackwardCall) -> Results:
    """(dhidden, dweight, dbias), an empty tensor for each that is not needed."""
    group = call.group
    with open_rows(call.hidden, call.codes, call, entropy=call.dentropy is not None) as (tiles, rows, head):
        flat = (t.reshape(-1) for t in (call.logp, call.entropy, call.row_max, call.logsum, call.dlogp))
        logp, entropy, row_max, logsum, dlogp = flat
        dentropy = None if call.dentropy is None else call.dentropy.reshape(-1)
        stats = RowStats(logp=logp, entropy=entropy, max=row_max, logsum=logsum)
        dh, dw, dbias = sweep_backward(
            tiles, rows, head, RowGrads.of(rows.codes, stats, dlogp, dentropy),
            _tiling(tiles, rows.hidden, call.weight), need_dh=call.need_dh, need_dw=call.need_dw,
            need_dbias=call.need_dbias, dtype=call.hidden.dtype,
            reduce_dh=partial(vocab_parallel.sum_over_ranks, group_name=group) if group else None,
        )  # fmt: skip
    nothing = partial(call.hidden.new_empty, 0)
    return (
        nothing() if dh is None else dh.view(call.hidden.shape),
        nothing() if dw is None else dw,
        nothing() if dbias is None else dbias,
    )  # fmt: skip


def _backward_fake(call: LogProbBackwardCall) -> Results:
    new, V = call.hidden.new_empty, call.weight.shape[0]
    return (
        new(call.hidden.shape if call.need_dh else (0,)), new(call.weight.shape if call.need_dw else (0,)),
        new(V if call.need_dbias else 0),
    )  # fmt: skip


def _gradients(saved: Saved[LogProbCall], dlogp: Tensor | None, dentropy: Tensor | None) -> dict[str, Tensor]:
    hidden, weight, bias, temperature, *results = saved.tensors
    call = saved.options
    names = ("hidden", "weight", "bias")
    found = _linear_logprob_backward(
        torch.zeros_like(results[0]) if dlogp is None else dlogp, dentropy, *results,
        hidden, weight, bias, temperature, call.softcap, call.backend, call.group, *(saved.needs[n] for n in names),
    )  # fmt: skip
    return dict(zip(names, found, strict=True))


_linear_logprob_backward = register("linear_logprob_backward", LogProbBackwardCall, 3, _backward, _backward_fake)
_linear_logprob = register(
    "linear_logprob", LogProbCall, 5, _forward, _forward_fake,
    Derivative(
        results=2, gradients=_gradients,
        keep=lambda call, results: (call.hidden, call.weight, call.bias, call.temperature, *results),
    ),
)  # fmt: skip


def _frozen(call: HeadCall) -> Results:
    """(logp [...], τ·∂logp/∂hidden [..., D] in the logits' dtype and in units, the unit) of a head without gradients.

    Rows have nothing to do with each other here, so a small temperature τ of one need not set the unit of all.
    """
    logp = call.hidden.new_empty(call.targets.shape, dtype=gemm.stats_dtype(call.hidden.dtype))
    flat = logp.view(-1)

    def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, None]:
        flat[at] = stats.logp
        return torch.ones_like(stats.logp) if rows.temperature is None else rows.temperature[at], None

    with open_head(call, entropy=False, one_pass=True) as (tiles, rows, head):
        kept = loss_and_gradients(tiles, rows, head, epilogue, ONLY_HIDDEN, workspace=logprob_workspace())
    return logp, kept.shaped(call.hidden).hidden, kept.unit


def _frozen_fake(call: HeadCall) -> Results:
    kept = Gradients.empty(call.hidden, call.weight, ONLY_HIDDEN)
    return call.hidden.new_empty(call.targets.shape, dtype=kept.unit.dtype), kept.hidden, kept.unit


def _frozen_gradients(saved: Saved[HeadCall], dlogp: Tensor) -> dict[str, Tensor]:
    kept, unit, targets, temperature = saved.tensors
    # Where an upstream gradient is 0 so is this one, even of a row that is NaN.
    nothing = (dlogp == 0) | (targets == saved.options.ignore_index)
    factor = dlogp * unit if temperature is None else dlogp * unit / temperature
    rows, factor = kept.reshape(-1, kept.shape[-1]), factor.masked_fill(nothing, 0).view(-1)
    gradient = scale_rows(rows, factor, dtype=saved.dtypes["hidden"])
    return {"hidden": gradient.view(kept.shape)}


ONLY_HIDDEN = Wanted(hidden=True, weight=False, bias=False)
_linear_logprob_frozen = register(
    "linear_logprob_frozen", HeadCall, 3, _frozen, _frozen_fake,
    Derivative(
        results=1, gradients=_frozen_gradients,
        keep=lambda call, results: (*results[1:], call.targets, call.temperature),
    ),
)  # fmt: skip


def _keeps_gradient(hidden: Tensor, *, entropy: bool) -> bool:
    """Whether a frozen head's forward does."""
    return keeps_logp_gradient(
        hidden.numel() // max(hidden.shape[-1], 1), hidden.shape[-1], frozen=True, entropy=entropy,
        workspace=logprob_workspace(), itemsize=gemm.stats_dtype(hidden.dtype).itemsize,
    )  # fmt: skip


def _tiling(tiles: Tiles, hidden: Tensor, weight: Tensor) -> Tiling:
    return plan_tiling(
        max(hidden.shape[0], 1), hidden.shape[1], weight.shape[0],
        workspace=logprob_workspace(), bytes_per_logit=tiles.bytes_per_logit, half=hidden.dtype in HALF_DTYPES,
        copies=gemm.needs_copies(hidden, weight), itemsize=gemm.stats_dtype(hidden.dtype).itemsize,
    )  # fmt: skip


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenLogProbs:
    """Log-prob of each target under softmax of a linear head, and optionally the entropy, without the logits.

        z      = softcap·tanh((hidden·weightᵀ + bias)/softcap) / temperature        [..., V], never in memory
        logp   = z_target − log Σ_v e^{z_v}
        entropy = −Σ_v p_v·log p_v,  p = softmax(z)                                  in nats

    Both are differentiable in hidden, weight and bias. Logits are fp32 (fp64 for fp64 inputs) up to the
    log-sum-exp; dX and dW are summed in fp32 and rounded once. The same call gives the same bits every time.

    Args:
        hidden: [..., D], bf16, fp16, fp32, or fp64 (backend "torch"). Leading dimensions that no view can flatten
            are copied once; so are operands that autocast casts.
        weight: [V, D] in hidden's dtype. A plain tensor: under FSDP2, inside its owner's forward.
        targets: [...] int64, in [0, V) or `ignore_index`.
        bias: [V] in weight's dtype; −inf bans a token.
        temperature: a number > 0, or one for each token [...]; no gradient.
        softcap: c > 0 bounds logits to ±c before the temperature; infinity is no cap.
        ignore_index: such targets have logp and entropy 0 and gradient exactly 0.
        entropy: also return the entropy.
        vocab_group: `weight` and `bias` hold this rank's rows of the vocabulary, in rank order, in any sizes;
            hidden, targets and the loss made of the results are the same on every rank. Results and the gradient of
            hidden are then as for the whole vocabulary. Every rank of the group must call.
        backend: "auto" (Triton on NVIDIA GPUs from sm_80 on, torch elsewhere), "triton", "torch", or one Triton
            strategy by name, "chunked" or "fused". See `prime_kernels.plan.choose_strategy`.

    Returns:
        TokenLogProbs(logp [...], entropy [...] | None) in fp32, or fp64 for fp64 inputs.

    Cost: forward 2NDV FLOP, backward 6NDV (4NDV with hidden frozen); saves 24 bytes a token; scratch memory within
    `set_workspace`, whatever N and V. With weight and bias frozen and no entropy asked for, forward takes 4NDV and
    backward almost nothing: ∂logp/∂hidden is kept, 4ND bytes, where that is within the workspace.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is off; the message names it. Target
            ids and per-token temperatures are looked at on a CPU, and on CUDA under PRIME_KERNELS_CHECK=1; else a
            target outside the vocabulary or a temperature ≤ 0 or infinite makes that token's results NaN.
        RuntimeError: a second derivative is asked for. NotImplementedError: a forward-mode one, or one of torch.func.
    """
    head = head_arguments(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    check_flag("entropy", entropy)
    check_reverse_mode("linear_logprob", hidden=hidden, weight=weight, bias=bias, temperature=temperature)
    group, needs = vocab_parallel.group_name(vocab_group), trained(head)
    frozen = list(needs.values()) == [True, False, False] and not group
    if frozen and _keeps_gradient(head["hidden"], entropy=entropy):
        return TokenLogProbs(_linear_logprob_frozen(**head)[0], None)
    logp, row_entropy, *_ = _linear_logprob(**head, group=group, entropy=bool(entropy))
    return TokenLogProbs(logp, row_entropy if entropy else None)
