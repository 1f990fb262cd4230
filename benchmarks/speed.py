"""The ops against plain torch and against the bare GEMMs that their FLOPs amount to, timed in the same run.

    python -m benchmarks.speed [--device cuda] [--shape N D V] [--op ppo] [--json FILE]

The unit is one GEMM [N, D]×[D, V] (2NDV FLOP) with a result of its own dtype. Each figure is the median of repeats
after a warm-up. Log-probs are checked against fp64 on some tokens before a time counts. Beside the time stands the
peak of scratch memory: what is held beyond inputs, outputs and gradients.

Providers: our strategies; `eager`, full logits in fp32 and autograd; `compiled`, the same under torch.compile; and for
PPO `two-pass`, `linear_logprob` and then `ppo_clip_loss`. One that fails is reported with its reason.
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
from torch import Tensor

from benchmarks.memory import scratch_bytes
from prime_kernels import linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss, ppo_clip_loss, reference
from prime_kernels.workspace import MIB

CPU_SHAPES = [(1024, 256, 8192)]
# A public row's shape, then the heads of Qwen2.5 7B, 1.5B and 0.5B.
CUDA_SHAPES = [(8192, 4096, 131072), (8192, 3584, 152064), (8192, 1536, 151936), (8192, 896, 151936)]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds, median of repeats, and the ratio to the GEMMs that the FLOPs amount to."""

    op: str
    provider: str
    N: int
    D: int
    V: int
    dtype: str
    ms: float
    spread: float  # (max − min)/median
    gemms: int  # the dense floor of the op, in GEMMs of 2NDV FLOP
    ratio: float  # ms over that many bare GEMMs
    flops: int  # of those GEMMs
    bytes: int  # the least that can move: head and tokens read once, gradients written once
    scratch: int  # bytes


@dataclass(frozen=True, slots=True)
class Inputs:
    """One head and one batch of tokens in sequences of 512 or fewer."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logp: Tensor
    advantages: Tensor
    token_weight: Tensor
    bounds: Tensor  # [S + 1] on the host
    membership: Tensor  # [S, N] 1 where a token is of a sequence
    outcomes: Tensor

    @classmethod
    def make(cls, N: int, D: int, V: int, dtype: torch.dtype, device: str) -> "Inputs":
        torch.manual_seed(0)
        length = min(N, 512)
        bounds = torch.tensor([*range(0, N, length), N])
        return cls(
            hidden=(torch.randn(N, D, device=device) / D**0.5).to(dtype).requires_grad_(),
            weight=torch.randn(V, D, device=device).to(dtype).requires_grad_(),
            targets=torch.randint(V, (N,), device=device), old_logp=-torch.rand(N, device=device) * 10,
            advantages=torch.randn(N, device=device), token_weight=torch.full((N,), 1 / N, device=device),
            bounds=bounds, membership=torch.block_diag(*(torch.ones(1, n) for n in bounds.diff())).to(device),
            outcomes=torch.rand(len(bounds) - 1, device=device).round(),
        )  # fmt: skip

    @property
    def ppo_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.old_logp, self.advantages, self.token_weight


def full_logits(x: Inputs) -> Tensor:
    """Log-probs as most trainers compute them: logits in the model's dtype, softmax in fp32."""
    logits = torch.nn.functional.linear(x.hidden, x.weight).float()
    return torch.log_softmax(logits, -1).gather(-1, x.targets[:, None]).squeeze(-1)


def eager_ppo(x: Inputs, logp: Tensor) -> Tensor:
    ratio = torch.exp(logp - x.old_logp)
    clipped = ratio.clamp(0.8, 1.2)
    return (x.token_weight * torch.maximum(-x.advantages * ratio, -x.advantages * clipped)).sum()


def eager_prm(x: Inputs, logp: Tensor) -> Tensor:
    logits = x.membership @ (0.05 * (logp - x.old_logp))
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, x.outcomes)


# op -> (GEMMs at the floor, our loss by backend, the loss from log-probs [N], the two-pass composition or None)
LossOf = Callable[[Inputs, str], Tensor]
OPS: dict[str, tuple[int, LossOf, Callable[[Inputs, Tensor], Tensor], LossOf | None]] = {
    "logprob": (
        4,
        lambda x, backend: linear_logprob(x.hidden, x.weight, x.targets, entropy=True, backend=backend).logp.sum(),
        lambda x, logp: logp.sum(),
        None,
    ),
    "frozen": (
        2,
        lambda x, backend: linear_logprob(x.hidden, x.weight.detach(), x.targets, backend=backend).logp.sum(),
        lambda x, logp: logp.sum(),
        None,
    ),
    "token": (
        3,
        lambda x, backend: linear_token_loss(x.hidden, x.weight, x.targets, lambda p, _: -p, backend=backend).loss,
        lambda x, logp: -logp.sum(),
        None,
    ),
    "ppo": (
        3,
        lambda x, backend: linear_ppo_loss(x.hidden, x.weight, x.targets, *x.ppo_rows, backend=backend).loss,
        eager_ppo,
        lambda x, backend: (
            ppo_clip_loss(linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp, *x.ppo_rows).loss
        ),
    ),
    "prm": (
        3,
        lambda x, backend: (
            linear_prm_loss(x.hidden, x.weight, x.targets, x.old_logp, x.bounds, x.outcomes, backend=backend).loss
        ),
        eager_prm,
        None,
    ),
}


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


