"""What runs for which shape, dtype and architecture: strategies, tile sizes and kernel settings, as data.

Everything here is a pure function of numbers, so that a plan can be read, tested and reasoned about without a GPU.
N tokens, D hidden size, V vocabulary columns.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

import torch

Strategy = Literal["torch", "chunked", "fused"]

BACKENDS = ("auto", "triton", "torch", "chunked", "fused")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Where strategy "fused" has been measured beside "chunked", and won.
FUSED_ARCHITECTURES = (90,)

# Tiles of more tokens than this gain nothing: a GEMM is compute-bound long before, and the rows of a tile are
# the depth (K) of the weight-gradient GEMM, whose fp32 read-modify-write then costs under 5% of its time.
MAX_TILE_ROWS = 8192
# Fewer columns than this starve a GEMM of parallelism, so the tokens of a tile are halved first.
GOOD_TILE_COLS = 2048
MIN_TILE_ROWS, MIN_TILE_COLS = 16, 16
# Numbers that a loss has of each token where its epilogue sees all tokens together: PPO's with all of its options.
LOSS_NUMBERS = 24


def choose_strategy(
    backend: str, *, arch: int, dtype: torch.dtype, triton: bool = True, aligned: bool = True
) -> Strategy:
    """The strategy that serves `backend` for inputs of `dtype` on compute capability `arch` (90 is sm_90, 0 a CPU).

    | backend   | runs                                                                            |
    |-----------|---------------------------------------------------------------------------------|
    | "auto"    | "triton" on NVIDIA GPUs from sm_80 on, for dtypes it takes; "torch" elsewhere   |
    | "triton"  | "fused" for 16-bit numbers on sm_90, where it was measured to be the faster     |
    |           | one for every op and head; "chunked" elsewhere                                  |
    | "chunked" | cuBLAS for the GEMMs, Triton for everything per logit                           |
    | "fused"   | Triton GEMMs whose epilogue consumes the logits; bf16 and fp16 only; "chunked"  |
    |           | where rows of the operands are not aligned                                      |
    | "torch"   | plain torch in the same tiles                                                   |

    Args:
        triton: Triton is installed.
        aligned: rows of hidden and weight lie in one piece each and start at multiples of 16 bytes, so that a fused
            GEMM can read them asynchronously. Without that it would wait for every load, and spill.

    Raises:
        ValueError: the backend is unknown, or cannot run this dtype.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "auto":
        backend = "triton" if triton and arch >= 80 and dtype in TRITON_DTYPES else "torch"
    if backend == "torch":
        return "torch"
    if not triton:
        raise ValueError(f"backend={backend!r} needs Triton, which is not installed; use backend='torch'")
    if 0 < arch < 80:
        raise ValueError(f"backend={backend!r} needs a GPU of sm_80 or newer, got sm_{arch}; use backend='torch'")
    if backend == "fused":
        if dtype not in HALF_DTYPES:
            raise ValueError(f"backend='fused' takes hidden of bfloat16 or float16, got {dtype}; use 'chunked'")
        return "fused" if aligned else "chunked"
    if dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend={backend!r} takes hidden of float32, bfloat16 or float16, got {dtype}; use backend='torch'"
        )
    fused = backend == "triton" and aligned and dtype in HALF_DTYPES and arch in FUSED_ARCHITECTURES
    return "fused" if fused else "chunked"


def one_pass_strategy(
    strategy: Strategy, *, dtype: torch.dtype, softcap: float | None, entropy_gradient: bool
) -> Strategy:  # fmt: skip
    """The strategy that computes a loss and its gradients in one pass, where `strategy` was chosen.

    "fused" keeps exponentials of logits, which fp16 cannot hold and which do not tell a softcap's slope, nor log p
    exactly enough for the gradient of an entropy. There "chunked" keeps the logits themselves.
    """
    if strategy == "fused" and (dtype is not torch.bfloat16 or softcap is not None or entropy_gradient):
        return "chunked"
    return strategy


@dataclass(frozen=True, slots=True)
class Tiling:
    """The grid of [rows, cols] tiles in which the logits are visited, and what stays in memory meanwhile."""

    rows: int  # tokens in a tile
    cols: int  # vocabulary columns in a tile
    resident: int  # leading tokens whose fp32 dX is held for a whole sweep over the vocabulary


