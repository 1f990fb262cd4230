"""What a plan is made of. Bytes are of one process unless said otherwise; a process has one GPU, or the CPU."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["policy", "prm", "reference"]
GIB = 1 << 30


class Unplannable(Exception):
    """Why there can be no plan, naming the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The processes of a run and what each of them has."""

    processes: int
    memory: int
    """Bytes of one process's device."""
    cuda: bool
    """Whether devices are NVIDIA GPUs; else processes share a host's memory and `memory` is one's share of it."""
    per_node: int = 8

    @property
    def usable(self) -> int:
        """Bytes that a run may fill: some belong to the CUDA context, NCCL and the allocator's rounding, or to Python
        and its libraries."""
        return self.memory - (1536 << 20 if self.cuda else 768 << 20) - (self.memory // 50 if self.cuda else 0)


@dataclass(frozen=True, slots=True)
class Item:
    """What some of the memory is for."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What is held at the worst moment of a stage."""

    name: str
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True, slots=True)
class Duration:
    """The time of a stage, and what it is made of."""

    name: str
    seconds: float
    compute: float
    """Seconds that its FLOPs take alone."""
    transfer: float
    """Seconds that its bytes take alone: of weights and cache in generation, else between processes and from the host.
    The two overlap, where the stage is as long as the longer one."""


@dataclass(frozen=True, slots=True)
class Change:
    """Another configuration, and the peak that it would have."""

    what: str
    nbytes: int
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Whether a run fits into memory, and how long a step takes."""

    cluster: Cluster
    stages: tuple[Stage, ...]
    host: int
    """Bytes of offloaded models in host memory, all processes of a node together."""
    largest: int | None
    """The largest `model.tokens_per_micro_batch` that fits; None where none does."""
    durations: tuple[Duration, ...]
    tokens: int
    """Prompt and response tokens that a step trains on, all processes together."""
    flops: float
    """Of a step's score, PRM and policy stages, all processes together, without recomputation."""
    changes: tuple[Change, ...]
    """Where it does not fit: what could be done."""
    assumptions: tuple[str, ...]

    @property
    def peak(self) -> Stage:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.nbytes)

    @property
    def fits(self) -> bool:
        return self.peak.nbytes <= self.cluster.usable

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(duration.seconds for duration in self.durations)
