"""Hidden states × vocabulary → log-prob and entropy of one token each, without the [N, V] logits.

Forward saves log-prob, entropy and the log-sum-exp of each token. Backward recomputes the logits (8NDV FLOP in all).
The work is in `sweep.py`; here it becomes a torch operator with a derivative, and a public function.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import gemm, vocab_parallel
from .calls import HeadArgs, flatten, open_head, strategy_for, working_on
from .kernels.common import IGNORED
from .onepass import Wanted, loss_and_gradients
from .plan import HALF_DTYPES, Tiling, keeps_logp_gradient, plan_tiling
from .sweep import sweep_backward, sweep_forward
from .tiles import Head, RowGrads, Rows, RowStats, Tiles, make_tiles
from .types import TokenLogProbs
from .workspace import logprob_workspace


@torch.library.custom_op("prime_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    temperature: Tensor | None,  # [N] in the logits' dtype
    softcap: float | None,
    ignore_index: int,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, max, logsum, codes), each [N]: results, the log-sum-exp in two parts, targets as columns."""
    args = HeadArgs(hidden, weight, targets, bias, temperature, softcap, ignore_index, backend)
    with open_head(args, group) as (tiles, rows, head):
        gather = partial(vocab_parallel.gather_partials, group_name=group) if group else None
        stats = sweep_forward(tiles, rows, head, _tiling(tiles, hidden, weight), gather)
    return stats.logp, stats.entropy, stats.max, stats.logsum, rows.codes


@_linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    row = partial(hidden.new_empty, len(hidden), dtype=gemm.stats_dtype(hidden.dtype))
    return row(), row(), row(), row(), torch.empty_like(targets)


@torch.library.custom_op("prime_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    dlogp: Tensor, dentropy: Tensor | None, logp: Tensor, entropy: Tensor, row_max: Tensor, logsum: Tensor,
    codes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, backend: str, group: str, need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden, dweight, dbias), an empty tensor for each that is not needed."""
    rows = Rows(hidden=hidden, codes=codes, temperature=temperature)
    head = Head(weight=weight, bias=bias, softcap=softcap)
    grads = RowGrads.of(RowStats(logp=logp, entropy=entropy, max=row_max, logsum=logsum), dlogp, dentropy)
    with working_on(hidden):
        tiles = make_tiles(strategy_for(hidden, backend), hidden)
        gradients = sweep_backward(
            tiles, rows, head, grads, _tiling(tiles, hidden, weight),
            need_dh=need_dh, need_dw=need_dw, need_dbias=need_dbias,
            reduce_dh=partial(vocab_parallel.sum_over_ranks, group_name=group) if group else None,
        )  # fmt: skip
    dh, dw, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return dh, dw, dbias


@_linear_logprob_backward.register_fake
def _(
    dlogp: Tensor, dentropy: Tensor | None, logp: Tensor, entropy: Tensor, row_max: Tensor, logsum: Tensor,
    codes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, backend: str, group: str, need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = hidden.new_empty(len(weight) if need_dbias else 0)
    return (
        hidden.new_empty(hidden.shape if need_dh else (0,)),
        hidden.new_empty(weight.shape if need_dw else (0,)),
        dbias,
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, _, bias, temperature, softcap, _, backend, group = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, temperature, *output)
    ctx.options = softcap, backend, group


def _backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: None) -> tuple:
    hidden, weight, bias, temperature, *results = ctx.saved_tensors
    need_dh, need_dw, _, need_dbias, *_rest = ctx.needs_input_grad
    if (dlogp is None and dentropy is None) or not (need_dh or need_dw or need_dbias):
        return (None,) * 9
    dh, dw, dbias = _linear_logprob_backward(
        torch.zeros_like(results[0]) if dlogp is None else dlogp, dentropy, *results,
        hidden, weight, bias, temperature, *ctx.options, need_dh, need_dw, need_dbias,
    )  # fmt: skip
    return dh if need_dh else None, dw if need_dw else None, None, dbias if need_dbias else None, *(None,) * 5


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("prime_kernels::linear_logprob_frozen", mutates_args=())
def _linear_logprob_frozen(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp [N], ∂logp/∂hidden [N, D] in the logits' dtype, codes [N]) of a head without gradients."""
    args = HeadArgs(hidden, weight, targets, bias, temperature, softcap, ignore_index, backend)
    dtype = gemm.stats_dtype(hidden.dtype)
    logp = hidden.new_empty(len(hidden), dtype=dtype)

    def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, None]:
        logp[at] = stats.logp
        return torch.ones_like(stats.logp), None

    with open_head(args) as (tiles, rows, head):
        kept = loss_and_gradients(
            tiles, rows, head, epilogue, Wanted(hidden=True, weight=False, bias=False),
            workspace=logprob_workspace(), dh_dtype=dtype,
        )  # fmt: skip
    return logp, kept.hidden, rows.codes


@_linear_logprob_frozen.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = gemm.stats_dtype(hidden.dtype)
    kept = hidden.new_empty(hidden.shape, dtype=dtype)
    return hidden.new_empty(len(hidden), dtype=dtype), kept, torch.empty_like(targets)


def _setup_frozen(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype


def _backward_frozen(ctx: Any, dlogp: Tensor, *_: Any) -> tuple:
    kept, codes = ctx.saved_tensors
    dh = kept * dlogp.masked_fill(codes == IGNORED, 0)[:, None]
    return dh.to(ctx.dtype), *(None,) * 7


_linear_logprob_frozen.register_autograd(_backward_frozen, setup_context=_setup_frozen)


def _keeps_gradient(args: HeadArgs, entropy: bool, group: str) -> bool:
    trained = [t is not None and t.requires_grad for t in (args.hidden, args.weight, args.bias)]
    return keeps_logp_gradient(
        *args.hidden.shape, frozen=torch.is_grad_enabled() and trained == [True, False, False] and not group,
        entropy=entropy, keeps_logits=strategy_for(args.hidden, args.backend) != "fused", workspace=logprob_workspace(),
    )  # fmt: skip


def _tiling(tiles: Tiles, hidden: Tensor, weight: Tensor) -> Tiling:
    return plan_tiling(
        max(len(hidden), 1), hidden.shape[1], len(weight),
        workspace=logprob_workspace(), bytes_per_logit=tiles.bytes_per_logit, half=hidden.dtype in HALF_DTYPES,
        copies=gemm.needs_copies(hidden, weight),
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
        softcap: c > 0 bounds logits to ±c before the temperature.
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
            target outside the vocabulary or a temperature ≤ 0 makes that token's results NaN.
    """
    args = flatten(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    shape, group = targets.shape, vocab_parallel.group_name(vocab_group)
    if _keeps_gradient(args, entropy, group):
        return TokenLogProbs(_linear_logprob_frozen(*args)[0].view(shape), None)
    logp, row_entropy, *_ = _linear_logprob(*args, group)
    return TokenLogProbs(logp.view(shape), row_entropy.view(shape) if entropy else None)
