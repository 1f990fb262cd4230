"""The processes of a run: what they tell each other, and how models are sharded over them.

The only module that knows torch.distributed, apart from the checkpoints' format. Every method that is said to be
collective must be called by all processes, in the same order; one process alone is the same code with nobody to wait
for. Every wait has the time limit of `run.patience`.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .language_model import LanguageModel

T = TypeVar("T")
R = TypeVar("R")
CPU = torch.device("cpu")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class OtherProcessFailed(Exception):
    """Another process of the run could not go on; says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among all of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None
    """[size], or [replicas, shards]; None where models are not sharded."""
    group: dist.ProcessGroup | None = None
    """Of host tensors and objects; None for one process."""
    timeout: timedelta = timedelta(minutes=30)

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def apart(self) -> "World":
        """The same processes on a group of their own, for the collectives of another thread. Collective."""
        return self if self.group is None else replace(self, group=_host_group(self.timeout))

    def each(self, compute: Callable[[], T]) -> list[T]:
        """What `compute` returns on every process, by rank. Collective.

        Raises:
            Exception: what it raised, on all processes: where it raised nothing, the lowest rank's.
        """
        if self.group is None:
            return [compute()]
        mine: tuple[T | None, Exception | None]
        try:
            mine = (compute(), None)
        except Exception as raised:
            mine = (None, raised)
        found: list[Any] = [None] * self.size
        try:
            self._meet()
            dist.all_gather_object(found, _sendable(mine, self.rank), group=self.group)
        except Exception as apart:
            # The others cannot hear it any more, but it may be why.
            raise mine[1] or apart from apart
        for _, error in found:
            if error is not None:
                raise mine[1] or error
        return [value for value, _ in found]

    def spread(self, items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """A result for each item, in order, on every process; each computes those of its share. Collective."""
        found: dict[int, R] = {}
        for rank, results in enumerate(self.each(lambda: compute(items[self.rank :: self.size]))):
            found |= dict(zip(range(rank, len(items), self.size), results, strict=True))
        return [found[i] for i in range(len(items))]

    def first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on the process that leads, which alone calls it. Collective.

        Raises:
            Exception: what it raised, on all processes.
        """
        if self.group is None:
            return compute()
        found: list[Any] = [None]

        def lead() -> None:
            if self.leads:
                found[0] = compute()

        self.each(lead)
        # Not by `each`, where every process would take as much memory for what each of the others has not to say.
        dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all processes, for tensors on the host. Collective."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Element by element over all processes, for tensors on the host. Collective."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some process. Collective."""
        return bool(self.max(torch.tensor(float(flag))))

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, how, group=self.group)
        return total

    def _meet(self) -> None:
        """Waits for all: where some do not come in time, the process that leads says who."""
        dist.monitored_barrier(group=self.group, timeout=self.timeout, wait_all_ranks=True)


ALONE = World()


def _host_group(timeout: timedelta) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timeout)


def _sendable(result: tuple[T | None, Exception | None], rank: int) -> tuple[T | None, Exception | None]:
    """With an error that survives pickling."""
    value, error = result
    if error is None:
        return result
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = OtherProcessFailed(f"process {rank}: {type(error).__name__}: {error}")
    return value, error


@contextmanager
def joined(device: torch.device, *, replicas: int, patience: float, sharded: bool) -> Iterator[World]:
    """This process's place in the run that torchrun started, or a run of one process.

    Args:
        replicas: copies of the sharded models.
        patience: seconds that a wait for another process may last.
        sharded: whether models are to be sharded even over one process, for their mixed precision or offloading.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size == 1 and not sharded:
        yield World(device=device)
        return
    timeout = timedelta(seconds=patience)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
    dist.init_process_group(BACKENDS[device.type], timeout=timeout, **alone)  # type: ignore[arg-type]
    sizes, names = ((replicas, size // replicas), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    for name in names:  # of two dimensions each has a group of its own, with torch's time limit
        dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))
    group = _host_group(timeout) if size > 1 else None
    try:
        yield World(rank=rank, size=size, device=device, mesh=mesh, group=group, timeout=timeout)
    except BaseException:
        # The others may not come any more to take leave; torchrun ends them.
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


# -- sharded models --


def shard(model: "LanguageModel", world: World, *, offload: bool = False) -> "LanguageModel":
    """Shards weights, gradients and optimizer over the mesh (FSDP2): each block, embedding and head is a unit.

    A unit's weights are gathered, in the model's compute dtype, while it runs; gradients are summed over processes in
    fp32. Losses are divided by global counts, so FSDP divides nothing. A tied embedding and head are one unit. Without
    a mesh the model stays as it is.

    Args:
        offload: weights, gradients and optimizer stay in host memory.

    Raises:
        ValueError: there is no mesh, and the model is to compute in another dtype than its weights have.
    """
    if world.mesh is None:
        if any(p.requires_grad and p.dtype != model.compute_dtype for p in model.parameters()):
            raise ValueError(f"{model.compute_dtype} copies of fp32 weights are FSDP's to make: join a sharded world")
        return model
    model.computes_on = world.device
    precision = MixedPrecisionPolicy(
        # Inputs are cast by nobody: a loss gets fp32 log-probs beside hidden states of 16 bits.
        param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False,
    )  # fmt: skip
    options: dict[str, Any] = {
        "mesh": world.mesh, "mp_policy": precision, "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }  # fmt: skip
    embedding, head = model.transformer.get_input_embeddings(), model.transformer.get_output_embeddings()
    ends = [[embedding, head]] if embedding.weight is head.weight else [[embedding], [head]]
    for modules in [*([block] for block in model.blocks), *ends, [model]]:
        fully_shard(modules, **options)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "next_token_logits")
    return model


def fill(model: "LanguageModel", weights: "LanguageModel | None", world: World, *, offload: bool = False) -> None:
    """Gives a sharded model without storage (on the meta device) its weights and buffers. Collective.

    Args:
        weights: the same model, whole and on the host, on the process that leads; None on the others.
    """
    model.to_empty(device="cpu" if offload else world.device)
    state = {} if weights is None else dict(weights.state_dict())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, state, options=options)
    # Those that no state_dict has, such as the frequencies of rotary embeddings, too.
    sources = {} if weights is None else dict(weights.named_buffers())
    for name, buffer in model.named_buffers():
        source = sources.get(name)
        filled = torch.empty_like(buffer, device=world.device) if source is None else source.to(world.device)
        if world.size > 1:
            dist.broadcast(filled, 0)
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, filled)


@contextmanager
def gathered(model: "LanguageModel") -> Iterator[None]:
    """Within it every process holds all weights in the compute dtype, and forwards wait for nobody. Collective.

    For forwards without gradients alone, as many on each process as it likes.
    """
    units = list(_units(model))
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; any other one as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
