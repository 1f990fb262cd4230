"""The way into every op on a head: from a user's arguments to flat, checked tensors, and from those to tiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gemm, vocab_parallel
from .checks import check_head_inputs, check_head_values
from .kernels.common import INTERPRETED
from .plan import Strategy, choose_strategy
from .tiles import Head, Rows, Tiles, device_arch, make_tiles


class HeadArgs(NamedTuple):
    """Flat arguments, in the order in which the operators take them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    bias: Tensor | None  # [V]
    temperature: Tensor | None  # [N] in the logits' dtype
    softcap: float | None
    ignore_index: int
    backend: str


def flatten(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, temperature: float | Tensor,
    softcap: float | None, ignore_index: int, backend: str,
) -> HeadArgs:  # fmt: skip
    """Cast as autocast wants, check, flatten the leading dimensions."""
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    check_head_inputs(hidden, weight, targets, bias, temperature, softcap)
    strategy_for(hidden, backend)  # an unsuitable backend is refused here, where the traceback starts at the caller
    flat = targets.reshape(-1)
    row_temperature = _row_temperature(temperature, flat, gemm.stats_dtype(hidden.dtype))
    return HeadArgs(
        hidden.reshape(-1, hidden.shape[-1]), weight, flat, bias, row_temperature, softcap, ignore_index, backend
    )


@contextmanager
def open_head(args: HeadArgs, group: str = "") -> Iterator[tuple[Tiles, Rows, Head]]:
    """Inside an operator: check values, and set the device and the precision of sums while the block runs."""
    hidden, weight, targets, bias, temperature, softcap, ignore_index, backend = args
    codes, total_vocab = vocab_parallel.target_codes(targets, len(weight), ignore_index, group)
    check_head_values(targets, codes, temperature, total_vocab)
    rows = Rows(hidden=hidden, codes=codes, temperature=temperature)
    with working_on(hidden):
        yield make_tiles(strategy_for(hidden, backend), hidden), rows, Head(weight=weight, bias=bias, softcap=softcap)


@contextmanager
def working_on(t: Tensor) -> Iterator[None]:
    """Products summed in full precision; Triton launches on the current device, which need not be the tensors'."""
    with gemm.full_precision_sums():
        if t.is_cuda:
            with torch.cuda.device(t.device):
                yield
        else:
            yield


def strategy_for(hidden: Tensor, backend: str) -> Strategy:
    """The strategy that serves `backend` for tensors like `hidden`."""
    strategy = choose_strategy(backend, arch=device_arch(hidden.device), dtype=hidden.dtype)
    if strategy != "torch" and not hidden.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend={backend!r} needs an NVIDIA GPU, hidden is on {hidden.device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before prime_kernels is imported to run the kernels slowly on a CPU"
        )
    return strategy


def _autocast(t: Any) -> Any:
    """t as autocast would hand it to a linear layer: in its dtype, where autocast is on; fp64 stays."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    device_type = t.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return t
    return t.to(torch.get_autocast_dtype(device_type))


def _row_temperature(temperature: float | Tensor, flat_targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One temperature a token, or None where all are 1."""
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).reshape(-1).expand(len(flat_targets)).contiguous()
    if temperature == 1.0:
        return None
    return torch.full(flat_targets.shape, temperature, dtype=dtype, device=flat_targets.device)
