"""Gradients times what is known of them last, and rounded once.

1. `scale`       times a number on the device; in place it reads nothing more where that is 1
2. `scale_rows`  times a factor of each row
"""

import triton
import triton.language as tl
from torch import Tensor

SCALE_BLOCK, SCALE_COLUMNS = 4096, 1024
# Eight a processor of the largest GPUs keep its memory busy; a factor of 1 is read by no more.
SCALE_PROGRAMS = 1056


@triton.jit
def scale_kernel(x_ptr, factor_ptr, out_ptr, numel, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if (not IN_PLACE) | (factor != 1.0):
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, numel, step):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, mask=offs < numel, other=0.0)
            tl.store(out_ptr + offs, (x * factor).to(out_ptr.dtype.element_ty), mask=offs < numel)


@triton.jit
def scale_rows_kernel(
    x_ptr, factor_ptr, upstream_ptr, out_ptr, stride_x, stride_out, D, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    dead = factor == 0.0
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr)
    for start in range(0, D, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + offs, mask=offs < D, other=0.0).to(tl.float32)
        y = tl.where(dead, 0.0, x * factor)
        tl.store(out_ptr + row * stride_out + offs, y.to(out_ptr.dtype.element_ty), mask=offs < D)


def scale(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = x·factor, rounded once; x is contiguous fp32, factor a number on the device, and out may be x."""
    if x.numel():
        programs = min(triton.cdiv(x.numel(), SCALE_BLOCK), SCALE_PROGRAMS)
        scale_kernel[(programs,)](
            x, factor, out, x.numel(), IN_PLACE=out.data_ptr() == x.data_ptr(), BLOCK=SCALE_BLOCK, num_warps=4
        )


def scale_rows(x: Tensor, factor: Tensor, out: Tensor, upstream: Tensor | None = None) -> Tensor:
    """out = x·factor·upstream, rounded once: x [n, D], of rows in one piece each, a factor of each row [n], a number.

    A row whose factor is 0 is 0, whatever it holds. `out` may be x.
    """
    n, D = x.shape
    if n:
        block = min(max(triton.next_power_of_2(D), 1), SCALE_COLUMNS)
        scale_rows_kernel[(n,)](
            x, factor, upstream, out, x.stride(0), out.stride(0), D, BLOCK=block, num_warps=4
        )  # fmt: skip
    return out
