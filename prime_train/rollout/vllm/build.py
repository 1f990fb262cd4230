"""From a configuration to the engine."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ...config.keys import Config
from ...models.distributed import World
from ...models.language_model import LanguageModel
from ...plan.memory import dtype_of, longest_within
from ...plan.models import policy_architecture
from ...plan.sizes import sizes_of
from ...run.setup import device_of, model_path
from ..engine import Engine
from .engine import VLLMEngine
from .ipc import ALLOW_PICKLES, IpcTransport
from .leading import LeadingEngine
from .nccl import NcclTransport
from .room import SHARED_MEMORY, Room, sweep
from .server import ServerProcess, command_line
from .transport import FileTransport, Transport

OWN = "vllm"
"""Directory in the run's directory."""


def vllm_engine(config: Config, policy: LanguageModel, eos: Sequence[int], world: World) -> Engine:
    """The engine of this process among those of the run."""
    if world.size == 1:
        return engine_of_servers(config, policy, eos, config.run.patience)
    # While weights are gathered the others cannot be told that a server is waited for: it is given up before this
    # process is.
    deadline = config.run.patience / 2
    return LeadingEngine(lambda waiting: engine_of_servers(config, policy, eos, deadline, waiting), policy, world)


def engine_of_servers(
    config: Config, policy: LanguageModel, eos: Sequence[int], deadline: float,
    waiting: Callable[[], None] = lambda: None,
) -> VLLMEngine:  # fmt: skip
    """Over the servers of `vllm.servers`, or over one that will be started by what stands there instead."""
    section = config.vllm
    process = None if section.urls else server_process(config, policy)
    return VLLMEngine(
        policy, transport_of(config), eos=eos, deadline=deadline, urls=section.urls, process=process,
        sleeps=section.sleeps, waiting=waiting,
    )  # fmt: skip


def transport_of(config: Config) -> Transport:
    """A server of the run's own is started anew when it dies, and then needs the weights again."""
    keep, device = not config.vllm.urls, device_of(config)
    if config.vllm.transport == "nccl":
        return NcclTransport(device, keep=keep)
    if config.vllm.transport == "ipc":
        return IpcTransport(device, keep=keep)
    return FileTransport(weights_directory(config))


def room_of(config: Config) -> Room:
    """What a run with this configuration finds for its weights, once it has removed what dead runs left there.

    Raises:
        Unplannable: nobody knows the policy's size; says why.
    """
    directory = weights_directory(config)
    sweep(directory)
    return Room.now(directory, sizes_of(policy_architecture(config)).parameters * dtype_of(config).itemsize)


def weights_directory(config: Config) -> Path:
    """Where refreshed weights travel: shared memory, or for servers elsewhere the run's directory, on a file system
    that they and the trainer share."""
    if config.vllm.local and SHARED_MEMORY.is_dir():
        return SHARED_MEMORY
    return config.run.dir.absolute() / OWN


def server_process(config: Config, policy: LanguageModel) -> ServerProcess:
    """On a CPU without compilation, which needs tools that are often not there, and within `rollout.cache_gib`."""
    on_cpu, transport = device_of(config).type == "cpu", config.vllm.transport
    command = command_line(
        config.vllm.servers, str(model_path(config, "policy")), dtype=config.model.dtype,
        max_model_len=longest_within(config, policy.transformer.config),
        options=[
            *(["--enforce-eager"] if on_cpu else []),
            *(["--weight-transfer-config", json.dumps({"backend": transport})] if transport != "file" else []),
        ],
    )  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(config.rollout.cache_gib))} if on_cpu else {}
    if transport == "ipc":
        environment |= ALLOW_PICKLES
    return ServerProcess(
        command, log=config.run.dir / OWN / "server.log", deadline=config.run.patience, environment=environment
    )  # fmt: skip
