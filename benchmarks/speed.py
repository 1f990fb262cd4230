"""`linear_logprob` against bare GEMMs of its shape, timed in the same run.

    python -m benchmarks.speed [--device cuda] [--shape N D V] [--json FILE]

The unit is one GEMM [N, D]×[D, V] with its own result dtype: forward needs one, forward with backward four (8NDV FLOP).
Each figure is the median of repeats, each repeat after one warm-up, and the ratio is to the GEMM timed around it.
Results are checked against fp64 before their time counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from prime_kernels import linear_logprob, reference

CPU_SHAPES = [(1024, 256, 8192)]
CUDA_SHAPES = [(8192, 4096, 131072), (8192, 3584, 152064), (8192, 1536, 151936), (8192, 896, 151936)]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds, median of repeats, and the ratio to the GEMMs that the FLOPs amount to."""

    what: str
    N: int
    D: int
    V: int
    dtype: str
    ms: float
    spread: float  # (max − min)/median
    gemms: int
    ratio: float


def milliseconds(fn: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Median and relative spread of `repeats` runs of fn after a warm-up."""
    fn()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begun = time.perf_counter()
            fn()
            times.append((time.perf_counter() - begun) * 1e3)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def time_shape(N: int, D: int, V: int, *, dtype: torch.dtype, device: str, repeats: int) -> list[Timing]:
    """Bare GEMM, then each backend's forward with entropy, and forward with backward."""
    hidden = (torch.randn(N, D, device=device) / D**0.5).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    upstream = torch.randn(N, device=device)
    found = []

    def record(what: str, fn: Callable[[], object], gemms: int, gemm_ms: float) -> float:
        ms, spread = milliseconds(fn, device, repeats)
        found.append(Timing(what, N, D, V, str(dtype)[6:], ms, spread, gemms, ms / (gemms * (gemm_ms or ms))))
        return ms

    with torch.no_grad():
        product = torch.empty(N, V, dtype=dtype, device=device)
        gemm_ms = record("bare GEMM", partial(torch.mm, hidden, weight.t(), out=product), 1, 0.0)
        del product
    for backend in ("chunked", "fused", "torch") if device == "cuda" else ("torch",):

        def forward(backend: str = backend) -> torch.Tensor:
            with torch.no_grad():
                return linear_logprob(hidden, weight, targets, entropy=True, backend=backend).logp

        def both(backend: str = backend) -> tuple[torch.Tensor, ...]:
            out = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
            return torch.autograd.grad(out.logp, (hidden, weight), upstream)

        few = slice(0, min(N, 64))
        exact = reference.linear_logprob(hidden[few].detach().double(), weight.detach().double(), targets[few]).logp
        error = (forward()[few].double() - exact).abs().max().item()
        if not error < 1e-3:
            raise RuntimeError(f"{backend}: log-probs are off by {error}")
        del exact
        record(f"{backend} forward", forward, 1, gemm_ms)
        record(f"{backend} forward+backward", both, 4, gemm_ms)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    results = []
    for N, D, V in args.shape or (CUDA_SHAPES if on_gpu else CPU_SHAPES):
        for t in time_shape(N, D, V, dtype=dtype, device=args.device, repeats=args.repeats):
            results.append(t)
            print(
                f"N={t.N} D={t.D} V={t.V} {t.dtype:9} {t.what:26} {t.ms:9.2f} ms ±{t.spread:4.0%}"
                f"  {t.ratio:.3f}× {t.gemms} GEMM"
            )
    if args.json:
        versions = {"device": name, "torch": torch.__version__}
        args.json.write_text(json.dumps({**versions, "timings": [asdict(t) for t in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
