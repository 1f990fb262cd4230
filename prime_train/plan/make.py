"""A plan for a configuration on a cluster, the largest token budget that fits, and changes that make a run fit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ..config.keys import Config
from .durations import Lengths, assumptions, batch_tokens, durations_of
from .flops import stage_flops
from .memory import ASLEEP, Crew, crew_of, host_of, longest, roles_of, server_share, shares_gpu, stages_of
from .models import architectures_of
from .rates import Rates
from .records import GIB, Change, Cluster, Plan, Role

LORA_RANK = 32
"""Of the adapters that are suggested."""
LEAST_CACHE_GIB = 0.5
"""That is suggested."""
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
        cluster=cluster, stages=stages, host=host_of(config, crew, cluster),
        largest=largest_budget(config, crew, cluster), durations=durations_of(config, crew, cluster, rates, lengths),
        tokens=batch.all, flops=sum(flops.values()), changes=(),
        assumptions=(
            *rates.assumptions, *assumptions(config, crew.policy.sizes, lengths), *ALWAYS,
            *_of_server(config, cluster),
        ),
    )  # fmt: skip
    if plan.fits:
        return plan
    return replace(plan, changes=tuple(_changes(config, architectures, plan)))


def tokens_of(config: Config) -> int:
    """The most that a micro-batch has: a sequence that is alone over the budget gets one of its own."""
    return max(config.model.tokens_per_micro_batch, longest(config))


def _of_server(config: Config, cluster: Cluster) -> tuple[str, ...]:
    """What is taken to be true of a vLLM server on the trainer's GPU."""
    if not shares_gpu(config, cluster):
        return ()
    when = f"while it samples, and {ASLEEP / GIB:g} GiB while it sleeps; assumed" if config.vllm.sleeps else "all along"
    return (f"the run's own vLLM server takes {server_share(config):.0%} of a GPU of the trainer's {when}",)


def largest_budget(config: Config, crew: Crew, cluster: Cluster) -> int | None:
    """The largest `model.tokens_per_micro_batch` whose stages fit, no more than a process's share of a batch has.

    Of stages that sample it decides nothing. None where not even the longest sequence fits.
    """

    def fits(tokens: int) -> bool:
        stages = stages_of(config, crew, cluster, tokens=tokens)
        return max(stage.nbytes for stage in stages if not stage.decided_by) <= cluster.usable

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
        value = (",".join(self.value) or "none") if isinstance(self.value, tuple) else self.value
        return f"--{self.section}.{self.key} {value}"


def _changes(config: Config, architectures: Mapping[Role, PretrainedConfig], plan: Plan) -> Iterator[Change]:
    """Changes of one key that help, from cheap to dear, all of the cheap ones together, and more GPUs."""

    def changed(what: str, other: Config, cluster: Cluster = plan.cluster) -> Change:
        crew = crew_of(other, architectures)
        nbytes = max(s.nbytes for s in stages_of(other, crew, cluster, tokens=tokens_of(other)))
        host = sum(item.nbytes for item in host_of(other, crew, cluster))
        return Change(what, nbytes, host, excess=cluster.excess(nbytes, host))

    helpful: list[_Key] = []
    for keys in _keys(config, plan):
        # Of several values of a key the first that is enough, or else the last that helps.
        tried = [(key, found) for key in keys if (found := changed(str(key), key.of(config))).excess < plan.excess]
        if tried:
            key, found = next((pair for pair in tried if pair[1].fits), tried[-1])
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


def _keys(config: Config, plan: Plan) -> Iterator[tuple[_Key, ...]]:
    """What may free memory: values of one key each time."""
    model, rollout = config.model, config.rollout
    if "checkpoint" not in model.blocks:
        yield (_Key("model", "blocks", (*model.blocks, "checkpoint")),)
    least = plan.largest or longest(config)
    if least < tokens_of(config):
        yield (_Key("model", "tokens_per_micro_batch", least),)
    if rollout.engine == "local":
        halves = [rollout.cache_gib / 2**n for n in range(1, 8)]
        yield tuple(_Key("rollout", "cache_gib", round(gib, 2)) for gib in halves if gib >= LEAST_CACHE_GIB)
    if plan.cluster.cuda:
        kept = [role for role in roles_of(config)[::-1] if role not in model.offload]
        for n in range(1, len(kept) + 1):
            yield (_Key("model", "offload", (*model.offload, *kept[:n]), cheap=False),)
        fewer = [model.offload[:n] for n in reversed(range(len(model.offload)))]
        yield tuple(_Key("model", "offload", roles, cheap=False) for roles in fewer)
        if rollout.engine == "local":
            yield (_Key("rollout", "engine", "vllm", cheap=False),)
    if not model.lora:
        yield (_Key("model", "lora", LORA_RANK, cheap=False),)


def _more(processes: int) -> Iterator[int]:
    while processes < MOST_PROCESSES:
        processes *= 2
        yield processes
