"""One way to measure everything: right first, then time, then memory.

A row's time counts only if, with every free byte of the allocator poisoned beforehand, results and gradients agree
with the fp64 oracle. Times are medians over runs that take turns with several batches; on CUDA events bracket each.
The head's weight, which no cache holds at the shapes of a GPU, is the same in all batches.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, make_inputs, make_weight, oracle, relative_error
from benchmarks.providers import Fn, Provider, Unavailable

# Gate, not accuracy: what is further from fp64 than this computes something else. ‖error‖/‖exact‖.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
BATCHES = 3
# Rows beyond this change no rate: a product is as efficient at 8192 tokens as at 32768.
MAX_ROWS = 8192

Status = Literal["ok", "skipped", "failed", "wrong", "out of memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A provider on a case. What was not measured is None or missing, and `reason` says why."""

    case: Case
    provider: str
    status: Status
    reason: str = ""
    ms: float | None = None  # median
    spread: float | None = None  # (max − min)/median
    runs: int = 0
    of_bare: float | None = None  # the time of the op's bare products over this one's, the median of runs in turn
    peak_bytes: int | None = None  # most that a call held at once beyond its inputs
    scratch_bytes: int | None = None  # the same less results and gradients
    errors: dict[str, float] = field(default_factory=dict)  # ‖error‖/‖exact‖ against fp64, by result

    @property
    def error(self) -> float | None:
        """The largest of the errors."""
        return max(self.errors.values()) if self.errors else None


@dataclass(frozen=True, slots=True)
class Effort:
    """How much time a row may take: runs for `milliseconds`, at least `least` and at most `most` of them."""

    milliseconds: float = 400
    least: int = 5
    most: int = 30


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes beyond what was held before."""

    peak: int
    scratch: int  # without what the call returned


def call(fn: Fn, case: Case, x: Inputs) -> dict[str, Tensor]:
    """Results and gradients of one run, by name."""
    trains = case.spec.trains
    if not trains:
        with torch.no_grad():
            return dict(zip(case.spec.results, fn(x), strict=True))
    leaves = [getattr(x, name) for name in trains]
    (out,) = fn(x)
    gradients = torch.autograd.grad(out, leaves, x.upstream.to(out.dtype) if out.ndim else None)
    return {case.spec.results[0]: out.detach(), **{f"d{n}": g for n, g in zip(trains, gradients, strict=True)}}


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Memory that is handed out within holds NaN until it is written, so that no unwritten output looks right."""
    if device.type == "cuda":
        _fill_free_blocks()
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills every torch.empty
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _fill_free_blocks() -> None:
    """All bits 1, a NaN in every float format, into each block that the caching allocator holds free."""
    torch.cuda.synchronize()
    segments = torch.cuda.memory_snapshot()
    sizes = [b["size"] for segment in segments for b in segment["blocks"] if b["state"] == "inactive"]
    held = []
    for size in sorted(sizes, reverse=True):
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda").fill_(255))
        except torch.OutOfMemoryError:
            continue  # a block of the pool for small requests, which a large one does not get
    del held


def peak_memory(fn: Callable[[], object], device: torch.device) -> Peak:
    """The allocator's own peak on CUDA; on a CPU the running sum of the allocations that the profiler reports."""
    gc.collect()  # what is freed meanwhile would count as scratch
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        kept = fn()
        torch.cuda.synchronize()
        peak, end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del kept
        return Peak(peak - start, peak - end)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = fn()
        # Taken while `kept` is alive; what it holds is not scratch.
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return Peak(peak, peak - held)


def milliseconds(fns: Sequence[Callable[[], object]], device: torch.device, effort: Effort) -> list[float]:
    """The time of each run after a warm-up; runs take turns among `fns`."""
    return [ms for ms, _ in paired_milliseconds(fns, lambda: None, device, effort)]


def paired_milliseconds(
    fns: Sequence[Callable[[], object]], other: Callable[[], object], device: torch.device, effort: Effort
) -> list[tuple[float, float]]:
    """The times of each run and of a run of `other` right before it, after a warm-up; runs take turns among `fns`.

    A card under load slows down by a tenth within seconds. Runs in turn see the same clocks.
    """
    for fn in (*fns, other):
        fn()
    begun = time.perf_counter()
    fns[0]()
    _synchronize(device)
    once = (time.perf_counter() - begun) * 1e3
    runs = min(max(math.ceil(effort.milliseconds / max(once, 1e-3)), effort.least), effort.most)
    event = partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else _HostEvent
    marks: list[Any] = [(event(), event(), event()) for _ in range(runs)]
    for i, (start, between, stop) in enumerate(marks):
        start.record()
        other()
        between.record()
        fns[i % len(fns)]()
        stop.record()
    _synchronize(device)
    return [(between.elapsed_time(stop), start.elapsed_time(between)) for start, between, stop in marks]


