"""Which tiles strategy "fused" should have on this GPU: candidates timed, checked, and printed ready for `plan.py`.

The tables of `prime_kernels.plan` are data, read at every launch; a candidate is put in place of an entry while it is
measured. What is swept is the entry of the plain epilogue, the one that training uses.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.compile_report import SHARED_LIMIT
from benchmarks.harness import Effort, median_and_spread, milliseconds
from benchmarks.inputs import make_inputs, make_weight, relative_error
from prime_kernels import plan
from prime_kernels.calls import make_tiles
from prime_kernels.devices import device_arch
from prime_kernels.plan import GemmSettings
from prime_kernels.tiles import Head, RowGrads, Rows

SHARED_BYTES = SHARED_LIMIT[90]  # sm_100's, too
SLICE = 16384  # columns of the gradient's tile: [8192, SLICE] in 16 bits is 256 MiB
TOLERANCE = 0.02

# (block_n, block_v, block_d, num_warps, num_stages). All compile for sm_90 without a spilled register.
GRID = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    (64, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 256, 128, 8, 2), (128, 128, 128, 8, 3), (128, 128, 64, 8, 3),
    (64, 256, 64, 4, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4),
)  # fmt: skip
DRY_GRID = ((32, 128, 64, 4, 1), (16, 128, 64, 4, 1))


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate's time, or what became of it."""

    kernel: str
    settings: GemmSettings
    ms: float | None
    spread: float | None
    status: str

    def record(self) -> dict[str, object]:
        return {**asdict(self), "settings": literal(self.settings)}


def candidates(arch: int) -> list[GemmSettings]:
    """The settings in force first, then the grid: flattened, too, and specialised where that engages."""
    default = plan.of_architecture(plan.FUSED, arch)[0]
    found = [default]
    for n, v, d, warps, stages in DRY_GRID if arch == 0 else GRID:
        if (n + v) * d * 2 * stages + (n * v * 2 if default.tma else 0) > SHARED_BYTES:
            continue
        tile = GemmSettings(n, v, d, num_warps=warps, num_stages=stages, tma=default.tma)
        found.append(tile)
        if arch >= 90:
            found.append(replace(tile, flatten=True))
        if arch >= 100:  # it engages there with a flattened loop
            found.append(GemmSettings(n, v, d, warps, stages, default.tma, warp_specialize=True, flatten=True))
        elif arch == 90 and (n, v, warps) == (64, 128, 4):  # and here with a plain one; Triton fails on larger tiles
            found.append(GemmSettings(n, v, d, warps, stages, default.tma, warp_specialize=True))
    return list(dict.fromkeys(found))


@contextmanager
def in_place(arch: int, settings: GemmSettings) -> Iterator[None]:
    """Launches within take `settings` for the plain epilogue on `arch`."""
    with patch.dict(plan.FUSED, {arch: (settings, *plan.of_architecture(plan.FUSED, arch)[1:])}):
        yield


def literal(settings: GemmSettings) -> str:
    """As `plan.py` writes it."""
    s = settings
    numbers = f"{s.block_n}, {s.block_v}, {s.block_d}, num_warps={s.num_warps}, num_stages={s.num_stages}, tma={s.tma}"
    return f"GemmSettings({numbers}{', warp_specialize=True' * s.warp_specialize}{', flatten=True' * s.flatten})"


def sweep(case: Case, device: torch.device, *, effort: Effort, deadline: float) -> Iterator[Tried]:
    """Both kernels' candidates in turn, each against what strategy "chunked" answers; ends at `deadline`."""
    arch = device_arch(device)
    x = make_inputs(case, make_weight(case, device), seed=0)
    # Slices, since those are what the strategies get: on a CPU they are in the dtype that the interpreter multiplies.
    rows = Rows(hidden=x.hidden, codes=x.targets, temperature=None)[0 : case.N]
    head = Head(weight=x.weight, bias=None, softcap=None)[0 : case.V]
    columns = min(SLICE, case.V)
    fused, chunked = (make_tiles(strategy, x.hidden, entropy=False) for strategy in ("fused", "chunked"))
    stats = chunked.finish(chunked.row_stats(rows, head, columns), rows.codes)
    grads = RowGrads.of(rows.codes, stats, x.upstream, None)
    dlogits = chunked.dlogits(rows, head[0:columns], grads).clone()

    def run_stats() -> Tensor:
        return fused.finish(fused.row_stats(rows, head, columns), rows.codes).logp

    def run_dlogits() -> Tensor:
        return fused.dlogits(rows, head[0:columns], grads)

    kernels = (("exponentials", run_stats, stats.logp), ("fused_dlogits", run_dlogits, dlogits))
    for settings in candidates(arch):
        for name, run, want in kernels:
            if time.monotonic() > deadline:
                return
            with in_place(arch, settings):
                yield _try(name, settings, run, want, device, effort)


def _try(
    name: str, settings: GemmSettings, run: Callable[[], Tensor], want: Tensor, device: torch.device, effort: Effort
) -> Tried:
    try:
        error = relative_error(run(), want.double())
        if not error <= TOLERANCE:
            return Tried(name, settings, None, None, f"wrong: off by {error:.2g} of the norm")
        ms, spread = median_and_spread(milliseconds([run], device, effort))
    except Exception as error:
        return Tried(name, settings, None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    return Tried(name, settings, ms, spread, "ok")


def best(tried: list[Tried], arch: int) -> list[str]:
    """The assignment that puts the settings first by which the kernels together take least, for `plan.py`."""
    times: dict[GemmSettings, list[float]] = {}
    for t in tried:
        if t.ms is not None:
            times.setdefault(t.settings, []).append(t.ms)
    kernels = len({t.kernel for t in tried})
    total = {settings: sum(of) for settings, of in times.items() if len(of) == kernels}
    if not total:
        return []
    winner = min(total, key=lambda settings: total[settings])
    default = total.get(tried[0].settings)
    gain = f"{default / total[winner]:.3f}× the default" if default else "default failed"
    return [f"FUSED[{arch}][0]: {literal(winner)},  # {total[winner]:.3f} ms, {gain}"]
