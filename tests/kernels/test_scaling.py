"""Gradients times a number or a factor of each row: any size, any row, one rounding."""

import pytest
import torch

from prime_kernels.kernels import scaling
from tests.support.oracle import RUNS

DEVICES = [pytest.param(run.values[0], marks=run.marks) for run in RUNS if run.values[1] == "fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 4096, 4097, 40_000])
def test_a_few_programs_scale_any_number_of_numbers(dtype, numel, monkeypatch):
    monkeypatch.setattr(scaling, "SCALE_PROGRAMS", 3)
    x = torch.randn(numel)
    for factor in (1.0, 1 / 3, -40.0):
        out = x.clone() if dtype == torch.float32 else torch.empty(numel, dtype=dtype)
        scaling.scale(out if dtype == torch.float32 else x, torch.tensor(factor), out)
        # The interpreter cuts bf16 off where a GPU rounds.
        torch.testing.assert_close(out.float(), x * factor, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "D"), [(0, 8), (5, 1), (3, 1000), (2, 2056)])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_scaled_and_rounded_once_into_memory_of_any_stride(device, n, D, dtype):
    g = torch.Generator().manual_seed(n + D)
    x = torch.randn(n, 2 * D, generator=g).to(device)[:, :D]
    factor, upstream = torch.randn(n, generator=g).to(device), torch.tensor(1 / 3, device=device)
    out = torch.full((n, 3 * D), 7.0, device=device, dtype=dtype)
    assert scaling.scale_rows(x, factor, out[:, :D], upstream).data_ptr() == out.data_ptr()
    # The interpreter cuts bf16 off where a GPU rounds.
    eps = torch.finfo(dtype).eps if device == "cpu" and dtype != torch.float32 else 0
    exact = (x * (factor * upstream)[:, None]).to(dtype).float()
    torch.testing.assert_close(out[:, :D].float(), exact, rtol=eps, atol=0)
    assert out[:, D:].eq(7).all()
    in_place = x.clone()
    assert scaling.scale_rows(in_place, factor, in_place).equal(x * factor[:, None])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_whose_factor_is_0_is_0_whatever_it_holds(device):
    x = torch.tensor([[1.0, torch.nan], [torch.inf, -torch.inf], [2.0, 3.0]], device=device)
    found = scaling.scale_rows(x, torch.tensor([0.0, 0.0, 2.0], device=device), torch.empty_like(x))
    assert found.tolist() == [[0, 0], [0, 0], [4, 6]]
