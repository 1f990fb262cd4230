"""A plan for a configuration on a cluster, the largest token budget that fits, and changes that make a run fit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ..config import Config
from ..flops import stage_flops
from .durations import Lengths, assumptions, batch_tokens, durations_of
from .memory import Crew, crew_of, host_bytes, longest, roles_of, stages_of
from .models import architectures_of
from .rates import Rates
from .records import Change, Cluster, Plan, Role

LORA_RANK = 32
"""Of the adapters that are suggested."""
MOST_PROCESSES = 1024
ALWAYS = (
    "memory is that of the worst moment of each stage, from the second micro-batch of a step on, counted on the "
    "model's own class without `compile` or `liger`, which save some of the activations",
)


def make_plan(
    config: Config, cluster: Cluster, rates: Rates, architectures: Mapping[Role, PretrainedConfig] | None = None,
    lengths: Lengths | None = None,
) -> Plan:  # fmt: skip
    """A plan from the models' config.json alone; takes a second or two, most of it once for an architecture.

    Args:
        architectures: those of the configuration's models where left out.
        lengths: mean ones of prompts and responses, which times follow; shares of the longest where left out.

    Raises:
        Unplannable: there can be no plan; the message says of which model.
    """
    architectures = architectures or architectures_of(config)
    crew = crew_of(config, architectures)
    stages = stages_of(config, crew, cluster, tokens=tokens_of(config))
    batch = batch_tokens(config, lengths)
    flops = stage_flops(
        config, batch, policy=crew.policy.sizes, prm=crew.prm.sizes if crew.prm else None,
        reference=crew.reference.sizes if crew.reference else None,
    )  # fmt: skip
    plan = Plan(
        cluster=cluster, stages=stages, host=host_bytes(config, crew, cluster),
        largest=largest_budget(config, crew, cluster), durations=durations_of(config, crew, cluster, rates, lengths),
        tokens=batch.all, flops=sum(flops.values()), changes=(),
        assumptions=(*rates.assumptions, *assumptions(config, lengths), *ALWAYS),
    )  # fmt: skip
    if plan.fits:
        return plan
    return replace(plan, changes=tuple(_changes(config, architectures, plan)))


def tokens_of(config: Config) -> int:
    """The most that a micro-batch has: a sequence that is alone over the budget gets one of its own."""
    return max(config.model.tokens_per_micro_batch, longest(config))


def largest_budget(config: Config, crew: Crew, cluster: Cluster) -> int | None:
    """The largest `model.tokens_per_micro_batch` whose stages fit, no more than a process's share of a batch has.

    None where not even the longest sequence fits.
    """

    def fits(tokens: int) -> bool:
        return max(s.nbytes for s in stages_of(config, crew, cluster, tokens=tokens)) <= cluster.usable

    share = math.ceil(config.rollout.prompts * config.rollout.samples / cluster.processes)
    low, high = longest(config), longest(config) * max(1, share)
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True, slots=True)
class _Key:
    """Another value of a configuration's key."""

    section: str
    key: str
    value: Any
    cheap: bool = True
    """Whether it costs but time."""

    def of(self, config: Config) -> Config:
        changed = getattr(config, self.section).model_copy(update={self.key: self.value})
        return config.model_copy(update={self.section: changed})

    def __str__(self) -> str:
        value = ",".join(self.value) if isinstance(self.value, tuple) else self.value
        return f"--{self.section}.{self.key} {value}"


def _changes(config: Config, architectures: Mapping[Role, PretrainedConfig], plan: Plan) -> Iterator[Change]:
    """Changes of one key that help, from cheap to dear, all of the cheap ones together, and more GPUs."""

    def changed(what: str, other: Config, cluster: Cluster = plan.cluster) -> Change:
        crew = crew_of(other, architectures)
        nbytes = max(s.nbytes for s in stages_of(other, crew, cluster, tokens=tokens_of(other)))
        return Change(what, nbytes, nbytes <= cluster.usable)

    helpful: list[_Key] = []
    for key in _keys(config, plan):
        found = changed(str(key), key.of(config))
        if found.nbytes < plan.peak.nbytes:
            helpful.append(key)
            yield found
    together, cheap = config, [key for key in helpful if key.cheap]
    for key in cheap:
        together = key.of(together)
    if len(cheap) > 1:
        yield changed(" ".join(map(str, cheap)), together)
    if not plan.cluster.cuda:
        return
    for what, other in (("", config), ("".join(f"{key} " for key in cheap), together)):
        for n in _more(plan.cluster.processes):
            found = changed(f"{what}--gpus {n}", other, replace(plan.cluster, processes=n))
            if found.fits:
                yield found
                break
        if not cheap:
            break


def _keys(config: Config, plan: Plan) -> Iterator[_Key]:
    """What may free memory."""
    model, rollout = config.model, config.rollout
    if "checkpoint" not in model.blocks:
        yield _Key("model", "blocks", (*model.blocks, "checkpoint"))
    least = plan.largest or longest(config)
    if least < tokens_of(config):
        yield _Key("model", "tokens_per_micro_batch", least)
    if rollout.engine == "local" and rollout.cache_gib > 1:
        yield _Key("rollout", "cache_gib", 1.0)
    if plan.cluster.cuda:
        kept = [role for role in roles_of(config)[::-1] if role not in model.offload]
        for n in range(1, len(kept) + 1):
            yield _Key("model", "offload", (*model.offload, *kept[:n]), cheap=False)
        if rollout.engine == "local":
            yield _Key("rollout", "engine", "vllm", cheap=False)
    if not model.lora:
        yield _Key("model", "lora", LORA_RANK, cheap=False)


def _more(processes: int) -> Iterator[int]:
    while processes < MOST_PROCESSES:
        processes *= 2
        yield processes