def providers(op: str, x: Inputs, device: str) -> dict[str, Callable[[], object]]:
    """What computes the op with its gradients, by name; and the forward of log-probs alone."""
    _, ours, from_logp, two_pass = OPS[op]
    wanted = (x.hidden,) if op == "frozen" else (x.hidden, x.weight)

    def backward(loss: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(loss(), wanted)

    backends = ("chunked", "fused", "torch") if device == "cuda" else ("torch",)
    found: dict[str, Callable[[], object]] = {b: partial(backward, partial(ours, x, b)) for b in backends}
    if two_pass is not None:
        found["two-pass"] = partial(backward, partial(two_pass, x, backends[0]))
    found["eager"] = partial(backward, lambda: from_logp(x, full_logits(x)))
    compiled = torch.compile(lambda: from_logp(x, full_logits(x)))
    found["compiled"] = partial(backward, compiled)
    return found


def check(x: Inputs, backend: str) -> None:
    """Log-probs of some tokens against fp64."""
    few = slice(0, min(len(x.hidden), 64))
    with torch.no_grad():
        got = linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp[few]
        want = reference.linear_logprob(x.hidden[few].double(), x.weight.double(), x.targets[few]).logp
    error = (got.double() - want).abs().max().item()
    if not error < 1e-3:
        raise RuntimeError(f"{backend}: log-probs are off by {error}")


def time_shape(
    N: int, D: int, V: int, *, dtype: torch.dtype, device: str, repeats: int, ops: list[str]
) -> list[Timing]:
    """Bare GEMM, forward log-probs, then every provider of every op with its gradients."""
    x = Inputs.make(N, D, V, dtype, device)
    found: list[Timing] = []

    def record(op: str, provider: str, fn: Callable[[], object], gemms: int, gemm_ms: float | None) -> float:
        try:
            ms, spread = milliseconds(fn, device, repeats)
            scratch = scratch_bytes(fn, device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"  {op:8} {provider:9} failed: {str(error).splitlines()[0][:90]}")
            return float("nan")
        ratio = ms / (gemms * (gemm_ms or ms))
        once = (N * D + V * D) * dtype.itemsize
        least = once if op in ("gemm", "forward") else once + (N * D + (op != "frozen") * V * D) * dtype.itemsize
        found.append(
            Timing(
                op, provider, N, D, V, str(dtype)[6:], ms, spread, gemms, ratio, gemms * 2 * N * D * V, least, scratch
            )
        )  # fmt: skip
        print(
            f"  {op:8} {provider:9} {ms:9.2f} ms ±{spread:4.0%}  {ratio:6.3f}× {gemms} GEMM"
            f"  scratch {scratch / MIB:8.0f} MiB",
            flush=True,
        )
        return ms

    print(f"N={N} D={D} V={V} {str(dtype)[6:]}")
    with torch.no_grad():
        out = torch.empty(N, V, dtype=dtype, device=device)
        gemm_ms = record("gemm", "torch", partial(torch.mm, x.hidden, x.weight.t(), out=out), 1, None)
        del out
        for backend in ("chunked", "fused", "torch") if device == "cuda" else ("torch",):
            check(x, backend)
            forward = partial(linear_logprob, x.hidden, x.weight, x.targets, entropy=True, backend=backend)
            record("forward", backend, forward, 1, gemm_ms)
    for op in ops:
        for provider, fn in providers(op, x, device).items():
            record(op, provider, fn, OPS[op][0], gemm_ms)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--op", action="append", choices=list(OPS), help="only this op (repeatable)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    results = []
    for N, D, V in args.shape or (CUDA_SHAPES if on_gpu else CPU_SHAPES):
        results += time_shape(
            N, D, V, dtype=dtype, device=args.device, repeats=args.repeats, ops=args.op or list(OPS)
        )  # fmt: skip
    if args.json:
        versions = {"device": name, "torch": torch.__version__}
        args.json.write_text(json.dumps({**versions, "timings": [asdict(t) for t in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
