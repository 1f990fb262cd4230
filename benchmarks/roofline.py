"""How far a time is from what the hardware allows.

Two floors for a case: its GEMMs at the rates that bare products of the same shape reach in the same run, and its least
bytes at the rate of a large copy. The larger of them is the floor. A row's own `of_bare` is of products that
ran in turn with it, and the better measure of them.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.cases import Case, Gemm
from benchmarks.harness import MAX_ROWS, Effort, median_and_spread, milliseconds


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates of the device."""

    copy_bytes_per_s: float  # bytes read and bytes written both count
    gemm_flops_per_s: dict[str, float] = field(default_factory=dict)  # by `gemm_key`


@dataclass(frozen=True, slots=True)
class Floors:
    """The least time of a case, in ms, if arithmetic or if memory were all."""

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)


def gemm_key(case: Case, gemm: Gemm) -> str:
    return f"{gemm} {min(case.N, MAX_ROWS)}x{case.D}x{case.V} {case.dtype}"


def floors(case: Case, ceilings: Ceilings | None) -> Floors | None:
    """The floors of a case; None where its GEMMs were not measured."""
    if ceilings is None or any(gemm_key(case, g) not in ceilings.gemm_flops_per_s for g in case.spec.gemms):
        return None
    product = 2 * case.N * case.D * case.V
    compute = sum(product / ceilings.gemm_flops_per_s[gemm_key(case, g)] for g in case.spec.gemms)
    return Floors(compute * 1e3, case.bytes / ceilings.copy_bytes_per_s * 1e3)


def measure_copy(device: torch.device, nbytes: int) -> float:
    """Bytes read and written per second by a copy of `nbytes`."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    ms, _ = median_and_spread(milliseconds([partial(target.copy_, source)], device, Effort()))
    return 2 * nbytes / ms * 1e3


def measure_gemms(case: Case, device: torch.device, effort: Effort) -> dict[str, float]:
    """FLOP/s of the three products of a case, operands random and results in the operands' dtype."""
    N, D, V = min(case.N, MAX_ROWS), case.D, case.V
    make = partial(torch.randn, dtype=case.torch_dtype, device=device)
    hidden, weight = make(N, D), make(V, D)
    rates: dict[str, float] = {}

    def time(gemm: Gemm, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = a.new_empty(a.shape[0], b.shape[1])
        ms, _ = median_and_spread(milliseconds([partial(torch.mm, a, b, out=out)], device, effort))
        rates[gemm_key(case, gemm)] = 2 * N * D * V / ms * 1e3
        return out

    logits = time("logits", hidden, weight.T)
    time("dhidden", logits, weight)
    time("dweight", logits.T, hidden)
    return rates


def measure_ceilings(cases: tuple[Case, ...], device: torch.device, *, copy_bytes: int, effort: Effort) -> Ceilings:
    """A large copy, and the GEMMs of every shape among the cases, measured once each."""
    rates: dict[str, float] = {}
    for case in cases:
        if gemm_key(case, "logits") not in rates:
            rates |= measure_gemms(case, device, effort)
    return Ceilings(measure_copy(device, copy_bytes), rates)
