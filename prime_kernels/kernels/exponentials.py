"""The GEMM of the logits whose epilogue takes e^z: a row's statistics, and what a loss's gradient needs, at one look.

    E = e^{z − k},  k near the row's maximum        2NDV FLOP, 2 bytes a logit where E is kept
    dZ = v·E,       v = −dlogp·e^{k − logsumexp}    a factor of the row, known once the loss is
    E_target = −Σ_{others} E                        so that v·E is (1 − p)·dlogp there

so a loss needs no second look at the logits: dX = v·(E W) and dW = Eᵀ(v·X). Statistics alone keep no E.

1. `offsets`        one program a row: the target's logit, and k: that, since a trained model puts it near the maximum
2. `exponentials`   persistent, one tile at a time; a row whose tile reaches beyond k takes an offset of its own there
3. `merge_tiles`    the tiles' statistics become a row's, in a fixed order
4. `settle`         E's tiles on one offset where they are not, the target's entry, and v
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import exponentials_settings
from .common import _EXP_FLOOR, _FLOOR, _IGNORED, _PADDED, EXACT, exp, head_logit, inverse_temperature
from .fused import GROUP_ROWS, launch_options, operands, result, tile_logits, tile_place

# Nats above its offset that a tile may reach: E, its sums over the vocabulary and v stay far inside fp32's range, which
# bf16 shares.
_REACH = tl.constexpr(22.0)
OFFSET_BLOCK_D = 1024
MERGE_ROWS, MERGE_TILES = 32, 64
# Of a row: max, sum, moment and target as `finish` takes them; offset and sum of the others as E has them. A tile has
# the first three.
STATES, OF_TILE = 6, 3


@triton.jit
def offsets_kernel(
    h_ptr, w_ptr, bias_ptr, code_ptr, temperature_ptr, offset_ptr, target_ptr, stride_hn, stride_wv, V, D, softcap,
    KEPT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    code = tl.load(code_ptr + row)
    owned = (code >= 0) & (code < V)
    column = tl.where(owned, code, 0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + row * stride_hn + offs, mask=offs < D, other=0.0).to(tl.float32)
        total += h * tl.load(w_ptr + column * stride_wv + offs, mask=offs < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column).to(tl.float32) if bias_ptr is not None else None
    scale = inverse_temperature(tl.load(temperature_ptr + row)) if temperature_ptr is not None else None
    z = head_logit(tl.sum(total, axis=0), bias, scale, softcap)
    tl.store(target_ptr + row, tl.where(owned, z, 0.0))
    # A banned target or one that is no number leaves every tile to its own offset, and so does one that is not here;
    # but not where E is kept, as then an ignored row's tiles would be brought to one offset for nothing.
    tl.store(offset_ptr + row, tl.where(owned, tl.maximum(z, _FLOOR), 0.0 if KEPT else _FLOOR))


@triton.jit
def exponentials_kernel(
    h, w, bias_ptr, code_ptr, temperature_ptr, offset_ptr, e, partial_ptr,
    stride_hn, stride_wv, stride_en, stride_k, stride_state, N, V, D, first_tile, tiles, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_ROWS: tl.constexpr,
    RAGGED: tl.constexpr, ENTROPY: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, FLATTEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(N, BLOCK_N)
    for item in tl.range(
        tl.program_id(0), row_tiles * tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE
    ):
        row_tile, col_tile = tile_place(item, row_tiles, tiles, GROUP_ROWS)
        row0 = row_tile * BLOCK_N
        tile = first_tile + col_tile
        col0 = tile * BLOCK_V
        x = tile_logits(
            h, w, row0, col0, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, TMA, UPCAST
        )  # fmt: skip

        offs_n = row0 + tl.arange(0, BLOCK_N)
        # Columns count from the tile's first, so that the comparison needs no register for a column's number.
        offs_v = tl.arange(0, BLOCK_V)
        inside_n = offs_n < N
        code = tl.load(code_ptr + offs_n, mask=inside_n, other=_IGNORED)
        label = tl.where((code >= 0) & (code < V), code, -1).to(tl.int32)
        scale = None
        if temperature_ptr is not None:
            scale = inverse_temperature(tl.load(temperature_ptr + offs_n, mask=inside_n, other=1.0))[:, None]
        bias = None
        if bias_ptr is not None:
            if RAGGED:
                bias = tl.load(bias_ptr + col0 + offs_v, mask=offs_v < V - col0, other=0.0)
            else:
                bias = tl.load(bias_ptr + col0 + offs_v)
            bias = bias.to(tl.float32)[None, :]
        z = head_logit(x, bias, scale, softcap)
        # No branch around what few tiles need: the compiler would wait for each of the loop's products.
        z = tl.where(offs_v[None, :] == (label - col0)[:, None], float("-inf"), z)
        if RAGGED:
            z = tl.where((offs_v < V - col0)[None, :], z, float("-inf"))
        k = tl.load(offset_ptr + offs_n, mask=inside_n, other=0.0)
        top = tl.max(z, axis=1)
        k = tl.where(top > k + _REACH, top, k)
        d = z - k[:, None]
        p = exp(d)
        out = partial_ptr + tile.to(tl.int64) * stride_k + offs_n
        tl.store(out, k, mask=inside_n)
        tl.store(out + stride_state, tl.sum(p, axis=1), mask=inside_n)
        if ENTROPY:
            moment = tl.sum(p * tl.maximum(d, _EXP_FLOOR), axis=1)
            tl.store(out + 2 * stride_state, moment, mask=inside_n)
        if e is not None:
            if TMA:
                e.store([row0, col0], p.to(e.dtype))
            else:
                place = e + offs_n[:, None].to(tl.int64) * stride_en + (col0 + offs_v)[None, :]
                padded = offs_v < tl.cdiv(V, _PADDED) * _PADDED - col0
                tl.store(place, p.to(e.dtype.element_ty), mask=inside_n[:, None] & padded[None, :])


@triton.jit
def merge_tiles_kernel(
    partial_ptr, state_ptr, stride_k, stride_state, stride_out, N, K, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_n = offs_n < N
    offs_k = tl.arange(0, TILES)
    top = tl.full((ROWS,), _FLOOR, tl.float32)
    for start in range(0, K, TILES):
        inside = (start + offs_k < K)[:, None] & inside_n[None, :]
        place = partial_ptr + (start + offs_k).to(tl.int64)[:, None] * stride_k + offs_n[None, :]
        top = tl.maximum(top, tl.max(tl.load(place, mask=inside, other=_FLOOR), axis=0))
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    for start in range(0, K, TILES):
        inside = (start + offs_k < K)[:, None] & inside_n[None, :]
        place = partial_ptr + (start + offs_k).to(tl.int64)[:, None] * stride_k + offs_n[None, :]
        shift = tl.load(place, mask=inside, other=_FLOOR) - top[None, :]
        s = tl.load(place + stride_state, mask=inside, other=0.0)
        a = exp(shift)
        total += tl.sum(s * a, axis=0)
        if ENTROPY:
            u = tl.load(place + 2 * stride_state, mask=inside, other=0.0)
            moment += tl.sum(a * (u + s * tl.maximum(shift, _EXP_FLOOR)), axis=0)
    out = state_ptr + offs_n
    target = tl.load(out + 3 * stride_out, mask=inside_n, other=0.0)
    tl.store(out + 4 * stride_out, top, mask=inside_n)
    tl.store(out + 5 * stride_out, total, mask=inside_n)
    # The offset was meant to be the target's logit. That itself takes its place, as `finish` finds a target that leads
    # by its not being below the maximum.
    shift = top - target
    near = tl.abs(shift) < 1.0
    a = tl.where(near, exp(shift), 1.0)
    tl.store(out, tl.where(near, target, top), mask=inside_n)
    tl.store(out + stride_out, a * total, mask=inside_n)
    tl.store(out + 2 * stride_out, tl.where(near, a * (moment + total * shift), moment), mask=inside_n)


@triton.jit
def settle_kernel(
    e_ptr, partial_ptr, state_ptr, code_ptr, temperature_ptr, max_ptr, logsum_ptr, dlogp_ptr, factor_ptr,
    stride_en, stride_k, stride_out, N, V, K,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_n = offs_n < N
    first = tl.program_id(1) * TILES
    offset = tl.load(state_ptr + 4 * stride_out + offs_n, mask=inside_n, other=0.0)
    offs_k = first + tl.arange(0, TILES)
    own = tl.load(
        partial_ptr + offs_k.to(tl.int64)[:, None] * stride_k + offs_n[None, :],
        mask=(offs_k < K)[:, None] & inside_n[None, :], other=_FLOOR,
    )  # fmt: skip
    others = tl.load(state_ptr + 5 * stride_out + offs_n, mask=inside_n, other=0.0)
    dlogp = tl.load(dlogp_ptr + offs_n, mask=inside_n, other=0.0)
    # A dead row holds what it likes. Its factor is 0, but 0·NaN would be NaN.
    wiped = (dlogp == 0.0) & ((others != others) | (others == float("inf")))
    differs = ((own != offset[None, :]) | wiped[None, :]) & (offs_k < K)[:, None] & inside_n[None, :]
    rows = e_ptr + offs_n.to(tl.int64)[:, None] * stride_en
    if tl.max(tl.max(differs.to(tl.int32), axis=1), axis=0) > 0:
        for tile in range(first, tl.minimum(first + TILES, K)):
            place = partial_ptr + tl.cast(tile, tl.int64) * stride_k + offs_n
            shift = tl.load(place, mask=inside_n, other=0.0) - offset
            stale = inside_n & ((shift != 0.0) | wiped)
            if tl.max(stale.to(tl.int32), axis=0) > 0:
                for start in range(0, BLOCK_V, COLUMNS):
                    offs_v = tile * BLOCK_V + start + tl.arange(0, COLUMNS)
                    mask = stale[:, None] & (offs_v < V)[None, :]
                    p = tl.load(rows + offs_v[None, :], mask=mask, other=0.0).to(tl.float32)
                    p = tl.where(wiped[:, None], 0.0, p * exp(shift)[:, None])
                    tl.store(rows + offs_v[None, :], p.to(e_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    code = tl.load(code_ptr + offs_n, mask=inside_n, other=_IGNORED)
    begin = first * BLOCK_V
    here = inside_n & (code >= begin) & (code < begin + TILES * BLOCK_V) & (code < V)
    place = e_ptr + offs_n.to(tl.int64) * stride_en + tl.where(here, code, 0)
    tl.store(place, tl.where(wiped, 0.0, -others).to(e_ptr.dtype.element_ty), mask=here)
    if first == 0:
        row_max = tl.load(max_ptr + offs_n, mask=inside_n, other=0.0)
        logsum = tl.load(logsum_ptr + offs_n, mask=inside_n, other=0.0)
        factor = -dlogp * exp((offset - row_max) - logsum)
        if temperature_ptr is not None:
            factor *= inverse_temperature(tl.load(temperature_ptr + offs_n, mask=inside_n, other=1.0))
        tl.store(factor_ptr + offs_n, tl.where(dlogp == 0.0, 0.0, factor), mask=inside_n)


def exponentials(
    h: Tensor, w: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, e: Tensor, arch: int,
    sms: int, entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write e [n, V], in the dtype of h [n, D]; returns its tiles' statistics [K, 3, n] and the rows' [6, n].

    The first four of the rows' are what `finish` takes. Rows of e start at multiples of `PADDED` elements; what lies
    between may be written.
    """
    return _statistics(h, w, bias, codes, temperature, None, e, arch, sms, entropy)


