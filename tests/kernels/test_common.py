"""The elementary functions that the kernels share, against fp64."""

import pytest
import torch
import triton
import triton.language as tl

from prime_kernels.constants import FLOOR
from prime_kernels.kernels.common import log1p, merge, tanh_and_slope

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK = 1024


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, slope_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, slope = tanh_and_slope(tl.load(x_ptr + offs))
    tl.store(y_ptr + offs, y)
    tl.store(slope_ptr + offs, slope)


@triton.jit
def _log1p_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, log1p(tl.load(x_ptr + offs)))


@triton.jit
def _merge_kernel(parts_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    m, s, u = merge(
        tl.load(parts_ptr + offs), tl.load(parts_ptr + N + offs), tl.load(parts_ptr + 2 * N + offs),
        tl.load(parts_ptr + 3 * N + offs), tl.load(parts_ptr + 4 * N + offs), tl.load(parts_ptr + 5 * N + offs),
    )  # fmt: skip
    tl.store(out_ptr + offs, m)
    tl.store(out_ptr + N + offs, s)
    tl.store(out_ptr + 2 * N + offs, u)


@pytest.mark.parametrize("device", DEVICES)
def test_tanh_and_its_slope_are_exact_to_a_few_ulp(device):
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.logspace(-20, 0, 4096), torch.linspace(-0.7, 0.7, 2048)])
    x = x.to(device)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _tanh_kernel[(len(x) // BLOCK,)](x, y, slope, BLOCK=BLOCK)
    want = x.double().tanh()
    want_slope = x.double().cosh() ** -2
    assert ((y.double() - want).abs() <= 2**-22 * want.abs()).all()
    # A slope is e^{−2|x|} and smaller: the exponent's rounding, 2⁻²⁴·2|x|·log₂e, is its relative error.
    assert ((slope.double() - want_slope).abs() <= 2**-18 * want_slope).all()


@pytest.mark.parametrize("device", DEVICES)
def test_log1p_is_exact_to_a_few_ulp_from_the_smallest_number_to_the_largest(device):
    x = torch.cat([torch.zeros(1), torch.logspace(-37, 38, 3 * BLOCK - 2), torch.full((1,), torch.inf)]).to(device)
    y = torch.empty_like(x)
    _log1p_kernel[(len(x) // BLOCK,)](x, y, BLOCK=BLOCK)
    want = x.double().log1p()
    assert y[-1] == torch.inf
    assert ((y[:-1].double() - want[:-1]).abs() <= 2**-21 * want[:-1].abs()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_merging_with_the_statistics_of_nothing_changes_nothing(device):
    some = torch.stack([torch.linspace(-1e4, 1e4, 16), torch.linspace(1, 9, 16), torch.linspace(-7, 0, 16)])
    nothing = torch.stack([torch.full((16,), FLOOR), torch.zeros(16), torch.zeros(16)])
    for parts in (torch.cat([some, nothing]), torch.cat([nothing, some])):
        out = torch.empty(3, 16, device=device)
        _merge_kernel[(1,)](parts.to(device), out, N=16)
        assert torch.equal(out.cpu(), some)
