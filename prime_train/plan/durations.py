"""Seconds of a step by stage: FLOPs over a rate, bytes over a bandwidth, and the larger where the two overlap.

rollout   prefill computes; each decoding step reads all weights once and the cache of the rows that go on, which the
          embedded engine moves again to make it longer; its kernels are launched one by one from Python
score     forwards of policy and reference
prm, policy   forward and backward, blocks once more with `checkpoint`, the optimizer's bytes
between processes, for each micro-batch: weights gathered in the compute dtype for the forward and again for the
backward, gradients reduced in fp32, all around a ring of the shards; replicas add up their shards' gradients
"""

import math
from dataclasses import dataclass

from ..config.keys import Config
from .flops import Tokens, block_flops, forward_flops, head_flops, passes_of, sampling_flops, training_flops
from .memory import Crew, Member, dtype_of, is_sharded, longest, rows_of, state_of
from .rates import HOP, HOST, LAUNCHES, PCIE, Rates
from .records import Cluster, Duration
from .sampling import asked_of, expanded
from .sizes import Sizes

PASSING = 0.5
"""Share of the prompts that the filter lets through, if it filters at all."""
PROMPT, RESPONSE = 0.25, 0.5
"""Mean lengths, as shares of the longest that the configuration allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: int
    response: int


def lengths_of(config: Config) -> Lengths:
    """What a plan takes them to be."""
    return Lengths(
        prompt=max(1, round(PROMPT * config.data.max_prompt_tokens)),
        response=max(1, round(RESPONSE * config.rollout.max_tokens)),
    )


def passing(config: Config) -> float:
    """Share of the prompts sampled that fill the batch."""
    if config.filter.low == 0 and config.filter.high == 1:
        return 1.0
    return max(PASSING, 1 / config.filter.max_prompts)


def batch_tokens(config: Config, lengths: Lengths | None = None) -> Tokens:
    """Of the batch that a step trains on, all processes together; of the plan's own mean lengths where left out."""
    mean, n = lengths or lengths_of(config), config.rollout.prompts * config.rollout.samples
    length = mean.prompt + mean.response
    return Tokens(all=n * length, responses=n * mean.response, pairs=n * length**2)


def durations_of(
    config: Config, crew: Crew, cluster: Cluster, rates: Rates, lengths: Lengths | None = None
) -> tuple[Duration, ...]:
    """Each stage of a step; verification, evaluation and checkpoints are left out."""
    work = _Work(config, crew, cluster, rates, lengths or lengths_of(config))
    passes = passes_of(config)
    score = [work.forward(crew.policy, passes.policy_scored)]
    if crew.reference is not None:
        score.append(work.forward(crew.reference, passes.reference_scored))
    stages = [work.rollout(), _together("score", score)]
    if crew.prm is not None:
        parts = [work.forward(crew.prm, passes.prm_scored)]
        if crew.prm.trained:
            parts.append(work.training(crew.prm, 1, config.prm.mini_batch))
        stages.append(_together("prm", parts))
    stages.append(_together("policy", [work.training(crew.policy, config.policy.epochs, config.policy.mini_batch)]))
    return tuple(stages)


def _together(name: str, parts: list[Duration]) -> Duration:
    """One after the other."""
    return Duration(name, sum(p.seconds for p in parts), sum(p.compute for p in parts), sum(p.transfer for p in parts))


