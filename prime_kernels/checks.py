"""Bad input is refused by name: the argument, what was found, what is wanted."""

import os

import torch
from torch import Tensor

from .kernels.common import INVALID

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor,
    softcap: float | None,
) -> None:  # fmt: skip
    """Everything that can be known without looking at a tensor's numbers."""
    named = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
    if isinstance(temperature, Tensor):
        named["temperature"] = temperature
    for name, t in named.items():
        if t is not None:
            _check_plain_tensor(name, t, hidden)

    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if hidden.dim() < 1:
        raise ValueError("hidden must have shape [..., D], got a scalar")
    D = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != D:
        raise ValueError(f"weight must have shape [V, {D}] for hidden {_shape(hidden)}, got {_shape(weight)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row, got {_shape(weight)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have hidden's leading shape {list(hidden.shape[:-1])}, got {_shape(targets)}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], got {_shape(bias)}")
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"temperature must be a float or a floating-point tensor, got {temperature.dtype}")
        if temperature.dim() > 0 and temperature.shape != targets.shape:
            raise ValueError(
                f"temperature must be a float or have the targets' shape {_shape(targets)}, got {_shape(temperature)}"
            )
        if temperature.requires_grad:
            raise ValueError("temperature must not require grad: no gradient is computed for it; pass .detach()")
    elif isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a float or a tensor, got {type(temperature).__name__}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")


def check_head_values(targets: Tensor, codes: Tensor, temperature: Tensor | None, total_vocab: int | Tensor) -> None:
    """Targets in range and temperatures positive: read where that costs no synchronisation, or where asked for."""
    if targets.is_cuda and os.environ.get("PRIME_KERNELS_CHECK") != "1":
        return
    bad = codes == INVALID
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {int(total_vocab)}) or ignore_index, "
            f"got {int(targets[at])} at token {at} ({int(bad.sum())} such tokens)"
        )
    if temperature is not None and not (temperature > 0).all():
        at = int((~(temperature > 0)).nonzero()[0])
        raise ValueError(f"temperature must be > 0, got {float(temperature[at])} at token {at}")


def check_rows(like: Tensor, **rows: Tensor | None) -> None:
    """Per-token inputs have the shape and device of `like`; None is absent."""
    for name, t in rows.items():
        if t is not None:
            _check_plain_tensor(name, t, like)
            if t.shape != like.shape:
                raise ValueError(f"{name} must have the tokens' shape {_shape(like)}, got {_shape(t)}")


def check_number(name: str, value: object, *, at_least: float | None = None, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")


def _check_plain_tensor(name: str, t: object, hidden: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if is_dtensor(t):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor {_shape(t)}: under FSDP2 call the op inside the forward "
            f"of the module that owns the parameter, where it is gathered, or pass {name}.full_tensor()"
        )
    if t.device != hidden.device:
        raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {t.device}")


def is_dtensor(t: Tensor) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # only where a subclass of Tensor turns up

    return isinstance(t, DTensor)


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)
