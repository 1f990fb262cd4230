"""The way into every op on a head: from a user's arguments to checked tensors, and from those to tiles."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm, vocab_parallel
from .checks import check_head_inputs, check_head_values, real_number
from .constants import HAS_TRITON, INTERPRETED
from .devices import device_arch
from .plan import Strategy, choose_strategy, one_pass_strategy
from .tiles import Head, Rows, Tiles, TorchTiles

# From here on softcap·tanh(z/softcap) is z to the last bit for any logit, and z/softcap nears the smallest numbers.
NO_SOFTCAP = 1e30
# Asked once: torch's older compilers cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu", torch._C._get_privateuse1_backend_name())
    if torch.amp.is_autocast_available(device)
)


@dataclass(frozen=True, slots=True)
class HeadCall:
    """The arguments with which every operator on a head begins."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [...]
    bias: Tensor | None  # [V]
    temperature: Tensor | None  # one a token, in the logits' dtype
    softcap: float | None
    ignore_index: int
    backend: str


def head_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, temperature: float | Tensor,
    softcap: float | None, ignore_index: int, backend: str,
) -> dict[str, Any]:  # fmt: skip
    """Cast as autocast wants, checked: the fields of `HeadCall`."""
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    check_head_inputs(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    strategy_for(hidden, backend)  # an unsuitable backend is refused here, where the traceback starts at the caller
    softcap = None if softcap is None or softcap >= NO_SOFTCAP else real_number(softcap)
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "bias": bias,
        "temperature": _row_temperature(temperature, targets, gemm.stats_dtype(hidden.dtype)),
        "softcap": softcap, "ignore_index": int(ignore_index), "backend": backend,
    }  # fmt: skip


def flat(t: Tensor | None, dtype: torch.dtype) -> Any:
    """Per-token numbers as kernels read them: [N], side by side, in the log-probs' dtype."""
    return None if t is None else t.to(dtype).reshape(-1).contiguous()


def trained(head: dict[str, Any]) -> dict[str, bool]:
    """Which of a head's tensors get a gradient."""
    wanted = {"need_dh": head["hidden"], "need_dw": head["weight"], "need_dbias": head["bias"]}
    return {
        name: torch.is_grad_enabled() and t is not None and t.requires_grad for name, t in wanted.items()
    }  # fmt: skip


@contextmanager
def open_head(
    call: HeadCall, group: str = "", *, entropy: bool, one_pass: bool = False, entropy_gradient: bool = False
) -> Iterator[tuple[Tiles, Rows, Head]]:  # fmt: skip
    """Inside an operator: check values, flatten, and set device and precision while the block runs.

    With `one_pass`, tiles for a loss and its gradients together, of which one may be the entropy's.
    """
    targets = call.targets.reshape(-1)
    codes, total_vocab = vocab_parallel.target_codes(targets, call.weight.shape[0], call.ignore_index, group)
    temperature = None if call.temperature is None else call.temperature.reshape(-1)
    check_head_values(targets, codes, temperature, total_vocab)
    with open_rows(
        call.hidden, codes, call, entropy=entropy, one_pass=one_pass, entropy_gradient=entropy_gradient
    ) as opened:
        yield opened


@contextmanager
def open_rows(
    hidden: Tensor, codes: Tensor, call: Any, *, entropy: bool, one_pass: bool = False, entropy_gradient: bool = False
) -> Iterator[tuple[Tiles, Rows, Head]]:  # fmt: skip
    """The tiles, rows and head of a call whose targets are columns already."""
    codes = codes.reshape(-1)
    temperature = None if call.temperature is None else call.temperature.reshape(-1)
    rows = Rows(
        hidden=hidden.reshape(codes.shape[0], hidden.shape[-1]), codes=codes, temperature=temperature
    )  # fmt: skip
    bias = None if call.bias is None else call.bias.contiguous()  # as kernels read it
    head = Head(weight=call.weight, bias=bias, softcap=call.softcap)
    strategy = strategy_for(rows.hidden, call.backend, call.weight)
    if one_pass:
        strategy = one_pass_strategy(
            strategy, dtype=hidden.dtype, softcap=call.softcap, entropy_gradient=entropy_gradient
        )  # fmt: skip
    with working_on(hidden):
        yield make_tiles(strategy, rows.hidden, entropy=entropy), rows, head


@contextmanager
def working_on(t: Tensor) -> Iterator[None]:
    """What an operator computes with: sums in full precision, no autocast, and the tensors' device.

    Triton launches on the current device, which need not be the tensors'. Autocast has done its part on the arguments.
    """
    device = t.device.type
    with torch.amp.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext():
        if not t.is_cuda:
            yield
            return
        with gemm.full_precision_sums(), torch.cuda.device(t.device):
            yield


def strategy_for(hidden: Tensor, backend: str, weight: Tensor | None = None) -> Strategy:
    """The strategy that serves `backend` for tensors like `hidden`; for a given weight, one that can read both."""
    strategy = choose_strategy(
        backend, arch=device_arch(hidden.device), dtype=hidden.dtype, triton=HAS_TRITON,
        aligned=weight is None or (_aligned(hidden) and _aligned(weight)),
    )  # fmt: skip
    if strategy != "torch" and (torch.version.hip or not (hidden.is_cuda or INTERPRETED)):
        raise ValueError(
            f"backend={backend!r} needs an NVIDIA GPU, hidden is on {hidden.device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before prime_kernels is imported to run the kernels slowly on a CPU"
        )
    return strategy


def make_tiles(strategy: Strategy, hidden: Tensor, *, entropy: bool) -> Tiles:
    """The tile operations of `strategy` for hidden states like `hidden`, with or without the entropy's statistics."""
    if strategy == "torch":
        return TorchTiles(hidden, entropy)
    from .triton_tiles import ChunkedTiles, FusedTiles  # needs Triton

    return ChunkedTiles(hidden, entropy) if strategy == "chunked" else FusedTiles(hidden, entropy)


def _aligned(t: Tensor) -> bool:
    """Whether rows of t start at multiples of 16 bytes and lie in one piece each, as asynchronous copies read them.

    So must rows of a dense copy, which may take its place.
    """
    D = t.shape[1]
    starts = (t.data_ptr(), t.stride(0) * t.itemsize, D * t.itemsize)
    return t.stride(1) == 1 and t.stride(0) >= D and all(start % 16 == 0 for start in starts)


def _autocast(t: Any) -> Any:
    """t as autocast would hand it to a linear layer: in its dtype, where autocast is on; fp64 stays."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    device_type = t.device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return t
    return t.to(torch.get_autocast_dtype(device_type))


def _row_temperature(temperature: float | Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One temperature a token, or None where all are 1."""
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).expand(targets.shape).contiguous()
    if temperature == 1.0:
        return None
    return torch.full_like(targets, real_number(temperature), dtype=dtype, memory_format=torch.contiguous_format)
