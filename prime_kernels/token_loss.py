"""One pass for any loss that is a sum over tokens: the caller's function sees [n] numbers, never logits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .calls import HeadCall, head_arguments, open_head
from .checks import check_flag, check_reverse_mode, check_row
from .constants import IGNORED
from .kept import gradients_of_exponentials, keeps_exponentials, loss_and_exponentials
from .onepass import Gradients, Wanted, give_away, loss_and_gradients, stored
from .operators import anchor, first_order, is_shape_only, own
from .tiles import RowStats
from .types import TokenLoss
from .workspace import one_pass_workspace

LossFn = Callable[..., Tensor]


@torch.compiler.disable(reason="loss_fn is called on the numbers of a chunk, which a graph being traced has not")
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
    in the forward, chunk by chunk, and kept in fp32; backward multiplies them by the upstream gradient and rounds
    once. It can run once.

    Args:
        hidden, weight, targets, bias, temperature, softcap, ignore_index, backend: as in `linear_logprob`.
        loss_fn: (logp [n], entropy [n] | None, *inputs [n]) -> loss [n], in differentiable torch. It is called on
            chunks of the valid and ignored tokens alike, on any number of tokens, and must treat each on its own: no
            mean, no normaliser but one that comes with the inputs.
        inputs: tensors of the targets' shape, handed to loss_fn in chunks; they get no gradient. A loss_fn that closes
            over a tensor that requires one is refused.
        entropy: hand the entropy to loss_fn and return it; else it is None.

    Returns:
        TokenLoss(loss, logp [...], entropy [...] | None): a scalar to call backward on; the others are detached.

    Cost: 6NDV FLOP (4NDV with a frozen weight), scratch memory within `set_workspace` (1.25 GiB by default), and until
    backward the gradients in fp32, 4(N + V)D bytes; in bf16 strategy "fused" keeps 2.1·NV bytes of exponentials instead
    where they take no more than that and the workspace, and leaves 4NDV FLOP to backward. Where the workspace holds too
    few tokens' logits for one pass to pay, 8NDV. In a compiled model it runs between graphs.

    Raises:
        RuntimeError: backward runs twice, or a second derivative is asked for.
        TypeError, ValueError: as `linear_logprob`; also where an input's shape is off, or loss_fn returns anything
            but one number a token.
    """
    head = head_arguments(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        backend=backend,
    )  # fmt: skip
    check_flag("entropy", entropy)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs must be a sequence of tensors, got {type(inputs).__name__}")
    check_reverse_mode("linear_token_loss", hidden=hidden, weight=weight, bias=bias, temperature=temperature)
    for i, t in enumerate(inputs):
        check_row(f"inputs[{i}]", t, "the targets'", targets)
    flat_inputs = [t.detach().reshape(-1) for t in inputs]
    # Torch resolves what an operator is given, but not a Function: a tensor may be the negative of its memory.
    resolved: dict[str, Any] = {name: t.resolve_neg() if isinstance(t, Tensor) else t for name, t in head.items()}
    call = HeadCall(**resolved)
    # Inside a Function none are on. Where they are outside, a closure over a parameter is refused, head frozen or not.
    grad = torch.is_grad_enabled()
    loss, logp, row_entropy = _TokenLoss.apply(
        call.hidden, call.weight, call.bias, call, loss_fn, flat_inputs, entropy, grad
    )  # fmt: skip
    return TokenLoss(loss, logp, row_entropy if entropy else None)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, loss_fn: LossFn,
        inputs: list[Tensor], entropy: bool, grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        need = [grad and n for n in ctx.needs_input_grad]
        wanted = Wanted(hidden=need[0], weight=need[1], bias=need[2])
        call = replace(
            call, hidden=hidden.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach()
        )  # fmt: skip
        ctx.keeps = keeps_exponentials(
            hidden, weight, call.softcap, call.backend, trains_weight=wanted.weight, entropy_gradient=entropy
        )  # fmt: skip
        if is_shape_only(hidden, weight):
            loss, logp, row_entropy, found = _shapes(call, entropy, wanted)
        else:
            loss, logp, row_entropy, found = _numbers(call, loss_fn, inputs, entropy, wanted, ctx.keeps, grad)
        ctx.mark_non_differentiable(logp, row_entropy)
        ctx.set_materialize_grads(False)
        ctx.state, ctx.dtype, ctx.anchor = {}, hidden.dtype, anchor((hidden, weight, bias))
        ctx.save_for_backward(*((hidden, weight) if ctx.keeps else ()), *found)
        return loss, logp, row_entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        with torch.no_grad():
            give_away(ctx.state)
            if ctx.keeps:
                hidden, weight, e, factor = ctx.saved_tensors
                need = dict(zip(("need_dh", "need_dw", "need_dbias"), ctx.needs_input_grad, strict=False))
                by_name = gradients_of_exponentials(e, factor, hidden, weight, upstream, **need)
                nothing = upstream.new_empty(0)
                gradients = [by_name.get(name, nothing) for name in ("hidden", "weight", "bias")]
            else:
                gradients = stored(ctx.saved_tensors, upstream, ctx.dtype)
        gradients = first_order("linear_token_loss", ctx.anchor, (upstream,), gradients)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(t if need else None for t, need in needed), None, None, None, None, None)


