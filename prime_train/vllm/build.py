"""From a configuration to the engine."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..config import Config
from ..models import LanguageModel
from ..setup import device_of, model_path
from .engine import VLLMEngine
from .server import ServerProcess, command_line
from .transport import FileTransport

SHARED_MEMORY = Path("/dev/shm")
OWN = "vllm"
"""Directory in the run's directory."""


def vllm_engine(config: Config, policy: LanguageModel, eos: Sequence[int]) -> VLLMEngine:
    """Over the servers of `vllm.servers`, or over one that will be started by what stands there instead."""
    section = config.vllm
    process = None if section.urls else server_process(config, policy)
    return VLLMEngine(
        policy, FileTransport(weights_directory(config)), eos=eos, deadline=section.deadline, urls=section.urls,
        process=process, sleeps=section.sleeps,
    )  # fmt: skip


def weights_directory(config: Config) -> Path:
    """Where refreshed weights travel: shared memory, or for servers elsewhere the run's directory, on a file system
    that they and the trainer share."""
    if config.vllm.local and SHARED_MEMORY.is_dir():
        return SHARED_MEMORY
    return config.run.dir.absolute() / OWN


def server_process(config: Config, policy: LanguageModel) -> ServerProcess:
    """On a CPU without compilation, which needs tools that are often not there, and within `rollout.cache_gib`."""
    on_cpu = device_of(config).type == "cpu"
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    command = command_line(
        config.vllm.servers, str(model_path(config, "policy")), dtype=config.model.dtype,
        max_model_len=min(longest, getattr(policy.transformer.config, "max_position_embeddings", longest)),
        options=["--enforce-eager"] if on_cpu else [],
    )  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(config.rollout.cache_gib))} if on_cpu else {}
    return ServerProcess(
        command, log=config.run.dir / OWN / "server.log", deadline=config.vllm.deadline, environment=environment
    )  # fmt: skip
