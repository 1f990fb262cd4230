"""Configurations, clusters and real models that the tests of plans share."""

from collections.abc import Callable, Iterator

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.harness import peak_memory
from prime_kernels import LogProbHead
from prime_kernels.devices import DEVICES
from prime_train.config.keys import Config
from prime_train.models import optim
from prime_train.models.distributed import ALONE, World, shard
from prime_train.models.language_model import LanguageModel, work_on_blocks
from prime_train.plan.make import make_plan
from prime_train.plan.memory import STAGED, dtype_of
from prime_train.plan.rates import rates_of
from prime_train.plan.records import GIB, Cluster, Plan
from prime_train.records import MicroBatch

CPU = torch.device("cpu")
TOLERANCE = 0.1
RATES = rates_of(DEVICES["H100"], "an H100")
ROLES = ("policy", "prm", "reference")


def configured(width: int, rows: int, **model: object) -> Config:
    """Micro-batches of `rows` sequences of `width` tokens, all but one of them of the response."""
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": 1},
            "rollout": {"max_tokens": width - 1, "prompts": rows, "samples": 2},
            "model": {"dtype": "float32", "attention": "sdpa", "tokens_per_micro_batch": rows * width, **model},
            "prm": {"mini_batch": 2 * rows},
            "policy": {"mini_batch": 2 * rows},
        }
    )


def planned(config: Config, architecture: PretrainedConfig, cluster: Cluster | None = None) -> Plan:
    cluster = cluster or Cluster(processes=1, memory=64 * GIB, cuda=False)
    return make_plan(config, cluster, RATES, dict.fromkeys(ROLES, architecture))  # type: ignore[arg-type]


def on_gpus(n: int, gib: float = 80) -> Cluster:
    return Cluster(processes=n, memory=int(gib * GIB), cuda=True)


def seven_billion(**sections: dict) -> Config:
    return Config.model_validate({"model": {"blocks": ["checkpoint"]}, **sections})


def beyond_state(plan: Plan, stage: str) -> int:
    """What a stage adds to resident weights and optimizers, and to a checkpoint on its way to files."""
    items = next(s.items for s in plan.stages if s.name == stage)
    return sum(item.nbytes for item in items if not item.name.endswith((": weights", ": optimizer", STAGED)))


class Real:
    """The model of a configuration, its micro-batches, and what its stages allocate."""

    def __init__(self, config: Config, architecture: PretrainedConfig, world: World = ALONE) -> None:
        transformer = AutoModelForCausalLM.from_config(
            architecture, dtype=torch.float32, attn_implementation=config.model.attention
        )
        self.model = LanguageModel(transformer, dtype_of(config)).train()
        work_on_blocks(self.model, config.model.blocks)
        shard(self.model, world)
        self.optimizer = optim.adamw(self.model, lr=1e-3)
        self.width = config.data.max_prompt_tokens + config.rollout.max_tokens
        self.rows = config.model.tokens_per_micro_batch // self.width

    def micro(self) -> MicroBatch:
        n = self.rows * self.width
        return MicroBatch(
            input_ids=torch.zeros(self.rows, self.width, dtype=torch.int64), position_ids=None,
            cu_tokens=None, longest=None, at=torch.arange(n),
            targets=torch.zeros(n, dtype=torch.int64), cu_seqlens=torch.arange(0, n + 1, self.width),
            sequences=torch.arange(self.rows), tokens=torch.arange(n),
        )  # fmt: skip

    def policy_step(self) -> None:
        n = self.rows * self.width

        def losses() -> Iterator[torch.Tensor]:
            for _ in range(2):
                numbers = torch.full((n,), -1.0), torch.ones(n), torch.full((n,), 1 / n)
                yield self.model(self.micro(), LogProbHead.ppo_loss, *numbers).loss

        optim.step(self.model, self.optimizer, losses(), grad_clip=1.0)

    def prm_step(self) -> None:
        n = self.rows * self.width

        def losses() -> Iterator[torch.Tensor]:
            for _ in range(2):
                micro = self.micro()
                outcomes = torch.ones(self.rows)
                yield self.model(micro, LogProbHead.prm_loss, torch.full((n,), -1.0), micro.cu_seqlens, outcomes).loss

        optim.step(self.model, self.optimizer, losses(), grad_clip=1.0)

    @torch.no_grad()
    def score(self) -> None:
        self.model(self.micro())

    def peak(self, stage: Callable[[], None]) -> int:
        stage()  # afterwards the optimizer has its moments
        return peak_memory(stage, CPU).peak
