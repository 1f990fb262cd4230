"""Bad input is refused by name: the argument, what was found, what is wanted."""

import os
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .constants import IGNORED, INVALID

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# 1/temperature is a number in fp32 with room for the logits it multiplies.
SMALLEST_TEMPERATURE = 1e-30
LARGEST = torch.finfo(torch.float32).max


def check_head_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor,
    softcap: float | None, ignore_index: int,
) -> None:  # fmt: skip
    """Everything that can be known without looking at a tensor's numbers."""
    named = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
    if isinstance(temperature, Tensor):
        named["temperature"] = temperature
    check_plain_tensor("hidden", hidden, None)
    for name, t in named.items():
        if t is not None or name in ("weight", "targets"):
            check_plain_tensor(name, t, hidden)

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
        check_gets_no_gradient(temperature=temperature)
    else:
        check_number("temperature", temperature, above=0.0, kind="a float or a tensor")
        if not temperature >= SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature must be >= {SMALLEST_TEMPERATURE:g}, got {temperature}")
    check_number("softcap", softcap, above=0.0, finite=False, optional=True)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be an integer of 64 bits, got {ignore_index}")


def may_read(t: Tensor) -> bool:
    """Whether a check may look at t's numbers: on a CPU, where that costs nothing, or where it is asked for."""
    if t.device.type == "cpu":
        return True
    return os.environ.get("PRIME_KERNELS_CHECK") == "1" and not is_captured(t.device)


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, which allows no look at any number."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_head_values(targets: Tensor, codes: Tensor, temperature: Tensor | None, total_vocab: int | Tensor) -> None:
    """Targets in range and temperatures positive: read where that costs no synchronisation, or where asked for."""
    if not may_read(targets):
        return
    bad = codes == INVALID
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {int(total_vocab)}) or ignore_index, "
            f"got {int(targets[at])} at token {at} ({int(bad.sum())} such tokens)"
        )
    if temperature is None:
        return
    bad = ~((temperature > 0) & (temperature < torch.inf)) & (codes != IGNORED)
    if bad.any():
        at = int(bad.nonzero()[0])
        value = float(temperature[at])
        raise ValueError(f"temperature must be {'finite' if value > 0 else '> 0'}, got {value} at token {at}")


def check_rows(whose: str, like: Tensor, *, optional: tuple[str, ...] = (), **rows: Tensor | None) -> None:
    """Per-token inputs are numbers of the shape and device of `like`, `whose` they are; optional ones may be None."""
    for name, t in rows.items():
        if t is not None or name not in optional:
            check_row(name, t, whose, like)


def check_row(name: str, t: object, whose: str, like: Tensor) -> None:
    check_plain_tensor(name, t, like, whose)
    assert isinstance(t, Tensor)
    if t.shape != like.shape:
        raise ValueError(f"{name} must have {whose} shape {_shape(like)}, got {_shape(t)}")
    if t.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {t.dtype}")


def check_gets_no_gradient(**inputs: Tensor | None) -> None:
    """Inputs that are given no gradient want none."""
    for name, t in inputs.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad: no gradient is computed for it; pass .detach()")


def check_logp(name: str, t: object) -> None:
    """Log-probs that everything else is measured by: a plain tensor of floating-point numbers."""
    check_plain_tensor(name, t, None)
    assert isinstance(t, Tensor)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")


def check_host_or(name: str, t: Tensor, device: torch.device) -> None:
    """On the host, from where it is copied, or where it is used."""
    if t.device.type != "cpu" and t.device != device:
        raise ValueError(f"{name} must be on the host or on {device}, got {t.device}")


def check_number(
    name: str, value: Any, *, at_least: float | None = None, above: float | None = None, kind: str = "a number",
    finite: bool = True, optional: bool = False,
) -> None:  # fmt: skip
    """A real number of Python's or numpy's within its bounds, or None if optional; `kind` is what the message asks."""
    if optional and value is None:
        return
    or_none = " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}{or_none}, got {type(value).__name__}")
    number: Any = value
    if at_least is not None and not number >= at_least:
        raise ValueError(f"{name} must be >= {at_least:g}{or_none}, got {value}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be > {above:g}{or_none}, got {value}")
    if finite and not -LARGEST <= number <= LARGEST:  # math.isfinite is no part of a graph
        beyond = "" if number != number or abs(number) == float("inf") else ", which float32 cannot hold"
        raise ValueError(f"{name} must be finite{or_none}, got {value}{beyond}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """True or False, of Python or of a library that has its own."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def real_number(value: Any) -> float:
    """A checked number as Python's own, which is what an operator takes: numpy's are none."""
    return value if isinstance(value, float) else float(value)


def check_reverse_mode(op: str, **inputs: object) -> None:
    """Derivatives but those of autograd are refused: torch drops an operator's tangent without a word, and what
    `torch.func` says names nothing."""
    if torch.compiler.is_compiling():
        return
    tensors = {name: t for name, t in inputs.items() if isinstance(t, Tensor)}
    for name, t in tensors.items() if forward_ad._current_level >= 0 else ():
        if forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative, and {name} carries a tangent; use prime_kernels.reference"
            )
    for name, t in tensors.items():
        if torch._C._functorch.is_gradtrackingtensor(t):
            raise NotImplementedError(
                f"{op} has no derivative of torch.func, which {name} is under; use autograd or prime_kernels.reference"
            )


def check_plain_tensor(name: str, t: object, like: Tensor | None, whose: str = "hidden's") -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested or t.is_quantized:
        found = "a nested one" if t.is_nested else "a quantized one" if t.is_quantized else f"one of layout {t.layout}"
        raise TypeError(f"{name} must be a strided tensor, got {found}")
    if is_dtensor(t):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor {_shape(t)}: under FSDP2 call the op inside the forward "
            f"of the module that owns the parameter, where it is gathered, or pass {name}.full_tensor()"
        )
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} must be on {whose} device {like.device}, got {t.device}")


def is_dtensor(t: Tensor) -> bool:
    if type(t) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # only where a subclass of Tensor turns up

    return isinstance(t, DTensor)


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)
