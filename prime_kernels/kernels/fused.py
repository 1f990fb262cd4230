"""What Triton GEMMs with an epilogue on their logits share, and the one that writes the logits' gradient.

`fused_dlogits` computes a tile's logits anew and writes their gradient in the dtype of the GEMMs that follow. Its
programs are persistent and take tiles in groups that share rows of W in L2. `exponentials` is built alike.

Operands have contiguous rows that start at multiples of 16 bytes: they come through tensor descriptors made on the host
where the settings say TMA, otherwise through pointers and asynchronous copies. So do results of a tile's size.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..constants import INTERPRETED
from ..plan import GemmSettings, dlogits_settings
from .common import (
    _IGNORED,
    _PADDED,
    EXACT,
    inverse_temperature,
    logit_gradient,
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
def fused_dlogits_kernel(
    h, w, bias_ptr, code_ptr, temperature_ptr, max_ptr, logsum_ptr, entropy_ptr, dlogp_ptr, target_ptr, dentropy_ptr,
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
            tl.load(target_ptr + offs_n, mask=inside_n, other=0.0)[:, None],
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


def fused_dlogits(
    h: Tensor, w: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, row_max: Tensor,
    logsum: Tensor, entropy: Tensor | None, dlogp: Tensor, at_target: Tensor, dentropy: Tensor | None, dx: Tensor,
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
        *operands(h, w, settings), bias, codes, temperature, row_max, logsum, entropy, dlogp, at_target, dentropy,
        result(dx, settings), h.stride(0), w.stride(0), dx.stride(0), n, V, D, col0, softcap,
        GROUP_ROWS=GROUP_ROWS, **launch_options(settings),
    )  # fmt: skip
