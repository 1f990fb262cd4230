"""An implementation of some ops."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs

# Computes an op's results, in the order in which the op names them.
Fn = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An implementation of some ops. `build` raises Unavailable, with the reason, where it cannot run a case."""

    name: str
    what: str
    ops: tuple[str, ...]
    build: Callable[[Case, torch.device], Fn]