def statistics(
    h: Tensor, w: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, softcap: float | None,
    arch: int, sms: int, entropy: bool,
) -> Tensor:  # fmt: skip
    """Statistics [4, n] of the rows of h [n, D] against w [V, D], as `finish` takes them."""
    return _statistics(h, w, bias, codes, temperature, softcap, None, arch, sms, entropy)[1][:4]


def tile_bytes(V: int, arch: int, *, bias: bool, softcap: bool) -> int:
    """Bytes that a row's statistics take before its tiles are merged."""
    return 4 * OF_TILE * triton.cdiv(V, exponentials_settings(arch, bias=bias, softcap=softcap).block_v)


def _statistics(
    h: Tensor, w: Tensor, bias: Tensor | None, codes: Tensor, temperature: Tensor | None, softcap: float | None,
    e: Tensor | None, arch: int, sms: int, entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (n, D), V = h.shape, w.shape[0]
    settings = exponentials_settings(arch, bias=bias is not None, softcap=softcap is not None)
    whole, rest = divmod(V, settings.block_v)
    partials = h.new_empty((whole + (rest > 0), OF_TILE, n), dtype=torch.float32)
    state = h.new_empty((STATES, n), dtype=torch.float32)
    offset = h.new_empty(n, dtype=torch.float32)
    offsets_kernel[(n,)](
        h, w, bias, codes, temperature, offset, state[3], h.stride(0), w.stride(0), V, D, softcap,
        KEPT=e is not None, BLOCK_D=OFFSET_BLOCK_D, num_warps=4, **EXACT,
    )  # fmt: skip
    row_tiles = triton.cdiv(n, settings.block_n)
    for ragged, first, tiles in ((False, 0, whole), (True, whole, int(rest > 0))):
        if not tiles:
            continue
        exponentials_kernel[(min(row_tiles * tiles, sms),)](
            *operands(h, w, settings), bias, codes, temperature, offset,
            None if e is None else result(e, settings), partials,
            h.stride(0), w.stride(0), 0 if e is None else e.stride(0), partials.stride(0), partials.stride(1),
            n, V, D, first, tiles, softcap,
            GROUP_ROWS=GROUP_ROWS, RAGGED=ragged, ENTROPY=entropy, **launch_options(settings),
        )  # fmt: skip
    merge_tiles_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        partials, state, partials.stride(0), partials.stride(1), state.stride(0), n, len(partials),
        ENTROPY=entropy, ROWS=MERGE_ROWS, TILES=MERGE_TILES, num_warps=4, **EXACT,
    )  # fmt: skip
    return partials, state


def settle(
    e: Tensor, partials: Tensor, state: Tensor, codes: Tensor, temperature: Tensor | None, row_max: Tensor,
    logsum: Tensor, dlogp: Tensor, arch: int, bias: bool,
) -> Tensor:  # fmt: skip
    """Bring e [n, V] to where its rows times the factor [n] that is returned are ∂L/∂(hidden·weightᵀ)."""
    n, V = e.shape
    K, settings = len(partials), exponentials_settings(arch, bias=bias, softcap=False)
    factor = torch.empty_like(dlogp)
    settle_kernel[(triton.cdiv(n, MERGE_ROWS), triton.cdiv(K, MERGE_TILES))](
        e, partials, state, codes, temperature, row_max, logsum, dlogp, factor,
        e.stride(0), partials.stride(0), state.stride(0), n, V, K,
        ROWS=MERGE_ROWS, TILES=MERGE_TILES, BLOCK_V=settings.block_v, COLUMNS=min(settings.block_v, 64),
        num_warps=4, **EXACT,
    )  # fmt: skip
    return factor