@dataclass(frozen=True, slots=True)
class _Work:
    config: Config
    crew: Crew
    cluster: Cluster
    rates: Rates
    mean: Lengths

    @property
    def shards(self) -> int:
        return max(1, self.cluster.processes // self.config.model.replicas)

    @property
    def tokens(self) -> Tokens:
        """Of one process's share of the batch."""
        return batch_tokens(self.config, self.mean).times(1 / self.cluster.processes)

    def rollout(self) -> Duration:
        """Rounds of as many responses as the cache has room for, each until its longest response ends."""
        config, sizes, mean = self.config, self.crew.policy.sizes, self.mean
        responses = config.rollout.prompts * config.rollout.samples / self.cluster.processes / passing(config)
        rows, local = responses, config.rollout.engine == "local"
        if local:
            rows = min(rows, rows_of(asked_of(config, self.cluster.processes)[0], config, self.crew).rows)
        rounds = math.ceil(responses / rows)
        itemsize, length = dtype_of(config).itemsize, mean.prompt + mean.response
        # A response's cache is moved at each of its tokens, half of it its own on average.
        cached = responses * mean.response * (mean.prompt + mean.response / 2) * sizes.cache * itemsize
        cached *= moves_of(config, sizes)
        launches = rounds * config.rollout.max_tokens * sizes.layers * LAUNCHES if local else 0.0
        # A server's weights are split over a node.
        split = 1 if local else min(self.cluster.per_node, self.cluster.processes)
        read = rounds * config.rollout.max_tokens * itemsize * sizes.parameters / split + cached
        prompts = responses / config.rollout.samples
        prefill = Tokens(
            all=round(prompts * mean.prompt), responses=round(prompts), pairs=round(prompts * mean.prompt**2)
        )
        decoded = Tokens(
            all=round(responses * mean.response), responses=round(responses * mean.response),
            pairs=round(responses * (length**2 - mean.prompt**2)),
        )  # fmt: skip
        first = sampling_flops(sizes, prefill) / self.rates.flops
        compute, transfer = sampling_flops(sizes, decoded) / self.rates.flops, read / self.rates.bandwidth
        return Duration("rollout", first + max(compute, transfer, launches), first + compute, transfer, launches)

    def forward(self, member: Member, times: int) -> Duration:
        """So many forwards of the batch without gradients."""
        micro = self._micro_batches(self.config.rollout.prompts * self.config.rollout.samples)
        compute = times * forward_flops(member.sizes, self.tokens) / self.rates.flops
        transfer = times * micro * self._gather(member)
        return Duration("forward", max(compute, transfer), compute, transfer)

    def training(self, member: Member, epochs: int, mini_batch: int) -> Duration:
        """Forward and backward of the batch, and an optimizer step for each mini-batch."""
        config, tokens = self.config, self.tokens
        steps = math.ceil(config.rollout.prompts * config.rollout.samples / mini_batch)
        flops = training_flops(member.sizes, tokens, lora=config.model.lora > 0)
        if "checkpoint" in config.model.blocks:
            flops += block_flops(member.sizes, tokens)
        if member.role == "prm" and config.prm.loss == "dpo":
            flops += head_flops(member.sizes, tokens)  # statistics of all tokens first, then their logits again
        compute = flops / self.rates.flops
        transfer = steps * self._micro_batches(mini_batch) * (2 * self._gather(member) + self._reduce(member))
        state = state_of(member, config, self.shards)
        # AdamW reads and writes weights and two moments, and reads gradients.
        optimizer = (
            steps * (3 * state.gradients + 2 * state.optimizer) / (HOST if member.offloaded else self.rates.bandwidth)
        )
        return Duration(
            "training", epochs * (max(compute, transfer) + optimizer), epochs * compute, epochs * (transfer + optimizer)
        )

    def _micro_batches(self, responses: int) -> int:
        """Of one process, for so many of the batch's responses, all processes together."""
        length = self.mean.prompt + self.mean.response
        tokens = responses / self.cluster.processes * length
        return math.ceil(tokens / max(self.config.model.tokens_per_micro_batch, length))

    def _gather(self, member: Member) -> float:
        """Seconds to have all weights go by once."""
        if not is_sharded(self.config, self.cluster.processes):
            return 0.0
        state = state_of(member, self.config, self.shards)
        host = state.weights / PCIE if member.offloaded else 0.0
        return host + self._ring(member, dtype_of(self.config).itemsize * member.sizes.parameters)

    def _reduce(self, member: Member) -> float:
        """Seconds to reduce all gradients once."""
        config = self.config
        if not is_sharded(config, self.cluster.processes):
            return 0.0
        trained = config.model.lora * member.sizes.linear_ends if config.model.lora else member.sizes.parameters
        host = 4 * trained / self.shards / PCIE if member.offloaded else 0.0
        between = 0.0
        if config.model.replicas > 1:
            n = config.model.replicas
            between = 2 * 4 * trained / self.shards * (n - 1) / n / self.rates.network + 2 * (n - 1) * HOP
        return host + self._ring(member, 4 * trained) + between

    def _ring(self, member: Member, nbytes: int) -> float:
        """An all-gather or reduce-scatter of so many bytes over the shards, one collective a unit."""
        n = self.shards
        if n == 1:
            return 0.0
        # Over nodes, all their network cards carry parts of the ring at once.
        bandwidth = self.rates.link
        if n > self.cluster.per_node:
            bandwidth = min(bandwidth, self.rates.network * self.cluster.per_node)
        units = member.sizes.layers + 3
        return nbytes * (n - 1) / n / bandwidth + units * (n - 1) * HOP


def moves_of(config: Config, sizes: Sizes) -> float:
    """How often a token of a response has the bytes of its row's cache moved.

    Attention reads it. The embedded engine reads and writes it once more, since its cache grows by a copy, and where
    attention makes copies of it these are written and read.
    """
    return 1.0 if config.rollout.engine == "vllm" else 3.0 + 2 * expanded(config, sizes)


def assumptions(config: Config, sizes: Sizes, lengths: Lengths | None = None) -> tuple[str, ...]:
    """What times rest on, beside rates; `sizes` are the policy's."""
    mean = lengths or lengths_of(config)
    servers = "vLLM's servers have as many GPUs as the trainer, each server those of a node, and room for all responses"
    moves = (
        f"the embedded engine moves the cache of a row {moves_of(config, sizes):g} times for a token, which attention "
        "reads and which grows by a copy"
    )
    launches = (
        f"the embedded engine takes {LAUNCHES * 1e6:.0f} µs or more for a block and a token, to launch its kernels; "
        "assumed"
    )
    return (
        *((servers,) if config.rollout.engine == "vllm" else (moves, launches)),
        f"a prompt has {mean.prompt} tokens on average and a response {mean.response}, and some response of each round "
        f"of sampling has {config.rollout.max_tokens}; memory is for {longest(config)}, all of them response tokens",
        f"{passing(config):.0%} of the prompts pass the filter",
        "sampling, gathering and reducing reach what their bandwidths allow and overlap wholly with computing; "
        "padding, verification, evaluation and checkpoints take no time",
    )
