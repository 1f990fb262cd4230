"""The workspace bound, held against what our ops really take: peak less inputs, outputs and gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import peak_memory
from prime_kernels import linear_logprob, linear_ppo_loss, set_workspace
from prime_kernels.workspace import DEFAULT_LOGPROB_WORKSPACE, DEFAULT_ONE_PASS_WORKSPACE


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
    bound: int
    forward: int
    backward: int

    @property
    def bounded(self) -> bool:
        return max(self.forward, self.backward) <= self.bound


def measure(
    N: int, D: int, V: int, *, dtype: torch.dtype, device: str, backend: str, workspace: int | None = None,
    op: str = "logprob",
) -> Scratch:  # fmt: skip
    """Scratch of one forward, with entropy, and one backward with all gradients; `op` is "logprob" or "ppo"."""
    hidden, weight = (torch.randn(n, D, dtype=dtype, device=device).requires_grad_() for n in (N, V))
    return measure_tensors(hidden, weight, backend=backend, workspace=workspace, op=op)


def measure_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, *, backend: str, workspace: int | None = None, op: str = "logprob"
) -> Scratch:  # fmt: skip
    """`measure` for given hidden states [N, D] and weights [V, D] that require gradients."""
    (N, D), V, where, dtype = hidden.shape, len(weight), hidden.device, hidden.dtype
    set_workspace(workspace)
    try:
        bias = torch.randn(V, dtype=dtype, device=where).requires_grad_()
        targets = torch.randint(V, (N,), device=where)
        rows = [torch.randn(N, device=where) for _ in range(3)]
        options: dict[str, Any] = {"bias": bias, "temperature": 0.7, "backend": backend}

        def forward() -> Sequence[torch.Tensor | None]:
            if op == "ppo":
                out = linear_ppo_loss(hidden, weight, targets, *rows, entropy_coef=0.01, **options)
                return (out.loss,)
            return linear_logprob(hidden, weight, targets, entropy=True, **options)

        forward_scratch = peak_memory(forward, where).scratch
        results = [t for t in forward() if t is not None]
        upstream = [torch.ones_like(t) for t in results]

        def backward() -> Sequence[torch.Tensor]:
            return torch.autograd.grad(results, (hidden, weight, bias), upstream)

        backward_scratch = peak_memory(backward, where).scratch
    finally:
        set_workspace(None)
    bound = workspace
    if bound is None:
        bound = DEFAULT_ONE_PASS_WORKSPACE if op == "ppo" else DEFAULT_LOGPROB_WORKSPACE
    if op == "ppo" and dtype.itemsize == 2:
        bound += 4 * V * D
    return Scratch(op, backend, str(dtype)[6:], N, D, V, bound, forward_scratch, backward_scratch)
