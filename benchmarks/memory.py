"""How much scratch memory the ops take: peak minus inputs, outputs and gradients.

    python -m benchmarks.memory [--device cuda] [--json FILE]

On CUDA the allocator's own peak is read. On a CPU the profiler reports every allocation and release of torch's
allocator, whose running sum is followed. Exits with 1 where the workspace bound does not hold.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop

import torch

from prime_kernels import linear_logprob, linear_ppo_loss, set_workspace
from prime_kernels.workspace import DEFAULT_LOGPROB_WORKSPACE, DEFAULT_ONE_PASS_WORKSPACE, MIB


@dataclass(frozen=True, slots=True)
class Scratch:
    """Bytes that a forward and its backward held beyond inputs, outputs and gradients.

    The bound of a one-pass loss adds the fp32 sum of a 16-bit weight's gradient, 4·V·D bytes.
    """

    op: str
    backend: str
    dtype: str
    N: int
    D: int
    V: int
    workspace: int
    forward: int
    backward: int

    @property
    def bounded(self) -> bool:
        return max(self.forward, self.backward) <= self.workspace


def scratch_bytes(fn: Callable[[], object], device: str) -> int:
    """Peak bytes that fn() holds at once, less those that are still held when it is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        kept = fn()
        torch.cuda.synchronize()
        peak, end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del kept
        return peak - end
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = fn()
        # Taken while `kept` is alive; what it holds is not scratch.
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak - held


def measure(
    N: int, D: int, V: int, *, dtype: torch.dtype, device: str, backend: str, workspace: int | None = None,
    op: str = "logprob",
) -> Scratch:  # fmt: skip
    """Scratch of one forward, with entropy, and one backward with all gradients; `op` is "logprob" or "ppo"."""
    set_workspace(workspace)
    try:
        hidden = torch.randn(N, D, dtype=dtype, device=device).requires_grad_()
        weight = torch.randn(V, D, dtype=dtype, device=device).requires_grad_()
        bias = torch.randn(V, dtype=dtype, device=device).requires_grad_()
        targets = torch.randint(V, (N,), device=device)
        rows = [torch.randn(N, device=device) for _ in range(3)]
        options: dict[str, Any] = {"bias": bias, "temperature": 0.7, "backend": backend}

        def forward() -> Sequence[torch.Tensor | None]:
            if op == "ppo":
                out = linear_ppo_loss(hidden, weight, targets, *rows, entropy_coef=0.01, **options)
                return (out.loss,)
            return linear_logprob(hidden, weight, targets, entropy=True, **options)

        forward_scratch = scratch_bytes(forward, device)
        results = [t for t in forward() if t is not None]
        upstream = [torch.ones_like(t) for t in results]

        def backward() -> Sequence[torch.Tensor]:
            return torch.autograd.grad(results, (hidden, weight, bias), upstream)

        backward_scratch = scratch_bytes(backward, device)
    finally:
        set_workspace(None)
    bound = workspace
    if bound is None:
        bound = DEFAULT_ONE_PASS_WORKSPACE if op == "ppo" else DEFAULT_LOGPROB_WORKSPACE
    if op == "ppo" and dtype != torch.float32:
        bound += 4 * V * D
    return Scratch(op, backend, str(dtype)[6:], N, D, V, bound, forward_scratch, backward_scratch)


# N and V grow in turn; the last ones hold 4 GiB of logits (CPU) and 40 GB (CUDA).
CPU_SHAPES = [(512, 64, 8192), (16384, 64, 8192), (512, 64, 262144), (65536, 32, 16384)]
CUDA_SHAPES = [
    (8192, 4096, 32768),
    (8192, 4096, 131072),
    (8192, 4096, 262144),
    (32768, 4096, 131072),
    (65536, 3584, 152064),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    results = []
    sizes_head = f"{'logits':>9} {'forward':>9} {'backward':>9}"
    print(f"{'op':8} {'backend':8} {'dtype':9} {'N':>6} {'D':>5} {'V':>7}  {sizes_head}   bound")
    for N, D, V in CUDA_SHAPES if on_gpu else CPU_SHAPES:
        for op, backend, dtype in product(
            ("logprob", "ppo"),
            ("chunked", "fused", "torch") if on_gpu else ("torch",),
            (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16),
        ):
            r = measure(N, D, V, dtype=dtype, device=args.device, backend=backend, op=op)
            results.append(r)
            sizes = (4 * N * V, r.forward, r.backward, r.workspace)
            logits, forward, backward, bound = (f"{size / MIB:.0f} MiB" for size in sizes)
            verdict = f"{'≤' if r.bounded else '> (!)'} {bound}"
            print(f"{op:8} {backend:8} {r.dtype:9} {N:6} {D:5} {V:7}  {logits:>9} {forward:>9} {backward:>9} {verdict}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    if not all(r.bounded for r in results):
        sys.exit("the workspace bound does not hold")


if __name__ == "__main__":
    main()
