"""Triton GEMMs whose epilogue consumes the logits, so that no logit reaches memory.

1. `fused_stats`    forward: a program owns a block of tokens and a part of the vocabulary. It walks the part tile by
                    tile; each tile's logits stay in the accumulator and are folded into the block's running
                    statistics, which are all it writes. `rows.finish` merges the parts: no lock, no atomic.
2. `fused_dlogits`  backward: a program owns a tile, computes its logits anew and writes their gradient in the
                    dtype of the GEMMs that follow. Persistent, tiles in groups that share rows of W in L2.

The last, ragged tile of the vocabulary is a launch of its own (RAGGED), so that the main one carries no mask. Its
epilogue is lean enough for a 128×256 tile to live in registers on sm_90 (no spill), where its cost is one exp, one
compare and a handful of adds a logit, against D multiply-adds.

Operands have contiguous rows that start at multiples of 16 bytes: they come through tensor descriptors made on the host
where the settings say TMA, otherwise through pointers and asynchronous copies. So do results of a tile's size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..constants import INTERPRETED
from ..plan import GemmSettings, dlogits_settings, stats_settings, vocab_splits
from .common import (
    _EXP_FLOOR,
    _FLOOR,
    _IGNORED,
    _PADDED,
    EXACT,
    exp,
    head_logit,
    inverse_temperature,
    logit_gradient,
    merge,
    merge_sums,
)

GROUP_ROWS = 16  # blocks of tokens that share a tile of W before the next tile is taken


@triton.jit
def tile_logits(
    h, w, row0, col0, N, V, D, stride_hn, stride_wv,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h[row0:, :]·w[col0:, :]ᵀ for one tile, accumulated in fp32. Rows and columns outside read as any other's."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if not TMA:
        offs_n = (row0 + tl.arange(0, BLOCK_N)) % N
        offs_v = (col0 + tl.arange(0, BLOCK_V)) % V
        h_rows = h + offs_n[:, None].to(tl.int64) * stride_hn
        w_rows = w + offs_v[None, :].to(tl.int64) * stride_wv
    for k in range(0, D, BLOCK_D):
        if TMA:
            a = h.load([row0, k])
            b = w.load([col0, k]).T
        else:
            offs_d = k + tl.arange(0, BLOCK_D)
            a = tl.load(h_rows + offs_d[None, :], mask=offs_d[None, :] < D, other=0.0)
            b = tl.load(w_rows + offs_d[:, None], mask=offs_d[:, None] < D, other=0.0)
        if UPCAST:  # the interpreter has no 16-bit products
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def tile_place(item, row_tiles, col_tiles, GROUP_ROWS: tl.constexpr):
    """Row and column of a persistent kernel's tile. Columns run slowest within a group of rows, which reads W once."""
    group = item // (GROUP_ROWS * col_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_ROWS, GROUP_ROWS)
    within = item - group * GROUP_ROWS * col_tiles
    return group * GROUP_ROWS + within % group_rows, within // group_rows


