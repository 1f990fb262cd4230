"""Hidden states × vocabulary → log-prob and entropy of one token each, without the [N, V] logits.

Forward saves log-prob, entropy and the log-sum-exp of each token. Backward recomputes the logits (8NDV FLOP in all).
The work is in `sweep.py`; here it becomes a torch operator with a derivative, and a public function.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import gemm, vocab_parallel
from .checks import check_head_inputs, check_head_values
from .kernels.common import INTERPRETED
from .plan import HALF_DTYPES, Strategy, Tiling, choose_strategy, plan_tiling
from .sweep import sweep_backward, sweep_forward
from .tiles import Head, RowGrads, Rows, RowStats, Tiles, device_arch, make_tiles
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
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, max, logsum, codes), each [N]: results, the log-sum-exp in two parts, targets as columns."""
    codes, total_vocab = vocab_parallel.target_codes(targets, len(weight), ignore_index, group)
    check_head_values(targets, codes, temperature, total_vocab)
    rows = Rows(hidden=hidden, codes=codes, temperature=temperature)
    head = Head(weight=weight, bias=bias, softcap=softcap)
    with _on_device_of(hidden), gemm.full_precision_sums():
        tiles, tiling = _plan(hidden, weight, backend)
        gather = partial(vocab_parallel.gather_partials, group_name=group) if group else None
        stats = sweep_forward(tiles, rows, head, tiling, gather)
    return stats.logp, stats.entropy, stats.max, stats.logsum, codes


@_linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, ignore_index: int, group: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    row = partial(hidden.new_empty, len(hidden), dtype=gemm.stats_dtype(hidden.dtype))
    return row(), row(), row(), row(), torch.empty_like(targets)


@torch.library.custom_op("prime_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    dlogp: Tensor, dentropy: Tensor | None, logp: Tensor, entropy: Tensor, row_max: Tensor, logsum: Tensor,
    codes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, group: str, backend: str, need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden, dweight, dbias), an empty tensor for each that is not needed."""
    rows = Rows(hidden=hidden, codes=codes, temperature=temperature)
    head = Head(weight=weight, bias=bias, softcap=softcap)
    grads = RowGrads(
        stats=RowStats(logp=logp, entropy=entropy, max=row_max, logsum=logsum),
        dlogp=dlogp.contiguous(),
        dentropy=None if dentropy is None else dentropy.contiguous(),
        others=torch.expm1(logp).neg_(),
    )
    with _on_device_of(hidden), gemm.full_precision_sums():
        tiles, tiling = _plan(hidden, weight, backend)
        gradients = sweep_backward(
            tiles, rows, head, grads, tiling, need_dh=need_dh, need_dw=need_dw, need_dbias=need_dbias,
            reduce_dh=partial(vocab_parallel.sum_over_ranks, group_name=group) if group else None,
        )  # fmt: skip
    dh, dw, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return dh, dw, dbias


@_linear_logprob_backward.register_fake
def _(
    dlogp: Tensor, dentropy: Tensor | None, logp: Tensor, entropy: Tensor, row_max: Tensor, logsum: Tensor,
    codes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None,
    softcap: float | None, group: str, backend: str, need_dh: bool, need_dw: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = hidden.new_empty(len(weight) if need_dbias else 0)
    return (
        hidden.new_empty(hidden.shape if need_dh else (0,)),
        hidden.new_empty(weight.shape if need_dw else (0,)),
        dbias,
    )


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    hidden, weight, _, bias, temperature, softcap, _, group, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, temperature, *output)
    ctx.options = softcap, group, backend  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dlogp: Tensor | None, dentropy: Tensor | None, *_: None
) -> tuple:
    hidden, weight, bias, temperature, *results = ctx.saved_tensors  # type: ignore[attr-defined]
    need_dh, need_dw, _, need_dbias, *_rest = ctx.needs_input_grad  # type: ignore[attr-defined]
    if (dlogp is None and dentropy is None) or not (need_dh or need_dw or need_dbias):
        return (None,) * 9
    dh, dw, dbias = _linear_logprob_backward(
        torch.zeros_like(results[0]) if dlogp is None else dlogp, dentropy, *results,
        hidden, weight, bias, temperature, *ctx.options, need_dh, need_dw, need_dbias,  # type: ignore[attr-defined]
    )  # fmt: skip
    return dh if need_dh else None, dw if need_dw else None, None, dbias if need_dbias else None, *(None,) * 5


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def _strategy(hidden: Tensor, backend: str) -> Strategy:
    strategy = choose_strategy(backend, arch=device_arch(hidden.device), dtype=hidden.dtype)
    if strategy != "torch" and not hidden.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend={backend!r} needs an NVIDIA GPU, hidden is on {hidden.device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before prime_kernels is imported to run the kernels slowly on a CPU"
        )
    return strategy


def _plan(hidden: Tensor, weight: Tensor, backend: str) -> tuple[Tiles, Tiling]:
    tiles = make_tiles(_strategy(hidden, backend), hidden)
    tiling = plan_tiling(
        max(len(hidden), 1), hidden.shape[1], len(weight),
        workspace=logprob_workspace(), bytes_per_logit=tiles.bytes_per_logit, half=hidden.dtype in HALF_DTYPES,
        copies=any(gemm.needs_upcast(t) or 1 not in t.stride() for t in (hidden, weight)),
    )  # fmt: skip
    return tiles, tiling


def _on_device_of(t: Tensor) -> torch.cuda.device | nullcontext:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


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

    Cost: forward 2NDV FLOP, backward 6NDV (4NDV with hidden or weight frozen); saves 24 bytes a token; scratch memory
    within `set_workspace`, whatever N and V.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is off; the message names it. Target
            ids and per-token temperatures are looked at on a CPU, and on CUDA under PRIME_KERNELS_CHECK=1; else a
            target outside the vocabulary or a temperature ≤ 0 makes that token's results NaN.
    """
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    check_head_inputs(hidden, weight, targets, bias, temperature, softcap)
    _strategy(hidden, backend)  # an unsuitable backend is refused here, where the traceback starts at the caller

    flat = targets.reshape(-1)
    logp, row_entropy, *_ = _linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, flat, bias,
        _row_temperature(temperature, flat, gemm.stats_dtype(hidden.dtype)), softcap, ignore_index,
        vocab_parallel.group_name(vocab_group), backend,
    )  # fmt: skip
    shape = targets.shape
    return TokenLogProbs(logp.view(shape), row_entropy.view(shape) if entropy else None)


def _autocast(t: Any) -> Any:
    """t as autocast would hand it to a linear layer: in its dtype, where autocast is on; fp64 stays."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    device_type = t.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return t
    return t.to(torch.get_autocast_dtype(device_type))


def _row_temperature(temperature: float | Tensor, flat_targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One temperature a token, or None where all are 1."""
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).reshape(-1).expand(len(flat_targets)).contiguous()
    if temperature == 1.0:
        return None
    return torch.full(flat_targets.shape, temperature, dtype=dtype, device=flat_targets.device)
