"""Random heads, and the criterion of exactness: error against fp64 at most twice what plain torch errs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prime_kernels import reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# (device, backend) of every way to run an op; those on a GPU are skipped, visibly, without one.
RUNS = [
    pytest.param("cpu", "torch", id="torch"),
    pytest.param("cpu", "chunked", id="chunked"),
    pytest.param("cpu", "fused", id="fused"),
    pytest.param("cuda", "torch", id="gpu-torch", marks=pytest.mark.gpu),
    pytest.param("cuda", "chunked", id="gpu-chunked", marks=pytest.mark.gpu),
    pytest.param("cuda", "fused", id="gpu-fused", marks=pytest.mark.gpu),
]


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [BF16, F16] if backend == "fused" else [F32, BF16, F16]


RUNS_BY_DTYPE = [
    pytest.param(*run.values, dtype, id=f"{run.id}-{str(dtype)[6:]}", marks=run.marks)
    for run in RUNS
    for dtype in dtypes_of(str(run.values[1]))
]


@dataclass(frozen=True)
class Inputs:
    """Arguments of a per-token op, and upstream gradients for its log-probs and entropies."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    dlogp: Tensor
    dentropy: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Inputs":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


def make_inputs(
    N: int, D: int, V: int, dtype: torch.dtype, device: str, *, seed: int = 0, scale: float = 1.0, bias: bool = False,
    **options: Any,
) -> Inputs:  # fmt: skip
    """Logits of standard deviation `scale`; options that are tensors are moved to the device."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=g)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return Inputs(
        hidden=(torch.randn(N, D, generator=g) * (scale / max(D, 1) ** 0.5)).to(device, dtype),
        weight=torch.randn(V, D, generator=g).to(device, dtype),
        targets=targets.to(device),
        bias=torch.randn(V, generator=g).to(device, dtype) if bias else None,
        dlogp=torch.randn(N, generator=g).to(device),
        dentropy=torch.randn(N, generator=g).to(device),
        options={"entropy": True, **moved},
    )


def run(op: Callable[..., Any], x: Inputs, **more: Any) -> dict[str, Tensor]:
    """Results and gradients of `op` on x, in fp64."""
    leaves = {"dhidden": x.hidden, "dweight": x.weight}
    if x.bias is not None:
        leaves["dbias"] = x.bias
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    options = {**x.options, **more}
    out = op(leaves["dhidden"], leaves["dweight"], x.targets, bias=leaves.get("dbias"), **options)
    upstream = [x.dlogp.to(out.logp.dtype)]
    results = {"logp": out.logp}
    if out.entropy is not None:
        upstream.append(x.dentropy.to(out.entropy.dtype))
        results["entropy"] = out.entropy
    torch.autograd.backward(list(results.values()), upstream)
    results |= {name: t.grad for name, t in leaves.items() if t.grad is not None}
    return {name: t.detach().double() for name, t in results.items()}


def assert_exact(op: Callable[..., Any], x: Inputs, **more: Any) -> dict[str, Tensor]:
    """Hold op on x to the criterion; returns op's results."""
    got = run(op, x, **more)
    assert_results_exact(got, x)
    return got


def assert_results_exact(got: dict[str, Tensor], x: Inputs) -> None:
    """Hold results and gradients on x to the criterion, in the 2-norm and in the largest error.

    To twice plain torch's error one rounding of the result's own dtype is added, for the cases where plain torch
    happens to hit the exact value. In fp32 on a GPU, where plain torch multiplies by another kernel of cuBLAS when
    there is a bias, the error of single results scatters too much to be compared.
    """
    want = run(reference.linear_logprob, x.to(F64))
    plain = run(reference.linear_logprob, x)
    assert got.keys() == want.keys()
    scatters = x.bias is not None and x.hidden.is_cuda and x.hidden.dtype == F32
    for name, exact in want.items():
        dtype = x.hidden.dtype if name.startswith("d") else F32
        ulp = torch.finfo(dtype).eps
        for norm in (torch.linalg.vector_norm, lambda t: t.abs().max() if t.numel() else t.sum()):
            times = 4 if scatters else 2
            error, allowed = norm(got[name] - exact), times * norm(plain[name] - exact) + ulp * norm(exact)
            assert error <= allowed, f"{name}: error {error:.3g}, plain torch {norm(plain[name] - exact):.3g}"


def run_loss(op: Callable[..., Any], x: Inputs, *args: Any, **options: Any) -> dict[str, Tensor]:
    """Loss, and gradients of head inputs, of an op that takes (hidden, weight, targets, *args, bias=…); in fp64."""
    leaves = {"dhidden": x.hidden, "dweight": x.weight}
    if x.bias is not None:
        leaves["dbias"] = x.bias
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    out = op(leaves["dhidden"], leaves["dweight"], x.targets, *args, bias=leaves.get("dbias"), **options)
    out.loss.backward()
    results = {"loss": out.loss, **{name: t.grad for name, t in leaves.items() if t.grad is not None}}
    for name in ("logp", "reward", "logits"):
        if hasattr(out, name):
            results[name] = getattr(out, name)
    return {name: t.detach().double() for name, t in results.items()}


def as_fp64(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def assert_loss_exact(
    op: Callable[..., Any], oracle: Callable[..., Any], x: Inputs, *args: Any, backend: str, **options: Any
) -> dict[str, Tensor]:
    """Hold a loss op to the criterion of `assert_results_exact`; returns its results.

    The loss, a sum in which terms cancel, may also err by 2e-6 of one.
    """
    exact_args = [tuple(map(as_fp64, a)) if isinstance(a, tuple) else as_fp64(a) for a in args]
    want = run_loss(oracle, x.to(F64), *exact_args, **{k: as_fp64(v) for k, v in options.items()})
    plain = run_loss(oracle, x, *args, **options)
    got = run_loss(op, x, *args, backend=backend, **options)
    assert got.keys() == want.keys()
    for name, exact in want.items():
        ulp = torch.finfo(x.hidden.dtype if name in ("dhidden", "dweight", "dbias") else F32).eps
        for norm in (torch.linalg.vector_norm, lambda t: t.abs().max() if t.numel() else t.sum()):
            error, allowed = norm(got[name] - exact), 2 * norm(plain[name] - exact) + ulp * norm(exact)
            allowed = allowed + 2e-6 if name == "loss" else allowed
            assert error <= allowed, f"{name}: error {error:.3g}, plain torch {norm(plain[name] - exact):.3g}"
    return got