@triton.jit
def fused_stats_kernel(
    h, w, bias_ptr, code_ptr, temperature_ptr, partial_ptr,
    stride_hn, stride_wv, stride_k, stride_state, N, V, D, first_col, tiles, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr, ENTROPY: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, FLATTEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Programs that run side by side differ in their tokens and share the part of the vocabulary: W comes from L2.
    row0 = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    start = (tiles * split) // splits
    stop = (tiles * (split + 1)) // splits

    offs_n = row0 + tl.arange(0, BLOCK_N)
    inside_n = offs_n < N
    code = tl.load(code_ptr + offs_n, mask=inside_n, other=_IGNORED)
    # In 32 bits: a target outside the vocabulary is −1 and equals no column.
    label = tl.where((code >= 0) & (code < V), code, -1).to(tl.int32)
    scale = None
    if temperature_ptr is not None:
        scale = inverse_temperature(tl.load(temperature_ptr + offs_n, mask=inside_n, other=1.0))[:, None]

    m = tl.full((BLOCK_N,), _FLOOR, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    if ENTROPY:
        u = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(start, stop, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        col0 = first_col + tile * BLOCK_V
        x = tile_logits(
            h, w, row0, col0, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, TMA, UPCAST
        )  # fmt: skip
        # Columns count from the tile's first, so that the comparison needs no register for a column's number.
        offs_v = tl.arange(0, BLOCK_V)
        bias = None
        if bias_ptr is not None:
            if RAGGED:
                bias = tl.load(bias_ptr + col0 + offs_v, mask=offs_v < V - col0, other=0.0)
            else:
                bias = tl.load(bias_ptr + col0 + offs_v)
            bias = bias.to(tl.float32)[None, :]
        z = head_logit(x, bias, scale, softcap)
        is_target = offs_v[None, :] == (label - col0)[:, None]
        target += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        # Not the floor: a tile may hold nothing but the target and banned tokens, and its sum must be 0.
        z = tl.where(is_target, float("-inf"), z)
        if RAGGED:
            z = tl.where((offs_v < V - col0)[None, :], z, float("-inf"))
        m_tile = tl.maximum(tl.max(z, axis=1), _FLOOR)
        d = z - m_tile[:, None]
        e = exp(d)
        if ENTROPY:
            d = tl.maximum(d, _EXP_FLOOR)
            m, s, u = merge(m, s, u, m_tile, tl.sum(e, axis=1), tl.sum(e * d, axis=1))
        else:
            m, s = merge_sums(m, s, m_tile, tl.sum(e, axis=1))

    out = partial_ptr + split.to(tl.int64) * stride_k + offs_n
    tl.store(out, m, mask=inside_n)
    tl.store(out + stride_state, s, mask=inside_n)
    if ENTROPY:
        tl.store(out + 2 * stride_state, u, mask=inside_n)
    tl.store(out + 3 * stride_state, target, mask=inside_n)


@triton.jit
def fused_dlogits_kernel(
    h, w, bias_ptr, code_ptr, temperature_ptr, max_ptr, logsum_ptr, entropy_ptr, dlogp_ptr, others_ptr, dentropy_ptr,
    dx, stride_hn, stride_wv, stride_dn, N, V, D, col0, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_ROWS: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, FLATTEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(N, BLOCK_N)
    col_tiles = tl.cdiv(V, BLOCK_V)
    for item in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE
    ):
        row_tile, col_tile = tile_place(item, row_tiles, col_tiles, GROUP_ROWS)
        row0 = row_tile * BLOCK_N
        tile_col0 = col_tile * BLOCK_V
        x = tile_logits(
            h, w, row0, tile_col0, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, TMA, UPCAST
        )  # fmt: skip

        offs_n = row0 + tl.arange(0, BLOCK_N)
        offs_v = tile_col0 + tl.arange(0, BLOCK_V)
        inside_n = offs_n < N
        inside_v = offs_v < V
        code = tl.load(code_ptr + offs_n, mask=inside_n, other=_IGNORED)
        label = tl.where((code >= col0) & (code < col0 + V), code - col0, -1).to(tl.int32)
        scale = None
        if temperature_ptr is not None:
            scale = inverse_temperature(tl.load(temperature_ptr + offs_n, mask=inside_n, other=1.0))[:, None]
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_v, mask=inside_v, other=0.0).to(tl.float32)[None, :]
        entropy = None
        dentropy = None
        if dentropy_ptr is not None:
            entropy = tl.load(entropy_ptr + offs_n, mask=inside_n, other=0.0)[:, None]
            dentropy = tl.load(dentropy_ptr + offs_n, mask=inside_n, other=0.0)[:, None]
        gradient = logit_gradient(
            x, bias, scale, softcap, offs_v[None, :] == label[:, None],
            tl.load(max_ptr + offs_n, mask=inside_n, other=0.0)[:, None],
            tl.load(logsum_ptr + offs_n, mask=inside_n, other=0.0)[:, None],
            entropy,
            tl.load(dlogp_ptr + offs_n, mask=inside_n, other=0.0)[:, None],
            tl.load(others_ptr + offs_n, mask=inside_n, other=0.0)[:, None],
            dentropy,
        )  # fmt: skip
        if TMA:
            dx.store([row0, tile_col0], gradient.to(dx.dtype))
        else:
            out = dx + offs_n[:, None].to(tl.int64) * stride_dn + offs_v[None, :]
            # Up to the row's padding, so that a thread writes 16 bytes at a time wherever the vocabulary ends.
            padded = offs_v < tl.cdiv(V, _PADDED) * _PADDED
            tl.store(out, gradient.to(dx.dtype.element_ty), mask=inside_n[:, None] & padded[None, :])


def operands(h: Tensor, w: Tensor, settings: GemmSettings) -> tuple[object, object]:
    """h and w as a kernel takes them: descriptors of its blocks where it goes through TMA, else themselves."""
    return (
        _blocks_of(h, settings.block_n, settings.block_d, settings),
        _blocks_of(w, settings.block_v, settings.block_d, settings),
    )


def result(t: Tensor, settings: GemmSettings) -> object:
    """A result of a tile's size, likewise."""
    return _blocks_of(t, settings.block_n, settings.block_v, settings)


def _blocks_of(t: Tensor, rows: int, columns: int, settings: GemmSettings) -> object:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns]) if settings.tma else t


