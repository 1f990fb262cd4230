"""The engine: visit the [N, V] logits tile by tile, forward and backward, within a bounded workspace.

Forward, 2NDV FLOP. For each block of tokens: statistics over the whole vocabulary, then log-prob and entropy.

Backward, 6NDV FLOP with both gradients, 4NDV with one. dX sums over the vocabulary and dW over the tokens, so one of
the two needs its accumulator for the whole call. The slice-major sweep keeps dX [N, D] in fp32 and finishes one slice
of dW after the other:

    for each slice of the vocabulary            for each slice, one dW
        for each block of tokens
            dZ = gradient of the tile's logits      2 (recomputed)
            dW[slice] += dZᵀ X                      2, one GEMM over all N where the block is all tokens
            dX[block] += dZ W[slice]                2, fp32

Where dX for all tokens exceeds the workspace's share, it is kept for the first ones only. A row-major sweep over the
other tokens follows, which recomputes their logits once more. Without dW the row-major sweep is the only one, and
without dX the slice-major one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import gemm
from .plan import HALF_DTYPES, Tiling, blocks
from .tiles import Head, RowGrads, Rows, RowStats, Tiles

# Sums partial results over the ranks that share the vocabulary, in place.
Reduce = Callable[[Tensor], None]
# Combines each rank's partial statistics [K, 4, n] into partial statistics of the whole vocabulary.
Gather = Callable[[Tensor], Tensor]


def sweep_forward(tiles: Tiles, rows: Rows, head: Head, tiling: Tiling, gather: Gather | None = None) -> RowStats:
    """Log-prob, entropy and log-sum-exp of every row [N]."""
    N = len(rows.codes)
    like = rows.hidden.new_empty(0, dtype=gemm.stats_dtype(rows.hidden.dtype))
    stats = RowStats.empty(N, like, entropy=tiles.entropy)
    for start, stop in blocks(N, tiling.rows):
        block = rows[start:stop]
        partials = tiles.row_stats(block, head, tiling.cols)
        if gather is not None:
            partials = gather(partials)
        stats[start:stop] = tiles.finish(partials, block.codes)
        del block  # may be a copy, and the next one comes first
    return stats


def sweep_backward(
    tiles: Tiles, rows: Rows, head: Head, grads: RowGrads, tiling: Tiling, *,
    need_dh: bool, need_dw: bool, need_dbias: bool, dtype: torch.dtype, reduce_dh: Reduce | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V] in `dtype`, None where not needed."""
    (N, D), V = rows.hidden.shape, len(head.weight)
    new = rows.hidden.new_empty if N else rows.hidden.new_zeros  # without tokens no tile writes the gradients
    dh = new((N, D), dtype=dtype) if need_dh else None
    dw = new((V, D), dtype=dtype) if need_dw else None
    dbias = new(V, dtype=dtype) if need_dbias else None
    dead = grads.dead if need_dw else None
    if dead is not None and dh is not None and dh.dtype in HALF_DTYPES and dh.dtype == rows.hidden.dtype:
        # For the whole sweep, in the memory of dh: what goes there is summed elsewhere, and written at the end.
        rows, dead = rows.without(dead, room=dh), None
    resident = 0
    if N and (need_dw or need_dbias):
        resident = tiling.resident if dh is not None else 0
        _slice_major(tiles, rows, dead, head, grads, tiling, dh, dw, dbias, resident, reduce_dh)
    if dh is not None:
        for start, stop in blocks(N - resident, tiling.rows):
            at = slice(resident + start, resident + stop)
            _row_major(tiles, rows[at], head, grads[at], tiling.cols, dh[at], reduce_dh)
    return dh, dw, dbias


def _slice_major(
    tiles: Tiles, rows: Rows, dead: Tensor | None, head: Head, grads: RowGrads, tiling: Tiling,
    dh: Tensor | None, dw: Tensor | None, dbias: Tensor | None, resident: int, reduce_dh: Reduce | None,
) -> None:  # fmt: skip
    """Write dw and dbias, and dh of the first `resident` tokens; `dead` tokens are yet to be kept out of dw."""
    N = len(rows.codes)
    row_blocks = blocks(N, tiling.rows)
    dh_acc = _accumulator(dh[:resident]) if dh is not None and resident else None
    if dh_acc is not None:
        dh_acc.zero_()
    for c0, c1 in blocks(len(head.weight), tiling.cols):
        part = head[c0:c1]
        dw_acc = None
        if dw is not None and len(row_blocks) > 1:
            dw_acc = _accumulator(dw[c0:c1]).zero_()
        dbias_acc = None
        for start, stop in row_blocks:
            block = rows[start:stop]
            if dead is not None:
                block = block.without(
                    dead[start:stop], room=block.hidden if gemm.needs_upcast(rows.hidden) else None
                )  # fmt: skip
            dz = tiles.dlogits(block, part, grads[start:stop])
            if dbias is not None:
                total = gemm.column_sums(dz, gemm.stats_dtype(dz.dtype))
                dbias_acc = total if dbias_acc is None else dbias_acc.add_(total)
            if dw_acc is not None:
                gemm.addmm(dw_acc, dz.t(), block.hidden)
            elif dw is not None:
                gemm.mm(dz.t(), block.hidden, out=dw[c0:c1])
            if dh_acc is not None and start < resident:
                gemm.addmm(dh_acc[start:stop], dz, part.weight)
            del dz, block
        if dw is not None and dw_acc is not None:
            _store(dw[c0:c1], dw_acc)
        if dbias is not None and dbias_acc is not None:
            dbias[c0:c1] = dbias_acc
        del part, dw_acc
    if dh is not None and dh_acc is not None:
        if reduce_dh is not None:
            reduce_dh(dh_acc)
        _store(dh[:resident], dh_acc)


def _row_major(
    tiles: Tiles, block: Rows, head: Head, grads: RowGrads, cols: int, dh: Tensor, reduce_dh: Reduce | None
) -> None:
    """Write dh of one block of tokens."""
    dh_acc = _accumulator(dh).zero_()
    for c0, c1 in blocks(len(head.weight), cols):
        part = head[c0:c1]
        gemm.addmm(dh_acc, tiles.dlogits(block, part, grads), part.weight)
        del part
    if reduce_dh is not None:
        reduce_dh(dh_acc)
    _store(dh, dh_acc)


def _accumulator(out: Tensor) -> Tensor:
    """Where sums that end in `out` are kept: `out` itself, or fp32 beside it."""
    dtype = gemm.stats_dtype(out.dtype)
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def _store(out: Tensor, acc: Tensor) -> None:
    if acc.dtype != out.dtype:
        out.copy_(acc)
