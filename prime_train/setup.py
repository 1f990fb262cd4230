"""From a configuration to models, optimizers, tokenizer and prompts."""

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from . import arithmetic, optim
from .checkpoints import Trained
from .config import Config
from .models import LanguageModel, load_model, tiny_model
from .packing import Layout

SFT = "sft"
"""Name of the model that the run's own SFT stage makes."""
TINY = "tiny:"
"""What the name of a model of random weights begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Everything with weights, and how batches are laid out for it."""

    tokenizer: PreTrainedTokenizerBase
    policy: LanguageModel
    policy_optimizer: torch.optim.Optimizer
    prm: LanguageModel | None
    """None where outcomes alone train the policy."""
    prm_optimizer: torch.optim.Optimizer | None
    reference: LanguageModel | None
    """None where neither the PRM nor a KL term needs it."""
    layout: Layout

    @property
    def trained(self) -> Trained:
        trained = {"policy": (self.policy, self.policy_optimizer)}
        if self.prm is not None and self.prm_optimizer is not None:
            trained["prm"] = (self.prm, self.prm_optimizer)
        return trained


def load_models(config: Config) -> Models:
    """Policy, PRM and reference, all from the SFT model unless configured otherwise."""
    device = device_of(config)
    paths = {name: str(model_path(config, name)) for name in ("policy", "prm", "reference")}
    dtype, attention = getattr(torch, config.model.dtype), config.model.attention

    def load(name: str, *, trained: bool) -> LanguageModel:
        model = load_model(paths[name], dtype=dtype, device=device, attention=attention, trained=trained)
        if trained and config.model.checkpointing:
            model.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    with_prm = config.advantage.process_coef > 0
    with_reference = config.policy.kl_coef > 0 or (with_prm and config.prm.reference == "frozen")
    policy = load("policy", trained=True)
    prm = load("prm", trained=config.prm.update != "none") if with_prm else None
    return Models(
        tokenizer=AutoTokenizer.from_pretrained(paths["policy"]),
        policy=policy,
        policy_optimizer=optim.adamw(policy, lr=config.policy.lr, weight_decay=config.policy.weight_decay),
        prm=prm,
        prm_optimizer=optim.adamw(prm, lr=config.prm.lr) if prm is not None and config.prm.update != "none" else None,
        reference=load("reference", trained=False) if with_reference else None,
        layout=layout_of(config),
    )


def layout_of(config: Config) -> Layout:
    """Variable-length attention takes sequences packed in one row; the others are faster on padded rows."""
    packed = config.model.attention == "flash_attention_2"
    return Layout(budget=config.model.tokens_per_micro_batch, packed=packed)


def model_path(config: Config, name: str) -> str | Path:
    """Where the policy, PRM or reference starts from."""
    source = getattr(config.model, name) or config.model.policy
    return sft_directory(config) if source == SFT else source


def sft_directory(config: Config) -> Path:
    """Where the run's own SFT stage leaves its model."""
    return config.run.dir / SFT / "model"


def load_base(config: Config) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """What the SFT stage starts from."""
    base, device = config.sft.base, device_of(config)
    if base.startswith(TINY):
        tokenizer = arithmetic.tokenizer()
        return tiny_model(base.removeprefix(TINY), tokenizer, config.run.seed).to(device), tokenizer
    dtype, attention = getattr(torch, config.model.dtype), config.model.attention
    model = load_model(base, dtype=dtype, device=device, attention=attention, trained=True)
    return model, AutoTokenizer.from_pretrained(base)


def quiet_transformers() -> None:
    """No progress bars for loading and saving: they would tear those of the run."""
    transformers_logging.disable_progress_bar()


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks for the next allocation.

    By default it gives them back to the system, which then clears page after page of every new tensor: a quarter of a
    small model's training step on a CPU. Elsewhere than with glibc nothing happens.
    """
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, size in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
            libc.mallopt(parameter, size)


def device_of(config: Config) -> torch.device:
    if config.run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.run.device)


def eos_tokens(tokenizer: PreTrainedTokenizerBase, model: LanguageModel) -> Sequence[int]:
    """Every token that ends a response."""
    configured = getattr(model.transformer.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*configured, tokenizer.eos_token_id) if token is not None})
