"""Loss and gradients in one pass over the vocabulary: 6NDV FLOP, the floor of a dense head.

For each chunk of tokens, over the whole vocabulary:

    x = X Wᵀ                    2NDV   logits in fp32, within the workspace
    statistics of x             each logit read once: log-prob and entropy of every token
    epilogue                    [n] numbers: the loss's derivatives dlogp, dentropy
    x ← dZ                      in place, in the dtype of the products
    dX = dZ W                   2NDV   one product over V, rounded once
    dW += dZᵀ X                 2NDV   fp32

where an epilogue is any loss that is a sum over tokens (or over sequences, on chunks aligned to them). Where keeping
the logits does not pay, or a strategy has none in memory, statistics of all tokens come first and the logits are
computed again for the gradients (8NDV); see `plan.plan_one_pass`.

The gradients are complete when the forward ends, each rounded once to its dtype. Backward multiplies them in place by
the loss's upstream gradient, so it can run once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from . import gemm
from .kernels import losses as loss_kernels
from .plan import CPU_FLOP_PER_BYTE, GPU_FLOP_PER_BYTE, HALF_DTYPES, OnePass, blocks, plan_one_pass, plan_tiling
from .sweep import sweep_backward, sweep_forward
from .tiles import Head, LogitTiles, RowGrads, Rows, RowStats, Tiles, empty_state

# Given which tokens and their results, returns ∂loss/∂logp [n] and ∂loss/∂entropy [n] or None. Called with slices
# that cover every token once.
Epilogue = Callable[[slice, RowStats], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients of a loss; an empty tensor for each that is not wanted."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]


def loss_and_gradients(
    tiles: Tiles, rows: Rows, head: Head, epilogue: Epilogue, wanted: Wanted, *, workspace: int,
    sequences: list[int] | None = None, together: bool = False, dh_dtype: torch.dtype | None = None,
) -> Gradients:  # fmt: skip
    """Call the epilogue for every token and return the gradients that follow from it.

    `sequences`, boundaries [S + 1] of sequences, keeps each of them within one call of the epilogue; `together` makes
    that call one for all tokens.
    """
    N, D = rows.hidden.shape
    V = len(head.weight)
    copies = gemm.needs_copies(rows.hidden, head.weight)
    half = rows.hidden.dtype in HALF_DTYPES
    plan = OnePass(rows=0, cols=V, passes=2)
    if wanted and isinstance(tiles, LogitTiles):
        plan = plan_one_pass(
            max(N, 1), D, V, workspace=workspace, bytes_per_logit=tiles.bytes_per_logit, copies=copies,
            need_dw=wanted.weight, flop_per_byte=GPU_FLOP_PER_BYTE if rows.hidden.is_cuda else CPU_FLOP_PER_BYTE,
        )  # fmt: skip
    if plan.passes == 1 and isinstance(tiles, LogitTiles):
        chunks = blocks(N, plan.rows) if sequences is None else aligned_chunks(sequences, plan.rows)
        if chunks is not None and (len(chunks) <= 1 or not together):
            return one_pass(tiles, rows, head, epilogue, wanted, chunks, plan.cols, dh_dtype)

    tiling = plan_tiling(
        max(N, 1), D, V, workspace=workspace, bytes_per_logit=tiles.bytes_per_logit, half=half, copies=copies
    )  # fmt: skip
    stats = sweep_forward(tiles, rows, head, tiling)
    dlogp, dentropy = epilogue(slice(0, N), stats)
    if not wanted:
        nothing = rows.hidden.new_empty(0)
        return Gradients(hidden=nothing, weight=nothing.clone(), bias=nothing.clone())
    found = sweep_backward(
        tiles, rows, head, RowGrads.of(stats, dlogp, dentropy), tiling,
        need_dh=wanted.hidden, need_dw=wanted.weight, need_dbias=wanted.bias,
    )  # fmt: skip
    dh, dw, dbias = (rows.hidden.new_empty(0) if g is None else g for g in found)
    return Gradients(hidden=dh.to(dh_dtype or dh.dtype), weight=dw, bias=dbias)


def aligned_chunks(boundaries: list[int], limit: int) -> list[tuple[int, int]] | None:
    """Runs of whole sequences of at most `limit` tokens each; None where a sequence is longer."""
    chunks: list[tuple[int, int]] = []
    start = 0
    for begin, end in pairwise(boundaries):
        if end - begin > limit:
            return None
        if end - start > limit:
            chunks.append((start, begin))
            start = begin
    chunks.append((start, boundaries[-1]))
    return chunks


def one_pass(
    tiles: LogitTiles, rows: Rows, head: Head, epilogue: Epilogue, wanted: Wanted, chunks: list[tuple[int, int]],
    col_step: int, dh_dtype: torch.dtype | None = None,
) -> Gradients:  # fmt: skip
    """The pass of this module's docstring over the given chunks; dh in `dh_dtype`, by default hidden's."""
    hidden, weight = rows.hidden, head.weight
    V, dtype = len(weight), gemm.stats_dtype(hidden.dtype)
    dh = hidden.new_empty(hidden.shape if wanted.hidden else (0,), dtype=dh_dtype or hidden.dtype)
    dw = weight.new_empty(weight.shape if wanted.weight else (0,), dtype=dtype)
    dbias = weight.new_zeros(V if wanted.bias else 0, dtype=dtype)
    chunks = [(start, stop) for start, stop in chunks if start < stop]
    if not chunks:
        dw.zero_()
    for start, stop in chunks:
        block = rows[start:stop]
        x = tiles.products(block, head, col_step)
        stats = tiles.finish(tiles.fold(x, block, head, empty_state(stop - start, hidden)), block.codes)
        dz = tiles.gradient(x, block, head, RowGrads.of(stats, *epilogue(slice(start, stop), stats)))
        del x
        if wanted.bias:
            dbias += dz.sum(0, dtype=dtype)
        if wanted.weight:
            for c0, c1 in blocks(V, col_step):
                if start == 0:  # the first chunk writes what the others add to
                    gemm.mm(dz[:, c0:c1].t(), block.hidden, out=dw[c0:c1])
                else:
                    gemm.addmm(dw[c0:c1], dz[:, c0:c1].t(), block.hidden)
        if wanted.hidden:
            _write_dh(dh[start:stop], dz, head, col_step)
        del dz, block
    return Gradients(hidden=dh, weight=dw.to(weight.dtype), bias=dbias.to(weight.dtype))


def _write_dh(out: Tensor, dz: Tensor, head: Head, col_step: int) -> None:
    """out = dz·weight, rounded once."""
    V = len(head.weight)
    if col_step >= V:
        gemm.mm(dz, head[0:V].weight, out=out)
        return
    acc = torch.zeros_like(out, dtype=gemm.stats_dtype(out.dtype))
    for c0, c1 in blocks(V, col_step):
        gemm.addmm(acc, dz[:, c0:c1], head[c0:c1].weight)
    out.copy_(acc)


def stored_gradients(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """In backward: the gradients that the forward saved, times the loss's upstream gradient, given away once.

    In place: times 1 costs nothing, and the host never waits. A graph that is being traced gets a plain product.
    """
    if ctx.spent:
        raise RuntimeError("a one-pass loss gives its stored gradients away in backward, which can run once")
    ctx.spent = True
    gradients = list(ctx.saved_tensors)
    if detect_fake_mode(gradients) is not None:
        return [t * upstream.to(t.dtype) for t in gradients]
    for t in gradients:
        if t.is_cuda:
            with torch.cuda.device(t.device):
                loss_kernels.scale(t, upstream)
        elif upstream != 1:
            t.mul_(upstream)
    return gradients


def register_stored_gradients(op: torch.library.CustomOpDef, *, results: int) -> None:
    """Give `op`, whose outputs are a loss, `results − 1` others, and the gradients of its head, a derivative.

    Its arguments begin as `calls.HeadArgs`; gradients are those of hidden, weight and bias.
    """

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[results:])
        ctx.spent, ctx.arguments = False, len(inputs)

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * ctx.arguments
        for position, gradient in zip((0, 1, 3), stored_gradients(ctx, upstream), strict=True):
            found[position] = gradient if ctx.needs_input_grad[position] else None
        return tuple(found)

    op.register_autograd(backward, setup_context=setup_context)
