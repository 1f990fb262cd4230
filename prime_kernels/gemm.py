"""The dtype policy of every matrix product: operands in their own dtype, sums in fp32, one rounding at the end.

On CUDA, 16-bit operands feed the tensor cores and results leave as fp32 (`out_dtype`). A CPU has no such GEMM, so
`operand` copies a tile of 16-bit operands to fp32 first, where products of 16-bit numbers are exact.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .plan import HALF_DTYPES


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, log-probs and accumulators for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def needs_upcast(t: Tensor) -> bool:
    """Whether tiles of `t` are copied to fp32 before a product: 16-bit numbers on a CPU."""
    return t.dtype in HALF_DTYPES and not t.is_cuda


def needs_copies(*operands: Tensor) -> bool:
    """Whether tiles of any of these are copied before a product, for their dtype or their strides."""
    return any(needs_upcast(t) or 1 not in t.stride() for t in operands)


def operand(t: Tensor) -> Tensor:
    """A tile in the dtype in which it enters products."""
    return t.float() if needs_upcast(t) else t


class _ProcessFlags:
    """cuBLAS's settings, one set for the process: changed while any operator runs, restored by the last one out.

    Autograd runs operators on threads of its own, so what one of them found cannot be what it leaves behind.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.inside = 0
        self.before: dict[str, Any] = {}

    def enter(self) -> None:
        with self.lock:
            for name in FLAGS:
                value = getattr(torch._C, f"_get_cublas_{name}")()
                # Of a pair the second says whether split-K is allowed, which is the user's to say.
                forbidden = (False, *value[1:]) if isinstance(value, tuple) else False
                if self.inside == 0 or value != forbidden:  # allowed meanwhile: the user's newest choice
                    self.before[name] = value
                    _set_flag(name, forbidden)
            self.inside += 1

    def forked(self) -> None:
        """In a child process: the operators that were running are its parent's."""
        self.lock = Lock()
        if self.inside:
            self.inside = 1
            self.leave()

    def leave(self) -> None:
        with self.lock:
            if self.inside == 0:  # a child process that was forked inside
                return
            self.inside -= 1
            if self.inside == 0:
                for name, value in self.before.items():
                    _set_flag(name, value)


FLAGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
_flags = _ProcessFlags()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_flags.forked)


def _set_flag(name: str, value: Any) -> None:
    # torch's own front (torch.backends.cuda.matmul) reads a pair as its first half alone.
    getattr(torch._C, f"_set_cublas_{name}")(*(value if isinstance(value, tuple) else (value,)))


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """Forbid cuBLAS to add up partial sums of 16-bit products in 16 bits (its default for split-K)."""
    _flags.enter()
    try:
        yield
    finally:
        _flags.leave()


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a·b, summed in fp32 and rounded once to out's dtype."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def column_sums(t: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """Sums over the rows of t [n, s], in `dtype`, each row times its factor [n].

    On CUDA torch would copy 16-bit numbers to fp32 before it adds them up, so there it is a product.
    """
    if factor is None and not (t.is_cuda and t.dtype in HALF_DTYPES):
        return t.sum(0, dtype=dtype)
    factor = t.new_ones(len(t)) if factor is None else factor.to(t.dtype)
    return mm(t.t(), factor[:, None], out=t.new_empty((t.shape[1], 1), dtype=dtype)).squeeze(1)


def addmm(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """acc += a·b in acc's dtype."""
    if acc.dtype == a.dtype:
        return acc.addmm_(a, b)
    return torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
