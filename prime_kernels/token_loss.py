"""One pass for any loss that is a sum over tokens: the caller's function sees [n] numbers, never logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gemm
from .calls import HeadArgs, flatten, open_head
from .kernels.common import IGNORED
from .onepass import Wanted, loss_and_gradients, stored_gradients
from .tiles import RowStats
from .types import TokenLoss
from .workspace import one_pass_workspace

LossFn = Callable[..., Tensor]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    inputs: Sequence[Tensor] = (),
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str = "auto",
) -> TokenLoss:
    """Any token-separable loss of a linear head and all its gradients, in one pass over the vocabulary (6NDV FLOP).

        loss = Σ_i loss_fn(logp, entropy, *inputs)_i        over tokens whose target is not ignored

    with logp and entropy as in `linear_logprob`. The gradients with respect to hidden, weight and bias are computed
    in the forward, chunk by chunk; backward multiplies them in place by the upstream gradient (which costs nothing
    where it is 1, and can run once).

    Args:
        hidden, weight, targets, bias, temperature, softcap, ignore_index, backend: as in `linear_logprob`.
        loss_fn: (logp [n], entropy [n] | None, *inputs [n]) -> loss [n], in differentiable torch. It is called on
            chunks of the valid and ignored tokens alike, on any number of tokens, and must treat each on its own: no
            mean, no normaliser but one that comes with the inputs.
        inputs: tensors of the targets' shape, handed to loss_fn in chunks; they get no gradient.
        entropy: hand the entropy to loss_fn and return it; else it is None.

    Returns:
        TokenLoss(loss, logp [...], entropy [...] | None): a scalar to call backward on; the others are detached.

    Cost: 6NDV FLOP (4NDV with a frozen weight), scratch memory within `set_workspace` (1.25 GiB by default) beside a
    gradient of the weight in fp32. Where the workspace holds too few tokens' logits for that to pay, 8NDV.

    Raises:
        TypeError, ValueError: as `linear_logprob`; also where an input's shape is off, or loss_fn returns anything
            but one number a token.
    """
    args = flatten(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    flat_inputs = []
    for i, t in enumerate(inputs):
        if not isinstance(t, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor, got {type(t).__name__}")
        if t.shape != targets.shape or t.device != hidden.device:
            raise ValueError(
                f"inputs[{i}] must have the targets' shape {list(targets.shape)} on {hidden.device}, "
                f"got {list(t.shape)} on {t.device}"
            )
        flat_inputs.append(t.detach().reshape(-1))
    loss, logp, row_entropy = _TokenLoss.apply(args.hidden, args.weight, args.bias, args, loss_fn, flat_inputs, entropy)
    shape = targets.shape
    return TokenLoss(loss, logp.view(shape), row_entropy.view(shape) if entropy else None)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: HeadArgs, loss_fn: LossFn,
        inputs: list[Tensor], entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        N, dtype = len(hidden), gemm.stats_dtype(hidden.dtype)
        token_loss, logp, row_entropy = (hidden.new_zeros(N, dtype=dtype) for _ in range(3))
        wanted = Wanted(
            hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1], bias=ctx.needs_input_grad[2]
        )  # fmt: skip
        args = args._replace(
            hidden=hidden.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach()
        )
        with open_head(args) as (tiles, rows, head):

            def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
                valid = rows.codes[at] != IGNORED
                logp[at], row_entropy[at] = stats.logp, stats.entropy
                loss, dlogp, dentropy = _differentiate(
                    loss_fn, stats.logp, stats.entropy if entropy else None, [t[at] for t in inputs], bool(wanted)
                )
                token_loss[at] = torch.where(valid, loss, 0)
                return dlogp, dentropy

            found = loss_and_gradients(tiles, rows, head, epilogue, wanted, workspace=one_pass_workspace())
        ctx.mark_non_differentiable(logp, row_entropy)
        ctx.spent = False
        ctx.save_for_backward(found.hidden, found.weight, found.bias)
        return token_loss.sum(), logp, row_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = stored_gradients(ctx, upstream)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(t if need else None for t, need in needed), None, None, None, None)


def _differentiate(
    loss_fn: LossFn, logp: Tensor, entropy: Tensor | None, inputs: list[Tensor], wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """loss_fn's values [n] and its derivatives with respect to logp and entropy."""
    leaves = [logp.detach().requires_grad_(wanted)]
    if entropy is not None:
        leaves.append(entropy.detach().requires_grad_(wanted))
    with torch.set_grad_enabled(wanted):
        loss = loss_fn(leaves[0], leaves[1] if entropy is not None else None, *inputs)
    if not isinstance(loss, Tensor) or loss.shape != logp.shape:
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a loss for each of {len(logp)} tokens, got {found}")
    dlogp, dentropy = torch.zeros_like(logp), None
    if wanted and loss.requires_grad:
        found_grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss), allow_unused=True)
        dlogp = dlogp if found_grads[0] is None else found_grads[0]
        dentropy = found_grads[1] if entropy is not None else None
    return loss.detach(), dlogp, dentropy
