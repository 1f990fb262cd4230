"""Memory-bound kernels on a tile of fp32 logits that a GEMM has written.

1. `row_stats`   one program a row: reads each logit once, folds the tile into the row's running statistics
2. `finish`      one thread a row: merges partial statistics, brings the target in, yields log-prob and entropy
3. `row_dlogits` one program a row: reads each logit once, writes its gradient in its place
"""

import triton
import triton.language as tl
from torch import Tensor

from ..constants import IGNORED, INVALID
from ..plan import CAPPED_ROWS, FINISH_BLOCK_N, ROW_DLOGITS, ROW_STATS
from .common import (
    _EXP_FLOOR,
    _FLOOR,
    _PADDED,
    EXACT,
    exp,
    head_logit,
    inverse_temperature,
    log1p,
    logit_gradient,
    merge,
    merge_sums,
)


@triton.jit
def load_block(x_row, bias_ptr, offs_v, V, RAGGED: tl.constexpr):
    """Products with their bias of one block of columns; in a ragged one, 0 beyond the last column."""
    if RAGGED:
        inside = offs_v < V
        x = tl.load(x_row + offs_v, mask=offs_v < tl.cdiv(V, _PADDED) * _PADDED, other=0.0)
        x = tl.where(inside, x, 0.0)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_row + offs_v)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + offs_v).to(tl.float32)
    return x


