"""From a configuration to models, optimizers, tokenizer and prompts."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..config.keys import Config
from ..data import arithmetic
from ..models import optim
from ..models.distributed import ALONE, World, fill, joined, shard
from ..models.language_model import LanguageModel, load_model, tiny_model, work_on_blocks
from ..models.packing import Layout
from .checkpoints import Trained

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
    def named(self) -> dict[str, LanguageModel]:
        """Those that there are."""
        models = {"policy": self.policy, "prm": self.prm, "reference": self.reference}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def trained(self) -> Trained:
        trained = {"policy": (self.policy, self.policy_optimizer)}
        if self.prm is not None and self.prm_optimizer is not None:
            trained["prm"] = (self.prm, self.prm_optimizer)
        return trained


def load_models(config: Config, world: World = ALONE) -> Models:
    """Policy, PRM and reference, all from the SFT model unless configured otherwise, sharded over the processes."""
    with_prm = config.advantage.process_coef > 0
    with_reference = config.policy.kl_coef > 0 or (with_prm and config.prm.reference == "frozen")
    policy, tokenizer = load_policy(config, world)
    prm = load_named(config, "prm", world, trained=config.prm.update != "none") if with_prm else None
    return Models(
        tokenizer=tokenizer,
        policy=policy,
        policy_optimizer=optim.adamw(policy, lr=config.policy.lr, weight_decay=config.policy.weight_decay),
        prm=prm,
        prm_optimizer=optim.adamw(prm, lr=config.prm.lr) if prm is not None and config.prm.update != "none" else None,
        reference=load_named(config, "reference", world, trained=False) if with_reference else None,
        layout=layout_of(config, policy, world),
    )


def load_policy(config: Config, world: World = ALONE) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """The policy alone, as its training begins."""
    tokenizer = AutoTokenizer.from_pretrained(str(model_path(config, "policy")))
    return load_named(config, "policy", world, trained=True), tokenizer


def load_named(config: Config, name: str, world: World, *, trained: bool) -> LanguageModel:
    """The policy, PRM or reference, sharded."""
    path, offload = str(model_path(config, name)), name in config.model.offload
    return load_sharded(config, path, world, trained=trained, lora=config.model.lora, offload=offload)


def load_sharded(
    config: Config, path: str, world: World, *, trained: bool, lora: int = 0, offload: bool = False
) -> LanguageModel:
    """A model whose file one process reads, and of which each holds its shard.

    Its blocks are worked on before they are sharded, so that recomputing one gathers nothing again.
    """

    def load(*, empty: bool) -> LanguageModel:
        model = load_model(
            path, dtype=getattr(torch, config.model.dtype), attention=attention_of(config), trained=trained, lora=lora,
            empty=empty,
        )  # fmt: skip
        # A reference computes as the PRM does: their difference is a reward, and must be 0 where the models are equal.
        work_on_blocks(model, [how for how in config.model.blocks if trained or how != "checkpoint"])
        return model

    if world.mesh is None:
        return shard(load(empty=False).to(world.device), world)
    model = shard(load(empty=True), world, offload=offload)
    weights: list[LanguageModel] = []
    world.each(lambda: weights.append(load(empty=False)) if world.leads else None)
    fill(model, weights.pop() if weights else None, world, offload=offload)
    return model


def layout_of(config: Config, model: LanguageModel, world: World) -> Layout:
    """Variable-length attention takes sequences packed in one row; the others are faster on padded rows.

    In a block of hidden size D a token takes 24·D² FLOP, and 2·D (forward, causal) for each token it attends to.
    """
    packed = attention_of(config) == "flash_attention_2"
    pair_cost = 1 / (12 * model.transformer.config.hidden_size)
    return Layout(budget=config.model.tokens_per_micro_batch, packed=packed, pair_cost=pair_cost, world=world)


def attention_of(config: Config) -> str:
    """The implementation of attention that `auto` stands for here."""
    if config.model.attention != "auto":
        return config.model.attention
    installed = device_of(config).type == "cuda" and config.model.dtype == "bfloat16" and find_spec("flash_attn")
    return "flash_attention_2" if installed else "sdpa"


def model_path(config: Config, name: str) -> str | Path:
    """Where the policy, PRM or reference starts from."""
    source = getattr(config.model, name) or config.model.policy
    return sft_directory(config) if source == SFT else source


def sft_directory(config: Config) -> Path:
    """Where the run's own SFT stage leaves its model."""
    return config.run.dir / SFT / "model"


def load_base(config: Config, world: World = ALONE) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """What the SFT stage starts from."""
    base = config.sft.base
    if base.startswith(TINY):
        tokenizer = arithmetic.tokenizer()
        model = tiny_model(base.removeprefix(TINY), tokenizer, config.run.seed, getattr(torch, config.model.dtype))
        return shard(model.to(world.device), world), tokenizer
    return load_sharded(config, base, world, trained=True), AutoTokenizer.from_pretrained(base)


@contextlib.contextmanager
def joined_world(config: Config) -> Iterator[World]:
    """This process among those of the run. Models are sharded where there are several of them, and where 16-bit copies
    of weights, or their offloading, are FSDP's to make."""
    sharded = config.model.dtype != "float32" or bool(config.model.offload)
    with joined(
        device_of(config), replicas=config.model.replicas, patience=config.run.patience, sharded=sharded
    ) as world:
        yield world


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