def plan_tiling(
    N: int, D: int, V: int, *, workspace: int, bytes_per_logit: float, half: bool, copies: bool, itemsize: int = 4,
    per_token: int = 6,
) -> Tiling:  # fmt: skip
    """Tiles for a call on [N, D] hidden states and [V, D] weights that keep scratch memory within `workspace` bytes.

    The same grid serves forward and backward, so that both see the same logits. Counted are, at the worst moment,

        rows·cols·bytes_per_logit                          the tile's logits and what is derived from them
      + max(resident, rows)·D·b    if half                 accumulator of dX
      + cols·D·b                   if half and (rows < N or copies)   accumulator of a slice of dW
      + (rows + cols)·D·b          if copies               copies of the tile's operands
      + rows·D·b                   if not half             hidden states without those that do not count
      + (rows·28 + cols·2 + N·per_token)·b                 row statistics, bias gradient, what a token has

    With `half` (gradients of bf16 or fp16) the output cannot serve as its own accumulator. At most half the workspace
    holds resident dX; each token beyond pays one more recomputation of its logits, 2·D·V FLOP. Only `cols` depends
    on V, so ranks that hold unequal parts of a vocabulary visit the same blocks of tokens.

    Args:
        bytes_per_logit: scratch bytes that the strategy takes for each logit of a tile.
        half: gradients are of a 16-bit dtype.
        copies: a tile's operands are copied first: 16-bit ones to fp32 on a CPU, or for their strides.
        itemsize: b, bytes of a number that is not of 16 bits: 4, or 8 for fp64.
        per_token: numbers of each token, whichever tile it is in.

    Raises:
        ValueError: not even the smallest tile fits.
    """
    limit = MAX_TILE_ROWS
    while True:
        rows = _even_share(N, limit, multiple=128)
        resident = N
        if half:
            fits = workspace // 2 // (itemsize * max(D, 1))
            resident = N if fits >= N else fits // rows * rows
        fixed = itemsize * (28 * rows + per_token * N)
        fixed += itemsize * D * (max(resident, rows) if half else rows)
        fixed += itemsize * D * rows if copies else 0
        per_col = rows * bytes_per_logit + 2 * itemsize
        per_col += itemsize * D * (int(half and (rows < N or copies)) + int(copies))
        cols = int((workspace - fixed) // per_col)
        if cols >= GOOD_TILE_COLS or rows <= MIN_TILE_ROWS:
            break
        limit = max(rows // 2, MIN_TILE_ROWS)
    if cols < MIN_TILE_COLS:
        raise ValueError(
            f"a workspace of {workspace} bytes is too small for {N} tokens of hidden size {D}: "
            f"set_workspace needs at least {2 * (fixed + MIN_TILE_COLS * ceil(per_col))} bytes"
        )
    return Tiling(rows=rows, cols=_even_share(V, cols, multiple=256), resident=resident)


def _even_share(total: int, limit: int, *, multiple: int) -> int:
    """The size of near-equal pieces of `total`, none above `limit`, a multiple of `multiple` where that fits."""
    if total <= limit:
        return total
    share = ceil(total / ceil(total / limit))
    rounded = ceil(share / multiple) * multiple
    if rounded <= limit:
        return rounded
    return max(limit // multiple * multiple, min(limit, multiple))


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) ranges of at most `size` that cover range(total)."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


@dataclass(frozen=True, slots=True)
class RowSettings:
    """Launch settings of a kernel that walks along rows of logits."""

    block_v: int
    num_warps: int


# Memory-bound: 16 fp32 logits a thread keep enough 16-byte loads in flight, several programs share an SM.
ROW_STATS = RowSettings(block_v=2048, num_warps=4)
ROW_DLOGITS = RowSettings(block_v=2048, num_warps=4)
# A softcap's arithmetic wants the registers instead.
CAPPED_ROWS = RowSettings(block_v=1024, num_warps=4)
FINISH_BLOCK_N = 128


@dataclass(frozen=True, slots=True)
class GemmSettings:
    """Launch settings of a Triton GEMM with an epilogue on its logits."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool
    warp_specialize: bool = False
    flatten: bool = False


# By architecture, then by the weight of the epilogue, which shares the register file with the tile's accumulator: bare,
# bias or temperature; the gradient of an entropy; softcap. Chosen by compilation, the largest tile with the
# architecture's matrix instruction and no spilled register; on sm_90 by time, too: a flattened loop and results through
# TMA bring a tile of 128×256 within a few per cent of a bare GEMM, and no smaller tile comes near it.
# Entry 0 is the interpreter, where every tile costs the same Python time. Read at every launch: `benchmarks.tiles` puts
# candidates in place of an entry while it measures them.
FUSED: dict[int, tuple[GemmSettings, ...]] = {
    0: (
        GemmSettings(32, 1024, 64, num_warps=4, num_stages=1, tma=True),
        GemmSettings(32, 512, 64, num_warps=4, num_stages=1, tma=True),
        GemmSettings(32, 64, 64, num_warps=4, num_stages=1, tma=True),
    ),
    80: (
        GemmSettings(128, 128, 32, num_warps=8, num_stages=4, tma=False),
        GemmSettings(128, 128, 32, num_warps=8, num_stages=4, tma=False),
        GemmSettings(128, 64, 32, num_warps=8, num_stages=4, tma=False),
    ),
    90: (
        GemmSettings(128, 256, 64, num_warps=8, num_stages=3, tma=True, flatten=True),
        GemmSettings(128, 128, 64, num_warps=8, num_stages=4, tma=True, flatten=True),
        GemmSettings(128, 64, 64, num_warps=8, num_stages=4, tma=True, flatten=True),
    ),
    100: (
        GemmSettings(128, 256, 64, num_warps=8, num_stages=3, tma=True, warp_specialize=True, flatten=True),
        GemmSettings(128, 128, 64, num_warps=8, num_stages=4, tma=True, warp_specialize=True, flatten=True),
        GemmSettings(128, 64, 64, num_warps=8, num_stages=4, tma=True, flatten=True),
    ),
}


def of_architecture(table: dict[int, tuple[GemmSettings, ...]], arch: int) -> tuple[GemmSettings, ...]:
    """The entry of the newest architecture that is not newer than `arch`.

    sm_120 has neither sm_100's matrix instruction nor its shared memory: 99 KiB, in which sm_80's settings fit.
    """
    arch = 80 if arch >= 120 else arch
    return table[max(capability for capability in table if capability <= arch)]


def dlogits_settings(arch: int, *, entropy: bool, softcap: bool) -> GemmSettings:
    """Settings of `fused_dlogits` on compute capability `arch`."""
    return of_architecture(FUSED, arch)[2 if softcap else int(entropy)]


def exponentials_settings(arch: int, *, bias: bool, softcap: bool) -> GemmSettings:
    """Settings of `exponentials` on compute capability `arch`.

    On sm_100 the next smaller tile, as the largest one's epilogue has registers for a gradient alone.
    """
    smaller = 100 <= arch < 120
    return of_architecture(FUSED, arch)[2 if softcap or (bias and smaller) else int(smaller)]


@dataclass(frozen=True, slots=True)
class OnePass:
    """How a loss and its gradients are computed together."""

    rows: int  # tokens in a chunk, over the whole vocabulary
    cols: int  # columns in one product
    passes: int  # 1: each chunk's logits are kept until its gradient; 2: statistics first, logits again for gradients


def plan_one_pass(
    N: int, D: int, V: int, *, workspace: int, bytes_per_logit: float, copies: bool, need_dw: bool, flop_per_byte: int,
    need_dh: bool = True, itemsize: int = 4, processors: int = 1,
) -> OnePass:  # fmt: skip
    """Chunks of tokens × the whole vocabulary within `workspace`, and whether keeping their logits pays.

    Held at the worst moment are rows·V·bytes_per_logit for logits, (rows·28 + N·12)·b for results, with `copies`
    (16-bit inputs on a CPU, or odd strides) copies of (2·rows + cols)·D·b, and without a gradient of the hidden states,
    whose memory otherwise serves, rows·D·b for those that count; b is `itemsize`, 4 bytes or 8 for fp64. Gradients,
    (N + V)·D·b bytes until backward, are no scratch.

    Estimated cost, in bytes moved: one pass computes 6·N·D·V FLOP and adds each chunk to the gradient of the weight,
    2·V·D·b bytes a chunk; two passes compute 8·N·D·V FLOP and finish the gradient slice by slice. So chunks are
    large, and one pass pays above 4·flop_per_byte tokens a chunk (736 on an H200). Their product dX [rows, D] is shared
    out among `processors` in tiles: where fewer tokens than fit leave fewer of them idle in the last round, chunks have
    those, half of what fits at the least.
    """
    cols = min(V, GOOD_TILE_COLS) if copies else V
    free = workspace - itemsize * (12 * N + (D * cols if copies else 0))
    spare = 2 * D if copies else D if need_dw and not need_dh else 0
    limit = int(free // (V * bytes_per_logit + 32 * bytes_per_logit + itemsize * (28 + spare)))
    if limit < 1:
        return OnePass(rows=0, cols=cols, passes=2)
    traffic = 2 * V * D * itemsize * flop_per_byte if need_dw else 0
    rows = _chunk_rows(N, limit, D, processors if need_dh else 1, traffic / (2 * V))
    chunks = ceil(N / rows)
    one = 6 * N * D * V / flop_per_byte + (2 * V * D * itemsize * chunks if need_dw and chunks > 1 else 0)
    two = 8 * N * D * V / flop_per_byte
    return OnePass(rows=rows, cols=cols, passes=1 if one <= two else 2)


# Rows and columns of cuBLAS's tiles on an H100, as profiles name them, and the share of the peak that they reach.
PRODUCT_TILES = ((128, 256, 1.0), (256, 128, 1.0), (320, 128, 0.95), (192, 192, 1.0), (128, 192, 0.93))


@lru_cache(maxsize=4096)
def _chunk_rows(N: int, limit: int, D: int, processors: int, extra: float) -> int:
    """Tokens a chunk, at most `limit`, with which the products [tokens, D] of N tokens take least.

    A product takes as many rounds as it has tiles for each processor; `extra`, in numbers of the result, is what a
    chunk takes beside it, with a sixteenth of a round for what is launched. At most twice as many chunks as must be are
    tried, in about thirty steps.
    """
    if limit >= N or limit < 128:
        return _even_share(N, limit, multiple=128)

    def product(rows: int) -> float:
        return min(
            ceil(ceil(rows / n) * ceil(D / d) / processors) * processors * n * d / peak for n, d, peak in PRODUCT_TILES
        )  # fmt: skip

    def cost(rows: int) -> tuple[float, int, int]:
        whole, rest = divmod(N, rows)
        chunks = whole + (rest > 0)
        return whole * product(rows) + (product(rest) if rest else 0) + chunks * each, chunks, rows

    each = extra + processors * 128 * 256 / 16
    step = max(limit // 8192 * 128, 128)
    return min(range(limit // step * step, limit // 2, -step), key=cost)


def exponentials_fit(N: int, D: int, V: int, *, itemsize: int, workspace: int) -> bool:
    """Whether a loss keeps the exponentials of all its logits until backward.

    They take N·V·itemsize bytes, with their tiles' statistics at most an eighth of a byte each, and backward 6·N·D more
    for the rows of its products. Without them it would be 4·V·D for the weight's gradient in fp32, and the workspace.
    """
    return N > 0 and N * V * (itemsize + 1 / 8) + 6 * N * D <= 4 * V * D + workspace


def keeps_logp_gradient(
    N: int, D: int, *, frozen: bool, entropy: bool, workspace: int, itemsize: int = 4
) -> bool:  # fmt: skip
    """Whether the forward of a per-token op computes ∂logp/∂hidden and keeps it, [N, D] in fp32 (fp64), for backward.

    With weight and bias frozen that is 4·N·D·V FLOP in all instead of 6: backward is a row scale. It pays where that
    memory is no larger than the workspace; not for the entropy, which would need a second product.
    """
    return frozen and not entropy and 0 < itemsize * N * D <= workspace
