"""Memory-bound kernels on a tile of fp32 logits that a GEMM has written.

1. `row_stats`   one program a row: reads each logit once, folds the tile into the row's running statistics
2. `finish`      one thread a row: merges partial statistics, brings the target in, yields log-prob and entropy
3. `row_dlogits` one program a row: reads each logit once, writes its gradient in its place
"""

import triton
import triton.language as tl
from torch import Tensor

from ..plan import FINISH_BLOCK_N, ROW_DLOGITS, ROW_STATS
from .common import (
    _EXP_FLOOR,
    _FLOOR,
    _IGNORED,
    IGNORED,
    INVALID,
    head_logit,
    inverse_temperature,
    log1p,
    logit_gradient,
    merge,
)


@triton.jit
def row_stats_kernel(
    x_ptr, bias_ptr, code_ptr, temperature_ptr, state_ptr, stride_xn, stride_state, col0, V, softcap,
    BLOCK_V: tl.constexpr,
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
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside = offs_v < V
        x = tl.load(x_row + offs_v, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32) if bias_ptr is not None else None
        z = head_logit(x, bias, scale, softcap)
        other = inside & (offs_v != label)
        m_tile = tl.maximum(tl.max(tl.where(other, z, _FLOOR), axis=0), _FLOOR)
        d = z - m_tile
        e = tl.where(other, tl.exp(d), 0.0)
        m, s, u = merge(m, s, u, m_tile, tl.sum(e, axis=0), tl.sum(e * tl.maximum(d, _EXP_FLOOR), axis=0))
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
        u_k = tl.load(part + 2 * stride_state, mask=inside, other=0.0)
        target += tl.load(part + 3 * stride_state, mask=inside, other=0.0)
        m, s, u = merge(m, s, u, m_k, s_k, u_k)
        state_ptr += stride_k

    # The target joins. logsum = log Σ_v e^{z_v − top} = logsumexp − top.
    top = tl.maximum(m, target)
    others = s * tl.exp(m - top)
    e_target = tl.exp(target - top)
    logsum = tl.where(target >= m, log1p(others), tl.log(others + e_target))
    logp = (target - top) - logsum
    # H = logsumexp − Σ p z = logsum − Σ p (z − top): a sum of non-negative terms.
    moment = tl.exp(m - top) * (u + s * (m - top)) + e_target * (target - top)
    entropy = logsum - moment / (others + e_target)

    code = tl.load(code_ptr + offs, mask=inside, other=0)
    ignored = code == IGNORED
    invalid = code == INVALID
    nan = float("nan")
    tl.store(logp_ptr + offs, tl.where(ignored, 0.0, tl.where(invalid, nan, logp)), mask=inside)
    tl.store(entropy_ptr + offs, tl.where(ignored, 0.0, tl.where(invalid, nan, entropy)), mask=inside)
    tl.store(max_ptr + offs, top, mask=inside)
    tl.store(logsum_ptr + offs, tl.where(invalid, nan, logsum), mask=inside)


@triton.jit
def row_dlogits_kernel(
    x_ptr, bias_ptr, code_ptr, temperature_ptr, max_ptr, logsum_ptr, entropy_ptr,
    dlogp_ptr, others_ptr, dentropy_ptr, dx_ptr, stride_xn, stride_dn, col0, V, softcap, BLOCK_V: tl.constexpr,
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
    others = tl.load(others_ptr + row)

    # dx takes the place of x, in fewer bytes a number: a block's gradients land on logits of this block or of
    # earlier ones. The barrier lets no warp write before every warp has read the block.
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside = offs_v < V
        x = tl.load(x_ptr + row * stride_xn + offs_v, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32) if bias_ptr is not None else None
        dx = logit_gradient(
            x, bias, scale, softcap, offs_v == label, code == _IGNORED, m, logsum, entropy, dlogp, others, dentropy
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(dx_ptr + row * stride_dn + offs_v, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def row_stats(
    x: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, state: Tensor, col0: int,
    softcap: float | None,
) -> None:  # fmt: skip
    """Fold logits x [n, s] fp32 of columns col0… into state [4, n] = (max, sum, moment, target)."""
    n, V = x.shape
    row_stats_kernel[(n,)](
        x, bias, codes, temperature, state, x.stride(0), state.stride(0), col0, V, softcap,
        BLOCK_V=ROW_STATS.block_v, num_warps=ROW_STATS.num_warps,
    )  # fmt: skip


def finish(partials: Tensor, codes: Tensor, logp: Tensor, entropy: Tensor, row_max: Tensor, logsum: Tensor) -> None:
    """Merge partials [K, 4, n] and write log-prob, entropy, max and logsumexp − max [n] of each row."""
    K, _, n = partials.shape
    finish_kernel[(triton.cdiv(n, FINISH_BLOCK_N),)](
        partials, codes, logp, entropy, row_max, logsum, partials.stride(0), partials.stride(1), n, K,
        IGNORED=IGNORED, INVALID=INVALID, BLOCK_N=FINISH_BLOCK_N, num_warps=4,
    )  # fmt: skip


def row_dlogits(
    x: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, row_max: Tensor, logsum: Tensor,
    entropy: Tensor, dlogp: Tensor, others: Tensor, dentropy: Tensor | None, dx: Tensor, col0: int,
    softcap: float | None,
) -> None:  # fmt: skip
    """Gradients dx [n, s] of raw products x [n, s]; dx shares x's memory, rows starting at the same bytes."""
    n, V = x.shape
    row_dlogits_kernel[(n,)](
        x, bias, codes, temperature, row_max, logsum, entropy, dlogp, others, dentropy, dx,
        x.stride(0), dx.stride(0), col0, V, softcap,
        BLOCK_V=ROW_DLOGITS.block_v, num_warps=ROW_DLOGITS.num_warps,
    )  # fmt: skip
