"""Who computes the ops: this library by strategy, plain torch in its variants, and the peers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.providers.wheels import Unavailable

# Computes an op's results, in the order in which the op names them.
Fn = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An implementation of some ops. `build` raises Unavailable, with the reason, where it cannot run a case."""

    name: str
    what: str
    ops: tuple[str, ...]
    build: Callable[[Case, torch.device], Fn]


def providers_of(case: Case, names: tuple[str, ...] | None = None) -> list[Provider]:
    """Those that have the case's op, in the order in which they are measured: ours, torch, peers."""
    from benchmarks.providers import ours, peers, plain

    every = (*ours.PROVIDERS, *plain.PROVIDERS, *peers.PROVIDERS)
    return [p for p in every if case.op in p.ops and (names is None or p.name in names)]


__all__ = ["Fn", "Provider", "Unavailable", "providers_of"]
