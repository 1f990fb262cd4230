"""What can be found wrong with a run before any weight is loaded."""

import json
import os
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .config.keys import Config
from .config.settings import ConfigError
from .data.prompts import arithmetic_operations
from .models.language_model import tiny_shape
from .run.checkpoints import CONFIG
from .run.directory import CHECKPOINTS
from .run.saved import newest, refuse_damaged
from .run.setup import SFT, TINY, device_of
from .verify.pool import load_custom

DATA_FILES = (".jsonl", ".json", ".parquet")
FREE_SECTIONS = ("eval", "verify", "sft", "vllm")
FREE_KEYS = (
    "run.dir", "run.steps", "run.device", "run.checkpoint_every", "run.keep_checkpoints", "run.keep_every",
    "run.patience", "run.wandb", "model.tokens_per_micro_batch", "model.blocks", "model.attention", "model.replicas",
    "model.offload", "data.eval", "rollout.cache_gib", "rollout.engine", "rollout.ahead",
)  # fmt: skip
"""What may be another at every start of the same run."""


def refuse_impossible(config: Config) -> None:
    """Refuses files that are missing, a directory that cannot be written to and hardware that is not there.

    Raises:
        ConfigError: all that was found, with the keys' names.
        CheckpointRefused: the newest checkpoint of the run in the directory is damaged.
    """
    found = [
        *_missing_files(config), *_unwritable("run.dir", config.run.dir), *_missing_hardware(config),
        *_missing_packages(config), *_missing_server(config), *_changed(config), *_impossible_world(config),
    ]  # fmt: skip
    if config.sft.base.startswith(TINY):
        try:
            tiny_shape(config.sft.base.removeprefix(TINY))
        except ValueError as error:
            found.append(f"sft.base: {error}")
    if found:
        raise ConfigError("\n".join(found))


def resolved(config: Config) -> str:
    """Every key and its value, as TOML."""
    lines = []
    for section, keys in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        for key, value in keys.items():
            lines.append(f"# {key} is left out" if value is None else f"{key} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _missing_files(config: Config) -> list[str]:
    found = []
    sources = {"data.train": config.data.train, "data.eval": config.data.eval}
    if config.model.policy == SFT:
        sources["sft.data"] = config.sft.data
    for key, source in sources.items():
        try:
            generated = arithmetic_operations(source) > 0
        except ValueError as error:
            found.append(f"{key}: {error}")
            continue
        if not generated and Path(source).suffix in DATA_FILES and not Path(source).is_file():
            found.append(f"{key}: no file {source}")
    models = {f"model.{name}": getattr(config.model, name) for name in ("policy", "prm", "reference")}
    if config.model.policy == SFT:
        models["sft.base"] = config.sft.base
    for key, source in models.items():
        looks_like_a_path = source is not None and (source.startswith((".", "/", "~")) or source.count("/") > 1)
        if looks_like_a_path and not (Path(source) / "config.json").is_file():
            found.append(f"{key}: no model in {source}; a directory with config.json, a hub name or {SFT!r} is wanted")
    return found


def _changed(config: Config) -> list[str]:
    """Keys that the run in the directory was started with otherwise, and that a checkpoint cannot be gone on with."""
    latest = newest(config.run.dir / CHECKPOINTS)
    if latest is None:
        return []
    refuse_damaged(latest)
    now = config.model_dump(mode="json")
    # The directory's own is of the last start, which may have ended before it saved anything.
    found = (path for path in (latest / CONFIG, config.run.dir / CONFIG) if path.exists())
    return list(dict.fromkeys(said for path in found for said in _differing(config, json.loads(path.read_text()), now)))


def _differing(config: Config, started: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{section}.{key}: the run in {config.run.dir} was started with {_toml(was)}, not {_toml(now[section][key])}; "
        "give this one another run.dir"
        for section, keys in started.items()
        for key, was in keys.items()
        if section in now and key in now[section] and was != now[section][key]
        and section not in FREE_SECTIONS and f"{section}.{key}" not in FREE_KEYS
    ]  # fmt: skip


def _unwritable(key: str, directory: Path) -> list[str]:
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return [f"{key}: {existing} is a file"]
    return [] if os.access(existing, os.W_OK) else [f"{key}: {existing} cannot be written to"]


def _missing_hardware(config: Config) -> list[str]:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        return ["run.device: there is no CUDA GPU; use auto or cpu"]
    if config.model.attention == "flash_attention_2" and device_of(config).type != "cuda":
        return ["model.attention: flash_attention_2 needs a CUDA GPU; use sdpa"]
    if "liger" in config.model.blocks and device_of(config).type != "cuda":
        return ["model.blocks: liger's kernels need a CUDA GPU"]
    return []


def _missing_packages(config: Config) -> list[str]:
    found = []
    if config.run.wandb and find_spec("wandb") is None:
        found.append("run.wandb: the package wandb is not installed; it comes with implicit-prime[wandb]")
    if config.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        found.append("model.attention: flash_attention_2 needs the package flash-attn; use sdpa")
    for package, extra, key, wanted in (
        ("peft", "lora", "model.lora", config.model.lora > 0),
        ("liger_kernel", "liger", "model.blocks", "liger" in config.model.blocks),
    ):
        if wanted and find_spec(package) is None:
            found.append(f"{key}: the package {package} is not installed; it comes with implicit-prime[{extra}]")
    if config.verify.custom is not None:
        try:
            load_custom(config.verify.custom)
        except ValueError as error:
            found.append(f"verify.custom: {error}")
    return found


def _impossible_world(config: Config) -> list[str]:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes % config.model.replicas:
        return [f"model.replicas must divide the number of processes, {processes}, got {config.model.replicas}"]
    return []


def _missing_server(config: Config) -> list[str]:
    if config.rollout.engine != "vllm" or int(os.environ.get("RANK", 0)):  # one process speaks to servers
        return []
    from .rollout.vllm.probe import server_problems, transport_problems  # its HTTP client is for runs that have servers

    found = [f"vllm.transport: {problem}" for problem in (*transport_problems(config), *_too_little_room(config))]
    found += [f"vllm.servers: {problem}" for problem in server_problems(config)]
    if not config.vllm.urls:
        python = shlex.split(config.vllm.servers)[0]
        if shutil.which(python) is None:
            found.append(f"vllm.servers: neither a URL nor a program: {python}")
    return found


def _too_little_room(config: Config) -> list[str]:
    """For the policy's weights on their way to servers."""
    if config.vllm.transport != "file":
        return []
    from .plan.records import Unplannable
    from .rollout.vllm.build import room_of

    try:
        room = room_of(config)
    except Unplannable:
        return []  # the plan says why
    return [] if room.suffices else [str(room)]
