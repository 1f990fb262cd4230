"""Who computes the ops: this library by strategy, plain torch in its variants, and the peers."""

from benchmarks.cases import Case
from benchmarks.providers import ours, peers, plain
from benchmarks.providers.provider import Fn, Provider
from benchmarks.providers.wheels import Unavailable


def providers_of(case: Case, names: tuple[str, ...] | None = None) -> list[Provider]:
    """Those that have the case's op, in the order in which they are measured: ours, torch, peers."""
    every = (*ours.PROVIDERS, *plain.PROVIDERS, *peers.PROVIDERS)
    return [p for p in every if case.op in p.ops and (names is None or p.name in names)]


__all__ = ["Fn", "Provider", "Unavailable", "providers_of"]
