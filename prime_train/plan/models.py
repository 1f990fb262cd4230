"""The configurations of a run's models: all that a plan needs of them."""

import torch
from transformers import AutoConfig, PretrainedConfig

from ..config.keys import Config
from ..data import arithmetic
from ..models.language_model import tiny_model
from ..run.setup import SFT, TINY, sft_directory
from .memory import roles_of
from .records import Role, Unplannable


def architectures_of(config: Config) -> dict[Role, PretrainedConfig]:
    """Of every model that the run has.

    Raises:
        Unplannable: one cannot be had; the message names the key and the model.
    """
    found: dict[str, PretrainedConfig] = {}
    roles: dict[Role, PretrainedConfig] = {}
    for role in roles_of(config):
        key = f"model.{role}" if getattr(config.model, role) else "model.policy"
        source = getattr(config.model, role) or config.model.policy
        if source not in found:
            found[source] = _architecture(config, key, source)
        roles[role] = found[source]
    return roles


def policy_architecture(config: Config) -> PretrainedConfig:
    """Of the policy alone.

    Raises:
        Unplannable: it cannot be had.
    """
    return _architecture(config, "model.policy", config.model.policy)


def _architecture(config: Config, key: str, source: str) -> PretrainedConfig:
    if source == SFT:
        made = sft_directory(config)
        key, source = "sft.base", str(made) if (made / "config.json").exists() else config.sft.base
    if source.startswith(TINY):
        with torch.device("meta"):
            return tiny_model(source.removeprefix(TINY), arithmetic.tokenizer(), 0).transformer.config
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Unplannable(f"{key}: no config.json of {source} can be had: {reason}") from error