def launch_options(settings: GemmSettings) -> dict[str, Any]:
    """What every GEMM is launched with."""
    return {
        "BLOCK_N": settings.block_n, "BLOCK_V": settings.block_v, "BLOCK_D": settings.block_d, "TMA": settings.tma,
        "WARP_SPECIALIZE": settings.warp_specialize, "FLATTEN": settings.flatten, "UPCAST": INTERPRETED,
        "num_warps": settings.num_warps, "num_stages": settings.num_stages, **EXACT,
    }  # fmt: skip


def stats_splits(N: int, V: int, settings: GemmSettings, sms: int) -> int:
    """How many partial statistics `fused_stats` writes for a row: splits of the whole tiles, and the ragged rest."""
    whole, rest = divmod(V, settings.block_v)
    splits = vocab_splits(N, whole, block_n=settings.block_n, sms=sms) if whole else 0
    return splits + (rest > 0)


def fused_stats(
    h: Tensor, w: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, softcap: float | None,
    arch: int, sms: int, entropy: bool,
) -> Tensor:  # fmt: skip
    """Partial statistics [K, 4, n] of h [n, D] against w [V, D], on a GPU of `sms` processors.

    The moment is not written unless for the entropy.
    """
    n, D = h.shape
    V = w.shape[0]
    options = {"bias": bias is not None, "softcap": softcap is not None}
    settings = stats_settings(arch, ragged=False, **options)
    partials = torch.empty((stats_splits(n, V, settings, sms), 4, n), dtype=torch.float32, device=h.device)
    whole, rest = divmod(V, settings.block_v)
    launches = [(False, settings, 0, whole, partials[:-1] if rest else partials)] if whole else []
    if rest:
        settings = stats_settings(arch, ragged=True, **options)
        launches.append((True, settings, V - rest, triton.cdiv(rest, settings.block_v), partials[-1:]))
    for ragged, settings, first_col, tiles, out in launches:
        fused_stats_kernel[(triton.cdiv(n, settings.block_n), len(out))](
            *operands(h, w, settings), bias, codes, temperature, out,
            h.stride(0), w.stride(0), out.stride(0), out.stride(1), n, V, D, first_col, tiles, softcap,
            RAGGED=ragged, ENTROPY=entropy, **launch_options(settings),
        )  # fmt: skip
    return partials


def fused_dlogits(
    h: Tensor, w: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, row_max: Tensor,
    logsum: Tensor, entropy: Tensor | None, dlogp: Tensor, others: Tensor, dentropy: Tensor | None, dx: Tensor,
    col0: int, softcap: float | None, arch: int, sms: int,
) -> None:  # fmt: skip
    """Gradients dx [n, s] of the raw logits of h [n, D] and w [s, D], the columns from col0 on.

    Rows of dx start at multiples of `PADDED` elements; what lies between may be written.
    """
    settings = dlogits_settings(arch, entropy=dentropy is not None, softcap=softcap is not None)
    n, D = h.shape
    V = w.shape[0]
    tiles = triton.cdiv(n, settings.block_n) * triton.cdiv(V, settings.block_v)
    fused_dlogits_kernel[(min(tiles, sms),)](
        *operands(h, w, settings), bias, codes, temperature, row_max, logsum, entropy, dlogp, others, dentropy,
        result(dx, settings), h.stride(0), w.stride(0), dx.stride(0), n, V, D, col0, softcap,
        GROUP_ROWS=GROUP_ROWS, **launch_options(settings),
    )  # fmt: skip
