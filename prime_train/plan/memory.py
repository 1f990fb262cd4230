"""Bytes of one process by stage: what is resident throughout, and what the worst moment of each stage adds.

A model that is trained has fp32 weights (4 bytes a parameter), two moments of AdamW (8) and, while it steps, gradients
(4); with adapters only these have them, and the base is kept in the compute dtype, as frozen models are. All of this is
sharded over `processes / replicas`. Where models are sharded (FSDP2: more processes than one, 16-bit computation or
offloading) a unit's weights are gathered in the compute dtype while it runs: at most two blocks, of which one is
prefetched, beside a head that is tied to the embedding. Its gradients are in the compute dtype until they are complete,
then in fp32 while they are reduced.

The moments of a training micro-batch:

    head      all that blocks saved, and the head's workspace
    reduce    all that blocks saved, and the head's gradient on its way (a head that is not tied)
    block     the largest moment of the last block's backward, and its gradients on their way
    embedding the embedding's dense gradient on its way, nothing of blocks any more
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ..config.keys import Config
from .activations import Activations, count_activations
from .head import logprob_bytes, loss_bytes
from .records import GIB, Cluster, Item, Role, Stage
from .sampling import Asked, Together, asked_of, moments, together
from .sizes import Sizes, sizes_of

ROLES: dict[Role, str] = {"policy": "policy", "prm": "PRM", "reference": "reference"}
SAMPLED_BY = {
    "rollout": ("rollout.cache_gib", "rollout.prompts", "rollout.samples"),
    "evaluation": ("rollout.cache_gib", "eval.prompts", "eval.samples"),
}
"""Keys that decide what the embedded engine holds."""
STAGED = "staged checkpoint"
"""What a checkpoint is made of, copied to host memory, while training goes on."""
ASLEEP = 2 * GIB
"""Bytes of the GPU that a vLLM server keeps while it sleeps, for its CUDA context and graphs; assumed."""
VLLM_SHARE = 0.92
"""Of a GPU's memory that vLLM (0.32) takes unless an option says otherwise."""
SHARES = ("--gpu-memory-utilization", "--device-memory-utilization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A model of the run."""

    role: Role
    sizes: Sizes
    activations: Activations
    trained: bool
    offloaded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """All models of a run."""

    policy: Member
    prm: Member | None
    reference: Member | None

    @property
    def all(self) -> tuple[Member, ...]:
        return tuple(m for m in (self.policy, self.prm, self.reference) if m is not None)


def crew_of(config: Config, architectures: Mapping[Role, PretrainedConfig]) -> Crew:
    """The models that this configuration has, with what their micro-batches hold.

    Raises:
        Unplannable: a model's activations cannot be counted.
    """

    def member(role: Role, *, trained: bool) -> Member:
        architecture = architectures[role]
        activations = count_activations(
            architecture, dtype=dtype_of(config), attention=config.model.attention, width=longest(config),
            checkpoint=trained and "checkpoint" in config.model.blocks, lora=config.model.lora if trained else 0,
        )  # fmt: skip
        return Member(
            role=role, sizes=sizes_of(architecture), activations=activations, trained=trained,
            offloaded=role in config.model.offload,
        )  # fmt: skip

    roles = roles_of(config)
    return Crew(
        policy=member("policy", trained=True),
        prm=member("prm", trained=config.prm.update != "none") if "prm" in roles else None,
        reference=member("reference", trained=False) if "reference" in roles else None,
    )


def roles_of(config: Config) -> tuple[Role, ...]:
    """Which models a run has."""
    with_prm = config.advantage.process_coef > 0
    with_reference = config.policy.kl_coef > 0 or (with_prm and config.prm.reference == "frozen")
    return ("policy", *(("prm",) if with_prm else ()), *(("reference",) if with_reference else ()))


def dtype_of(config: Config) -> torch.dtype:
    """Of the computation."""
    return getattr(torch, config.model.dtype)


def longest(config: Config) -> int:
    """Tokens of the longest sequence."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def longest_within(config: Config, architecture: PretrainedConfig) -> int:
    """Tokens of the longest sequence that the model has positions for."""
    return min(longest(config), getattr(architecture, "max_position_embeddings", None) or longest(config))


def is_sharded(config: Config, processes: int) -> bool:
    """Whether weights are gathered for use; else they are used where they are."""
    return processes > 1 or config.model.dtype == "bfloat16" or bool(config.model.offload)


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of a model between micro-batches."""

    weights: int
    optimizer: int
    gradients: int
    """While it steps."""


def state_of(member: Member, config: Config, shards: int) -> State:
    """One process's share of a model."""
    sizes, itemsize, rank = member.sizes, dtype_of(config).itemsize, config.model.lora
    if not member.trained:
        return State(itemsize * sizes.parameters // shards, 0, 0)
    if rank:
        adapters = adapters_of(member, config)
        return State(
            (itemsize * sizes.parameters + 4 * adapters) // shards, 8 * adapters // shards, 4 * adapters // shards
        )
    return State(4 * sizes.parameters // shards, 8 * sizes.parameters // shards, 4 * sizes.parameters // shards)


def adapters_of(member: Member, config: Config) -> int:
    """Parameters of a model's adapters."""
    return config.model.lora * member.sizes.linear_ends


def stages_of(config: Config, crew: Crew, cluster: Cluster, *, tokens: int) -> tuple[Stage, ...]:
    """Each stage at its worst moment, with micro-batches of `tokens` tokens, all of them response tokens."""
    work = _Work(config, crew, cluster, tokens)
    stages = [*work.sampling(), Stage("score", work.worst(*work.scoring(crew.policy)))]
    if crew.reference is not None:
        stages[-1] = max(
            stages[-1], Stage("score", work.worst(*work.scoring(crew.reference))), key=lambda stage: stage.nbytes
        )
    if crew.prm is not None:
        stages.append(Stage("prm", work.worst(*work.training(crew.prm))))
    stages.append(Stage("policy", work.worst(*work.training(crew.policy))))
    return tuple(stages)


def host_of(config: Config, crew: Crew, cluster: Cluster) -> tuple[Item, ...]:
    """What all processes of a node hold in its own memory together. On a CPU nothing: it is among the stages' items."""
    if not cluster.cuda:
        return ()
    shards, processes = shards_of(config, cluster), min(cluster.per_node, cluster.processes)
    states = [state_of(member, config, shards) for member in crew.all if member.offloaded]
    offloaded = sum(state.weights + state.optimizer + state.gradients for state in states)
    items = Item("offloaded models", processes * offloaded), Item(STAGED, processes * staged(config, crew, shards))
    return tuple(item for item in items if item.nbytes)


def staged(config: Config, crew: Crew, shards: int) -> int:
    """Bytes of one process's copy of what a checkpoint saves, kept until its files are written: fp32 weights that are
    trained, and AdamW's moments of them."""
    trained = (adapters_of(m, config) if config.model.lora else m.sizes.parameters for m in crew.all if m.trained)
    return 12 * sum(trained) // shards


def shards_of(config: Config, cluster: Cluster) -> int:
    """Processes that share one copy of the weights."""
    return max(1, cluster.processes // config.model.replicas)


@dataclass(frozen=True, slots=True)
class _Work:
    """The moments of stages."""

    config: Config
    crew: Crew
    cluster: Cluster
    tokens: int

    @property
    def itemsize(self) -> int:
        return dtype_of(self.config).itemsize

    @property
    def sharded(self) -> bool:
        return is_sharded(self.config, self.cluster.processes)

    @property
    def shards(self) -> int:
        return shards_of(self.config, self.cluster)

    def resident(self, stepping: Member | None = None) -> list[Item]:
        """What is there in every stage, and the gradients of the model that steps."""
        items = [Item("vLLM server", server_bytes(self.config, self.cluster, awake=False))]
        if not self.cluster.cuda:  # there is one memory for everything
            items.append(Item(STAGED, staged(self.config, self.crew, self.shards)))
        for member in self.crew.all:
            if member.offloaded and self.cluster.cuda:
                continue
            state, name = state_of(member, self.config, self.shards), ROLES[member.role]
            items += [Item(f"{name}: weights", state.weights), Item(f"{name}: optimizer", state.optimizer)]
            if member is stepping:
                items.append(Item("gradients", state.gradients))
        return items

    def worst(self, *moments: list[Item]) -> tuple[Item, ...]:
        """The moment that holds most, without what is nothing in it."""
        worst = max(moments, key=lambda items: sum(item.nbytes for item in items))
        return tuple(item for item in worst if item.nbytes)

    def gathered(self, parameters: int) -> Item:
        return Item("gathered weights", self.itemsize * parameters if self.sharded else 0)

    def scoring(self, member: Member) -> list[list[Item]]:
        """Moments of a forward without gradients."""
        sizes, found = member.sizes, member.activations
        head = logprob_bytes(
            self.tokens, sizes.hidden, sizes.vocabulary, dtype=dtype_of(self.config), cuda=self.cluster.cuda
        )
        kept = sizes.head if sizes.tied else 0
        return [
            [
                *self.resident(), self.gathered(2 * sizes.block + kept),
                Item("activations", found.scoring_peak(self.tokens)),
            ],
            [
                *self.resident(), self.gathered(sizes.head), Item("activations", found.scored(self.tokens)),
                Item("head workspace", head),
            ],
        ]  # fmt: skip

    def training(self, member: Member) -> list[list[Item]]:
        """Moments of a micro-batch's forward and backward, from the second one of a step on."""
        if not member.trained:
            return self.scoring(member)
        sizes, found, t = member.sizes, member.activations, self.tokens
        resident, full = self.resident(stepping=member), not self.config.model.lora
        head = loss_bytes(
            t, sizes.hidden, sizes.vocabulary, dtype=dtype_of(self.config), cuda=self.cluster.cuda, trained=full,
            together=member.role == "prm" and self.config.prm.loss == "dpo",
        )  # fmt: skip
        kept = sizes.head if sizes.tied else 0
        stepped = sizes.block if full else self.config.model.lora * sizes.linear_ends // sizes.layers
        moments = [
            [
                *resident, self.gathered(sizes.head), Item("activations", found.held(t)), Item("head workspace", head),
            ],
            [
                *resident, self.gathered(2 * sizes.block + kept), self._reduced(stepped),
                Item("activations", found.backward_peak(t)),
            ],
        ]  # fmt: skip
        if full and self.sharded:
            stored = self.itemsize * t * sizes.hidden
            if not sizes.tied:
                moments.append([
                    *resident, self.gathered(sizes.head + sizes.block), self._reduced(sizes.head),
                    Item("activations", found.held(t) + stored),
                ])  # fmt: skip
            moments.append([
                *resident, self.gathered(kept), self._reduced(sizes.embedding),
                Item("activations", stored + self.itemsize * kept),
            ])  # fmt: skip
        return moments

    def _reduced(self, parameters: int) -> Item:
        """A unit's gradients, complete in the compute dtype, and in fp32 for the reduction."""
        return Item("gradients on their way", (self.itemsize + 4) * parameters if self.sharded else 0)

    def sampling(self) -> list[Stage]:
        """What the embedded engine adds in rollouts and evaluations, or a server that wakes for them."""
        resident = self.resident()
        if self.config.rollout.engine == "vllm":
            server = server_bytes(self.config, self.cluster, awake=True)
            held = self.worst([Item("vLLM server", server), *resident[1:]])
            return [Stage("rollout", held, decided_by=("vllm.servers",) if server else ("model.offload",))]
        policy, itemsize = self.crew.policy, self.itemsize
        resident.append(Item("copy of the policy", itemsize * policy.sizes.parameters if self.sharded else 0))
        found: dict[str, list[list[Item]]] = {}
        for asked in asked_of(self.config, self.cluster.processes):
            rows = rows_of(asked, self.config, self.crew)
            found.setdefault(asked.stage, []).extend(
                [*resident, *items]
                for items in moments(
                    rows, asked, policy.sizes, policy.activations, self.config, itemsize=itemsize,
                    cuda=self.cluster.cuda,
                )
            )  # fmt: skip
        return [Stage(stage, self.worst(*held), decided_by=SAMPLED_BY[stage]) for stage, held in found.items()]


def rows_of(asked: Asked, config: Config, crew: Crew) -> Together:
    """What of it the embedded engine samples together."""
    return together(
        asked, crew.policy.sizes, itemsize=dtype_of(config).itemsize, width=longest(config),
        cache_gib=config.rollout.cache_gib,
    )  # fmt: skip


def server_bytes(config: Config, cluster: Cluster, *, awake: bool) -> int:
    """What a vLLM server of the run's own takes of the trainer's GPU: its share from its start on, unless it sleeps."""
    if not shares_gpu(config, cluster):
        return 0
    sleeping = config.vllm.sleeps and not awake
    return ASLEEP if sleeping else round(server_share(config) * cluster.memory)


def shares_gpu(config: Config, cluster: Cluster) -> bool:
    """Whether the run starts a vLLM server on the GPU of a process: no option says that it is to use others."""
    own = config.rollout.engine == "vllm" and not config.vllm.urls and bool(config.vllm.servers.strip())
    return own and cluster.cuda and server_option(config, "--device-ids") is None


def server_share(config: Config) -> float:
    """Of its GPU's memory that the server takes by its options."""
    return float(server_option(config, *SHARES) or VLLM_SHARE)


def server_option(config: Config, *names: str) -> str | None:
    """The value that a server of the run's own is given by an option that has these names, of which the last counts."""
    words = _options(config)
    found = [words[i + 1] for i, word in enumerate(words[:-1]) if word in names]
    return found[-1] if found else None


def _options(config: Config) -> list[str]:
    """Of the server, values apart from names, which vLLM takes with underscores, too."""
    words = shlex.split(config.vllm.servers.replace("=", " "))
    return [word.replace("_", "-") if word.startswith("--") else word for word in words]