def _numbers(
    call: HeadCall, loss_fn: LossFn, inputs: list[Tensor], entropy: bool, wanted: Wanted, keeps: bool, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Iterable[Tensor]]:
    """Loss, log-probs [...] and entropies [...] (of no tokens where not asked for), and what backward wants.

    That is the fields of `Gradients`, or exponentials and their factor.
    """
    N, dtype = call.targets.numel(), gemm.stats_dtype(call.hidden.dtype)
    token_loss, logp = (call.hidden.new_zeros(N, dtype=dtype) for _ in range(2))
    row_entropy = logp.new_zeros(N if entropy else 0)
    with open_head(call, entropy=entropy, one_pass=True, entropy_gradient=entropy) as (tiles, rows, head):

        def epilogue(at: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
            logp[at] = stats.logp
            if stats.entropy is not None:
                row_entropy[at] = stats.entropy
            loss, dlogp, dentropy = _differentiate(
                loss_fn, stats.logp, stats.entropy, [t[at] for t in inputs], bool(wanted), grad
            )
            token_loss[at] = torch.where(rows.codes[at] != IGNORED, loss, 0)
            return dlogp, dentropy

        found: Iterable[Tensor]
        if keeps:
            found = loss_and_exponentials(tiles, rows, head, epilogue)
        else:
            gradients = loss_and_gradients(tiles, rows, head, epilogue, wanted, workspace=one_pass_workspace())
            found = gradients.shaped(call.hidden)
        loss = token_loss.sum()
    shape = call.targets.shape
    return loss, own(logp, shape), own(row_entropy, shape) if entropy else row_entropy, found


def _shapes(call: HeadCall, entropy: bool, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor, Iterable[Tensor]]:
    """What `_numbers` returns, of tensors without numbers."""
    found = Gradients.empty(call.hidden, call.weight, wanted)
    new = partial(call.hidden.new_empty, dtype=found.unit.dtype)
    shape = call.targets.shape
    return new(()), new(shape), new(shape if entropy else (0,)), found


def _differentiate(
    loss_fn: LossFn, logp: Tensor, entropy: Tensor | None, inputs: list[Tensor], wanted: bool, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """loss_fn's values [n] and its derivatives with respect to logp and entropy."""
    leaves = [logp.detach().requires_grad_(wanted)]
    if entropy is not None:
        leaves.append(entropy.detach().requires_grad_(wanted))
    with torch.set_grad_enabled(grad):
        loss = loss_fn(leaves[0], leaves[1] if entropy is not None else None, *inputs)
    if not isinstance(loss, Tensor) or loss.shape != logp.shape:
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a loss for each of {len(logp)} tokens, got {found}")
    check_row("the loss that loss_fn returns", loss, "logp's", logp)
    dlogp, dentropy = torch.zeros_like(logp), None
    if loss.requires_grad:
        _refuse_closures(loss, leaves)
    if wanted and loss.requires_grad:
        found_grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss), allow_unused=True)
        dlogp = dlogp if found_grads[0] is None else found_grads[0]
        dentropy = found_grads[1] if entropy is not None else None
    return loss.detach(), dlogp, dentropy


def _refuse_closures(loss: Tensor, leaves: list[Tensor]) -> None:
    """Refuse a loss_fn that closes over what requires a gradient: it would get none."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and not any(leaf is ours for ours in leaves):
            raise ValueError(
                f"loss_fn must not use tensors that require a gradient but logp and entropy, got one of shape "
                f"{list(leaf.shape)}: it would get none; detach it, or make the loss of linear_logprob's results"
            )
        left += [parent for parent, _ in node.next_functions]