@triton.jit
def fold_block(
    m, s, u, x_row, bias_ptr, start, V, label, scale, softcap, ENTROPY: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics with those of one block's columns but the target's; the moment stays unless for the entropy."""
    offs_v = start + tl.arange(0, BLOCK_V)
    z = head_logit(load_block(x_row, bias_ptr, offs_v, V, RAGGED), None, scale, softcap)
    other = offs_v != label
    if RAGGED:
        other = other & (offs_v < V)
    # Not the floor: a block may hold nothing but the target and banned columns, and its sum must be 0.
    z = tl.where(other, z, float("-inf"))
    m_block = tl.maximum(tl.max(z, axis=0), _FLOOR)
    d = z - m_block
    e = exp(d)
    if ENTROPY:
        m, s, u = merge(m, s, u, m_block, tl.sum(e, axis=0), tl.sum(e * tl.maximum(d, _EXP_FLOOR), axis=0))
    else:
        m, s = merge_sums(m, s, m_block, tl.sum(e, axis=0))
    return m, s, u


@triton.jit
def row_stats_kernel(
    x_ptr, bias_ptr, code_ptr, temperature_ptr, state_ptr, stride_xn, stride_state, col0, V, softcap,
    ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xn
    scale = inverse_temperature(tl.load(temperature_ptr + row)) if temperature_ptr is not None else None
    # The target as a column of this tile, −1 where it is none.
    label = tl.load(code_ptr + row) - col0
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)

    m = tl.load(state_ptr + row)
    s = tl.load(state_ptr + stride_state + row)
    u = tl.load(state_ptr + 2 * stride_state + row)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        m, s, u = fold_block(m, s, u, x_row, bias_ptr, start, V, label, scale, softcap, ENTROPY, False, BLOCK_V)
    if whole < V:
        m, s, u = fold_block(m, s, u, x_row, bias_ptr, whole, V, label, scale, softcap, ENTROPY, True, BLOCK_V)
    tl.store(state_ptr + row, m)
    tl.store(state_ptr + stride_state + row, s)
    tl.store(state_ptr + 2 * stride_state + row, u)

    if label >= 0:
        x = tl.load(x_row + label)
        bias = tl.load(bias_ptr + label).to(tl.float32) if bias_ptr is not None else None
        tl.store(state_ptr + 3 * stride_state + row, head_logit(x, bias, scale, softcap))


@triton.jit
def finish_kernel(
    state_ptr, code_ptr, logp_ptr, entropy_ptr, max_ptr, logsum_ptr, stride_k, stride_state, N, K,
    IGNORED: tl.constexpr, INVALID: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs < N
    m = tl.full((BLOCK_N,), _FLOOR, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    u = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(K):
        part = state_ptr + offs
        m_k = tl.load(part, mask=inside, other=0.0)
        s_k = tl.load(part + stride_state, mask=inside, other=0.0)
        target += tl.load(part + 3 * stride_state, mask=inside, other=0.0)
        if entropy_ptr is not None:
            m, s, u = merge(m, s, u, m_k, s_k, tl.load(part + 2 * stride_state, mask=inside, other=0.0))
        else:
            m, s = merge_sums(m, s, m_k, s_k)
        state_ptr += stride_k

    # The target joins. logsum = log Σ_v e^{z_v − top} = logsumexp − top.
    top = tl.maximum(m, target)
    others = s * exp(m - top)
    e_target = exp(target - top)
    total = others + e_target
    # A maximum at the floor with nothing above it: every logit is banned, or too small to tell from the floor.
    logsum = tl.where(target >= m, log1p(others), tl.where(total > 0, tl.log(total), float("nan")))
    logp = (target - top) - logsum
    code = tl.load(code_ptr + offs, mask=inside, other=0)
    ignored = code == IGNORED
    invalid = code == INVALID
    nan = float("nan")
    tl.store(logp_ptr + offs, tl.where(ignored, 0.0, tl.where(invalid, nan, logp)), mask=inside)
    if entropy_ptr is not None:
        # H = logsumexp − Σ p z = logsum − Σ p (z − top): a sum of non-negative terms. A target may be banned: −inf.
        of_target = e_target * tl.maximum(target - top, _EXP_FLOOR)
        moment = exp(m - top) * (u + s * (m - top)) + of_target
        entropy = logsum - moment / total
        tl.store(entropy_ptr + offs, tl.where(ignored, 0.0, tl.where(invalid, nan, entropy)), mask=inside)
    tl.store(max_ptr + offs, top, mask=inside)
    tl.store(logsum_ptr + offs, tl.where(invalid, nan, logsum), mask=inside)


@triton.jit
def block_gradient(
    x_row, bias_ptr, dx_row, start, V, label, scale, softcap, m, logsum, entropy, dlogp, at_target, dentropy,
    RAGGED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Put the gradient of one block's columns in their place.

    Its numbers take no more bytes than theirs, so a block's gradients land on logits of this block or of earlier ones.
    The barrier lets no warp write before every warp has read the block.
    """
    offs_v = start + tl.arange(0, BLOCK_V)
    x = load_block(x_row, bias_ptr, offs_v, V, RAGGED)
    dx = logit_gradient(x, None, scale, softcap, offs_v == label, m, logsum, entropy, dlogp, at_target, dentropy)
    tl.debug_barrier()
    if RAGGED:
        tl.store(dx_row + offs_v, dx.to(dx_row.dtype.element_ty), mask=offs_v < tl.cdiv(V, _PADDED) * _PADDED)
    else:
        tl.store(dx_row + offs_v, dx.to(dx_row.dtype.element_ty))


@triton.jit
def row_dlogits_kernel(
    x_ptr, bias_ptr, code_ptr, temperature_ptr, max_ptr, logsum_ptr, entropy_ptr,
    dlogp_ptr, target_ptr, dentropy_ptr, dx_ptr, stride_xn, stride_dn, col0, V, softcap, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    code = tl.load(code_ptr + row)
    label = tl.where((code >= col0) & (code < col0 + V), code - col0, -1).to(tl.int32)
    scale = inverse_temperature(tl.load(temperature_ptr + row)) if temperature_ptr is not None else None
    entropy = tl.load(entropy_ptr + row) if dentropy_ptr is not None else None
    dentropy = tl.load(dentropy_ptr + row) if dentropy_ptr is not None else None
    m = tl.load(max_ptr + row)
    logsum = tl.load(logsum_ptr + row)
    dlogp = tl.load(dlogp_ptr + row)
    at_target = tl.load(target_ptr + row)

    x_row = x_ptr + row * stride_xn
    dx_row = dx_ptr + row * stride_dn
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        block_gradient(
            x_row, bias_ptr, dx_row, start, V, label, scale, softcap, m, logsum, entropy, dlogp, at_target, dentropy,
            False, BLOCK_V,
        )  # fmt: skip
    if whole < V:
        block_gradient(
            x_row, bias_ptr, dx_row, whole, V, label, scale, softcap, m, logsum, entropy, dlogp, at_target, dentropy,
            True, BLOCK_V,
        )  # fmt: skip


def row_stats(
    x: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, state: Tensor, col0: int,
    softcap: float | None, entropy: bool,
) -> None:  # fmt: skip
    """Fold logits x [n, s] fp32 of columns col0… into state [4, n] = (max, sum, moment if for the entropy, target).

    Rows of x start at multiples of `PADDED` elements; what lies between is read.
    """
    n, V = x.shape
    settings = ROW_STATS if softcap is None else CAPPED_ROWS
    row_stats_kernel[(n,)](
        x, bias, codes, temperature, state, x.stride(0), state.stride(0), col0, V, softcap,
        ENTROPY=entropy, BLOCK_V=settings.block_v, num_warps=settings.num_warps, **EXACT,
    )  # fmt: skip


def finish(
    partials: Tensor, codes: Tensor, logp: Tensor, entropy: Tensor | None, row_max: Tensor, logsum: Tensor
) -> None:
    """Merge partials [K, 4, n] and write log-prob, entropy if wanted, max and logsumexp − max [n] of each row."""
    K, _, n = partials.shape
    finish_kernel[(triton.cdiv(n, FINISH_BLOCK_N),)](
        partials, codes, logp, entropy, row_max, logsum, partials.stride(0), partials.stride(1), n, K,
        IGNORED=IGNORED, INVALID=INVALID, BLOCK_N=FINISH_BLOCK_N, num_warps=4, **EXACT,
    )  # fmt: skip


def row_dlogits(
    x: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, row_max: Tensor, logsum: Tensor,
    entropy: Tensor | None, dlogp: Tensor, at_target: Tensor, dentropy: Tensor | None, dx: Tensor, col0: int,
    softcap: float | None,
) -> None:  # fmt: skip
    """Gradients dx [n, s] of raw products x [n, s]; dx shares x's memory, rows starting at the same bytes.

    Rows of both start at multiples of `PADDED` elements; what lies between is written.
    """
    n, V = x.shape
    settings = ROW_DLOGITS if softcap is None else CAPPED_ROWS
    row_dlogits_kernel[(n,)](
        x, bias, codes, temperature, row_max, logsum, entropy, dlogp, at_target, dentropy, dx,
        x.stride(0), dx.stride(0), col0, V, softcap,
        BLOCK_V=settings.block_v, num_warps=settings.num_warps, **EXACT,
    )  # fmt: skip
