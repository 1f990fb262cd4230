"""The parts of a GPU run, most important first. Each runs in a process of its own and hands over JSON lines.

A section stops by itself when its seconds are over; what it has handed over by then counts. The process that started it
ends it if it does not, and merges what all of them found.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import cases, scratch, tiles
from benchmarks.environment import ROOT, describe
from benchmarks.harness import Bench, Effort
from benchmarks.providers import providers_of
from benchmarks.roofline import measure_ceilings
from prime_kernels.devices import device_arch

# Folders outside of which no test wants a GPU: what is not collected takes no time.
WITH_GPU_TESTS = ("tests/kernels", "tests/benchmarks")


@dataclass(frozen=True, slots=True)
class Context:
    """What a section is given."""

    device: torch.device
    dry: bool  # tiny shapes, on a CPU with the kernels interpreted
    deadline: float  # time.monotonic()
    out: TextIO
    begun: frozenset[tuple[cases.Case, str]] = frozenset()  # rows of an earlier attempt, which one of them ended

    @property
    def effort(self) -> Effort:
        return Effort(0, 2, 2) if self.dry else Effort(250, 5, 20)

    def emit(self, kind: str, content: Any) -> None:
        """Hand a finding over; it is on disk when this returns."""
        self.out.write("\n" + json.dumps({"kind": kind, "content": content}) + "\n")
        self.out.flush()

    def over(self) -> bool:
        return time.monotonic() > self.deadline


def ceilings(context: Context) -> None:
    """A large copy, and the GEMMs of every shape."""
    wanted = (*cases.GPU_MAIN, *cases.GPU_HEADS, *cases.GPU_TOKENS)
    if context.dry:
        wanted = (*cases.DRY_MAIN, *cases.DRY_TOKENS)
    copy_bytes = 1 << 20 if context.dry else 1 << 32
    found = measure_ceilings(wanted, context.device, copy_bytes=copy_bytes, effort=context.effort)
    context.emit("ceilings", asdict(found))
    print(f"copy {found.copy_bytes_per_s / 1e9:.0f} GB/s")
    for key, rate in found.gemm_flops_per_s.items():
        print(f"{key}: {rate / 1e12:.3g} TFLOP/s")


def tests(context: Context) -> None:
    """The tests that need a GPU, in parallel where the machine has the processors and pytest the plugin."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rf", "-p", "no:cacheprovider", *WITH_GPU_TESTS]
    processors = len(os.sched_getaffinity(0))
    if processors >= 8 and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(processors - 2, 12)), "--dist", "worksteal"]
    environment = os.environ if context.dry else {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    last = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    context.emit("summary", last)
    if running.returncode not in (0, 5):  # 5: no test was selected
        sys.exit(f"pytest ended with {running.returncode}")


def _measure(context: Context, kind: str, wanted: Iterable[cases.Case], names: tuple[str, ...] | None = None) -> None:
    """Every provider on every case until time is up; each row is announced, so that one that kills is not met again."""
    effort = None if kind == "memory" else context.effort
    left = 0
    for case in wanted:
        chosen = [p for p in providers_of(case, names) if (case, p.name) not in context.begun]
        if not chosen:
            continue
        if context.over():
            left += 1
            continue
        try:
            bench = Bench(case, context.device)
            if effort is not None:
                _ = bench.exact
        except torch.OutOfMemoryError:
            print(f"{case}: no memory for the oracle")
            left += 1
            continue
        for provider in chosen:
            if context.over():
                left += 1
                break
            context.emit("begin", {"kind": kind, "case": asdict(case), "provider": provider.name})
            row = bench.measure(provider, effort)
            context.emit(kind, asdict(row))
            found = f" {row.ms:.2f} ms" if row.ms is not None else f" {row.reason}"
            print(f"{case} {provider.name}: {row.status}{found}", flush=True)
            if row.status == "failed" and context.device.type == "cuda":
                torch.cuda.synchronize()  # a lost context ends this process here, and not every row that follows
        del bench
    context.emit("summary", f"{left} cases were not reached" if left else "all cases")


def main_cases(context: Context) -> None:
    """Every op at the main shape, by everybody."""
    _measure(context, "row", cases.DRY_MAIN if context.dry else cases.GPU_MAIN)


def heads(context: Context) -> None:
    """The heads of real models."""
    if context.dry:
        _measure(context, "row", cases.DRY_TOKENS[:1], ("ours-chunked", "eager", "trl"))
    else:
        _measure(context, "row", cases.GPU_HEADS, cases.SWEEP_PROVIDERS)


def tokens(context: Context) -> None:
    """Time against N."""
    names = ("ours-torch", "eager") if context.dry else cases.SWEEP_PROVIDERS
    _measure(context, "row", cases.DRY_TOKENS if context.dry else cases.GPU_TOKENS, names)


def memory(context: Context) -> None:
    """Our scratch memory against its bound, which is promised; then everybody's peak against V and N."""
    exceeded = _scratch(context)
    names = ("ours-torch", "eager") if context.dry else cases.SWEEP_PROVIDERS
    _measure(context, "memory", cases.DRY_MEMORY if context.dry else cases.GPU_MEMORY, names)
    if exceeded:
        context.emit("summary", f"{', '.join(exceeded)} EXCEEDED its workspace")


def _scratch(context: Context) -> list[str]:
    """Measures it; names what took more than it may."""
    exceeded: list[str] = []
    shapes = cases.DRY_SCRATCH_SHAPES if context.dry else cases.GPU_SCRATCH_SHAPES
    for N, D, V in shapes:
        for op in ("logprob", "ppo"):
            for backend in ("torch",) if context.dry else ("chunked", "fused", "torch"):
                if context.over():
                    return exceeded
                found = scratch.measure(
                    N, D, V, dtype=torch.bfloat16, device=context.device.type, backend=backend, op=op
                )
                context.emit("scratch", asdict(found))
                print(f"{found}: {'held' if found.bounded else 'EXCEEDED'}", flush=True)
                if not found.bounded:
                    exceeded.append(f"{found.backend} {found.op}")
    return exceeded


def settings(context: Context) -> None:
    """Tiles of strategy "fused"."""
    case = cases.DRY_MAIN[0] if context.dry else cases.GPU_MAIN[0]
    arch = device_arch(context.device)
    tried = []
    for candidate in tiles.sweep(case, context.device, effort=context.effort, deadline=context.deadline):
        tried.append(candidate)
        context.emit("settings", candidate.record())
        print(candidate, flush=True)
    lines = tiles.best(tried, arch)
    print("\n".join(["", "For prime_kernels/plan.py:", *lines]))
    for line in lines:
        context.emit("best", line)


def training_step(context: Context) -> None:
    """PRIME steps of a small model with random weights, by stage: `benchmarks.prime_step`."""
    small = ("--model", "qwen2.5-0.5b", "--prompts", "32", "--max-tokens", "256", "--steps", "3")
    with tempfile.TemporaryDirectory() as folder:
        minutes = (context.deadline - time.monotonic()) / 60
        command = [sys.executable, "-m", "benchmarks.prime_step", "--out", folder, "--minutes", f"{minutes:.2f}"]
        subprocess.run([*command, *(["--dry"] if context.dry else small)], cwd=ROOT, check=True)
        context.emit("stages", json.loads((Path(folder) / "prime_step.json").read_text()))


@dataclass(frozen=True, slots=True)
class Part:
    """A section, and its share of the run's time; what earlier ones leave over is shared out to later ones."""

    run: Callable[[Context], None]
    share: float


SECTIONS = {
    "ceilings": Part(ceilings, 0.08),
    "tests": Part(tests, 0.16),
    "main": Part(main_cases, 0.32),
    "heads": Part(heads, 0.13),
    "tokens": Part(tokens, 0.10),
    "memory": Part(memory, 0.05),
    "settings": Part(settings, 0.08),
    "step": Part(training_step, 0.08),
}


def run_section(name: str, *, dry: bool, seconds: float, out: Path) -> None:
    """Inside a section's own process; goes on after what an earlier attempt began."""
    device = torch.device("cpu" if dry else "cuda")
    begun = frozenset((cases.Case(**e["case"]), e["provider"]) for kind, e in findings(out) if kind == "begin")
    with out.open("a") as file:
        context = Context(device, dry, time.monotonic() + seconds, file, begun)
        context.emit("environment", describe(device))
        SECTIONS[name].run(context)


def findings(path: Path) -> list[tuple[str, Any]]:
    """What a section handed over; a line that was cut off is none."""
    found = []
    for line in path.read_text().split("\n") if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append((entry["kind"], entry["content"]))
    return found


def rows_begun(path: Path) -> int:
    return sum(kind == "begin" for kind, _ in findings(path))
