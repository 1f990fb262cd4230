"""What a plan is made of. Bytes are of one process unless said otherwise; a process has one GPU, or the CPU."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["policy", "prm", "reference"]
GIB = 1 << 30
PROCESS = 768 << 20
"""Bytes of host memory that Python and its libraries take in each process."""


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
    host: int | None = None
    """Bytes of a node's own memory, where it is known and is not what `memory` is a share of."""

    @property
    def usable(self) -> int:
        """Bytes that a run may fill: some belong to the CUDA context, NCCL and the allocator's rounding, or to Python
        and its libraries."""
        return self.memory - (1536 << 20 if self.cuda else PROCESS) - (self.memory // 50 if self.cuda else 0)

    @property
    def usable_host(self) -> int | None:
        """Bytes that all processes of a node may fill of its own memory."""
        return None if self.host is None else self.host - PROCESS * min(self.per_node, self.processes)

    def excess(self, nbytes: int, host: int) -> int:
        """Bytes that are too many, of one process's device and of a node's own memory together."""
        beyond = 0 if self.usable_host is None else max(0, host - self.usable_host)
        return max(0, nbytes - self.usable) + beyond


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
    decided_by: tuple[str, ...] = ()
    """Keys that bound it, where micro-batches do not."""

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
    launches: float = 0.0
    """Seconds that launching its kernels takes alone, where these are small: in generation. Overlaps with both."""


@dataclass(frozen=True, slots=True)
class Change:
    """Another configuration, and the peak that it would have."""

    what: str
    nbytes: int
    host: int
    """What it would need of each host's memory."""
    excess: int
    """Bytes that would still be too many."""

    @property
    def fits(self) -> bool:
        return self.excess == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Whether a run fits into memory, and how long a step takes."""

    cluster: Cluster
    stages: tuple[Stage, ...]
    host: tuple[Item, ...]
    """What is held in a node's own memory, by all of its processes together."""
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
        """On devices, and in hosts' memory where that is known."""
        return self.excess == 0

    @property
    def excess(self) -> int:
        """Bytes that are too many: see `Cluster`."""
        return self.cluster.excess(self.peak.nbytes, sum(item.nbytes for item in self.host))

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(duration.seconds for duration in self.durations)