class _HostEvent:
    """What `torch.cuda.Event` is, of a host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "_HostEvent") -> float:
        return (later.at - self.at) * 1e3


def median_and_spread(times: list[float]) -> tuple[float, float]:
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_products(case: Case, x: Inputs) -> Callable[[], None]:
    """The GEMMs of the case's floor, results in the operands' dtype, on a real gradient of the logits.

    That is nearly all tiny numbers, which draw less power than dense ones. Of many tokens some at a time.
    """
    hidden, weight, N = x.hidden.detach(), x.weight.detach(), min(case.N, MAX_ROWS)
    hidden, rounds = hidden[:N], case.N // N
    logits, dlogits = hidden.new_empty(N, case.V), hidden.new_empty(N, case.V)
    for rows, out, target, share in zip(
        hidden.split(512), dlogits.split(512), x.targets[:N].split(512), x.upstream[:N].split(512), strict=True
    ):
        p = torch.softmax(rows.float() @ weight.t().float() if rows.is_cpu else (rows @ weight.t()).float(), 1)
        p[torch.arange(len(rows), device=rows.device), target] -= 1
        out.copy_(p * share[:, None])
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    operands = {
        "logits": (hidden, weight.t(), logits), "dhidden": (dlogits, weight, dhidden),
        "dweight": (dlogits.t(), hidden, dweight),
    }  # fmt: skip

    def run() -> None:
        for gemm in case.spec.gemms * rounds:
            a, b, out = operands[gemm]
            torch.mm(a, b, out=out)

    return run


class Bench:
    """The inputs and the oracle of one case, on which its providers are measured in turn."""

    def __init__(self, case: Case, device: torch.device, *, weight: Tensor | None = None) -> None:
        self.case, self.device = case, device
        weight = make_weight(case, device) if weight is None else weight
        self.batches = [make_inputs(case, weight, seed).trained(case.spec.trains) for seed in range(BATCHES)]
        self._exact: dict[str, Tensor] | None = None
        self._products: Callable[[], object] | None = None

    @property
    def exact(self) -> dict[str, Tensor]:
        if self._exact is None:
            self._exact = oracle(self.case, self.batches[0])
        return self._exact

    @property
    def products(self) -> Callable[[], object]:
        if self._products is None:
            self._products = bare_products(self.case, self.batches[0])
        return self._products

    def measure(self, provider: Provider, effort: Effort | None) -> Row:
        """One row; nothing that a provider does wrong escapes. Without `effort`, memory alone and no oracle."""
        try:
            return self._measure(provider, effort)
        except (Unavailable, ImportError) as error:
            return Row(case=self.case, provider=provider.name, status="skipped", reason=_line(error))
        except torch.OutOfMemoryError:
            return Row(case=self.case, provider=provider.name, status="out of memory", reason="out of memory")
        except Exception as error:
            reason = f"{type(error).__name__}: {_line(error)}"
            return Row(case=self.case, provider=provider.name, status="failed", reason=reason)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, provider: Provider, effort: Effort | None) -> Row:
        case, first = self.case, self.batches[0]
        exact = {} if effort is None else self.exact
        torch.compiler.reset()  # each shape compiles for itself, as in a training run; none becomes dynamic for another
        fn = provider.build(case, self.device)
        call(fn, case, first)  # compiles, and fills the allocator's pool with blocks of the right sizes
        errors = {}
        if effort is not None:
            with poisoned(self.device):
                got = call(fn, case, first)
            errors = {name: relative_error(got[name], want) for name, want in exact.items()}
            del got
            worst = max(errors, key=lambda name: errors[name])
            if not errors[worst] <= TOLERANCE[case.dtype]:
                finite = {name: error for name, error in errors.items() if math.isfinite(error)}
                reason = f"{worst} is off by {errors[worst]:.2g} of its norm"
                return Row(case=case, provider=provider.name, status="wrong", reason=reason, errors=finite)
        memory = peak_memory(partial(call, fn, case, first), self.device)
        row = Row(case=case, provider=provider.name, status="ok", peak_bytes=memory.peak, scratch_bytes=memory.scratch)
        if effort is None:
            return row
        runs = [partial(call, fn, case, x) for x in self.batches]
        times = paired_milliseconds(runs, self.products, self.device, effort)
        ms, spread = median_and_spread([mine for mine, _ in times])
        of_bare = statistics.median(bare / mine for mine, bare in times)
        return replace(row, ms=ms, spread=spread, runs=len(times), of_bare=of_bare, errors=errors)


def _line(error: BaseException) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:140]
