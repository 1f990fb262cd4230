"""Losses that keep a batch's exponentials until backward, which then has nothing left but its two products.

    forward     E = e^{z − k}                    2NDV   one GEMM with an epilogue, and the loss
    backward    dX = v·(E W)                     2NDV   times the upstream gradient, which is a factor of v
                dW = Eᵀ (v·X)                    2NDV   in the dtype of the weight: no sum in fp32, no pass to round it

That is one pass (`onepass`) of a single chunk whose end waits for the upstream gradient. Where E, 2NV bytes, takes no
more memory than the sums of gradients in fp32 and a chunk would, a call takes this way; `plan.exponentials_fit` says
when. A graph that is traced never does: its results' shapes must not depend on N.
"""

import torch
from torch import Tensor

from . import gemm
from .calls import HeadCall, strategy_for, working_on
from .onepass import Epilogue, give_away, scale_rows
from .operators import Derivative, Saved, is_shape_only
from .plan import exponentials_fit, one_pass_strategy
from .tiles import Head, LogitTiles, RowGrads, Rows, Tiles, empty_rows
from .workspace import one_pass_workspace


def keeps_exponentials(
    hidden: Tensor, weight: Tensor, softcap: float | None, backend: str, *, trains_weight: bool, entropy_gradient: bool
) -> bool:
    """Whether a call with these arguments takes this way."""
    if not trains_weight or torch.compiler.is_compiling() or is_shape_only(hidden, weight):
        return False
    if hidden.dim() != 2 and not hidden.is_contiguous():
        return False
    (V, D), N = weight.shape, hidden.shape[:-1].numel()
    strategy = one_pass_strategy(
        strategy_for(hidden.view(N, D), backend, weight),
        dtype=hidden.dtype, softcap=softcap, entropy_gradient=entropy_gradient,
    )  # fmt: skip
    itemsize = gemm.operand(hidden[:0]).dtype.itemsize
    return strategy == "fused" and exponentials_fit(
        N, D, V, itemsize=itemsize, workspace=one_pass_workspace()
    )  # fmt: skip


def loss_and_exponentials(tiles: Tiles, rows: Rows, head: Head, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    """E [N, V] and the factor v [N] of its rows, 0 where a row has no gradient."""
    assert isinstance(tiles, LogitTiles)
    every = rows[0 : len(rows.codes)]
    e = tiles.products(every, head, len(head.weight))
    stats = tiles.results(e, every, head)
    grads = RowGrads.of(every.codes, stats, *epilogue(slice(0, len(every.codes)), stats))
    e, factor = tiles.gradient(e, every, head, grads)
    assert factor is not None
    return e, factor


def exponentials_like(call: HeadCall) -> tuple[Tensor, Tensor]:
    """E and v of a call, as far as their shapes go."""
    N, V = call.targets.numel(), call.weight.shape[0]
    dtype = gemm.stats_dtype(call.hidden.dtype)
    return empty_rows(N, V, gemm.operand(call.hidden[:0])), call.hidden.new_empty(N, dtype=dtype)


def gradients_of_exponentials(
    e: Tensor, factor: Tensor, hidden: Tensor, weight: Tensor, upstream: Tensor, *, need_dh: bool, need_dw: bool,
    need_dbias: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of hidden [..., D], weight [V, D] and bias [V], those that are needed, in the dtype of hidden."""
    found = {}
    n, D = len(factor), hidden.shape[-1]
    with working_on(hidden):
        if need_dw:
            rows = scale_rows(gemm.operand(hidden.reshape(n, D)), factor, upstream=upstream)
            found["weight"] = gemm.mm(e.t(), rows, out=torch.empty_like(weight))
        if need_dbias:
            found["bias"] = gemm.column_sums(e, factor.dtype, factor * upstream).to(hidden.dtype)
        if need_dh:
            dh = gemm.mm(e, gemm.operand(weight), out=factor.new_empty(n, D))
            dh = scale_rows(dh, factor, dtype=hidden.dtype, upstream=upstream)
            found["hidden"] = dh.view(hidden.shape)
    return found


def of_exponentials(results: int) -> Derivative:
    """The derivative of an operator whose results are a loss, `results − 1` others, E and v."""

    def gradients(saved: Saved, upstream: Tensor) -> dict[str, Tensor]:
        give_away(saved.state)
        hidden, weight, e, factor = saved.tensors
        needs = saved.needs
        return gradients_of_exponentials(
            e, factor, hidden, weight, upstream,
            need_dh=needs["hidden"], need_dw=needs["weight"], need_dbias=needs["bias"],
        )  # fmt: skip

    return Derivative(
        results=1, gradients=gradients,
        keep=lambda call, output: (call.hidden, call.weight, *output[results:]),
    )  # fmt: skip
