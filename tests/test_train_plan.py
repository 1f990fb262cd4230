"""The plan against what real tensors on a CPU take, allocation by allocation, as torch's profiler reports them."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.harness import peak_memory
from prime_kernels import LogProbHead
from prime_train import optim
from prime_train.config import Config
from prime_train.hardware import DEVICES
from prime_train.models import LanguageModel, work_on_blocks
from prime_train.plan import Plan, make_plan, rates_of
from prime_train.plan.activations import count_activations
from prime_train.plan.durations import Lengths, durations_of
from prime_train.plan.memory import crew_of, dtype_of, state_of
from prime_train.plan.records import GIB, Cluster
from prime_train.records import MicroBatch
from prime_train.sizes import sizes_of

from .shapes import BIG, qwen, shipped

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
    """What a stage adds to resident weights and optimizers."""
    items = next(s.items for s in plan.stages if s.name == stage)
    return sum(item.nbytes for item in items if not item.name.endswith((": weights", ": optimizer")))


class Real:
    """The model of a configuration, its micro-batches, and what its stages allocate."""

    def __init__(self, config: Config, architecture: PretrainedConfig) -> None:
        dtype = dtype_of(config)
        # Under FSDP weights are kept in float32 and used in the compute dtype.
        transformer = AutoModelForCausalLM.from_config(
            architecture, dtype=torch.float32, attn_implementation=config.model.attention
        )
        self.model = LanguageModel(transformer, dtype).train()
        work_on_blocks(self.model, config.model.blocks)
        if dtype == torch.bfloat16:
            self.model.compute_dtype = torch.float32  # no autocast: FSDP casts
            sharded(self.model, dtype)
        self.optimizer = optim.adamw(self.model, lr=1e-3)
        self.width = config.data.max_prompt_tokens + config.rollout.max_tokens
        self.rows = config.model.tokens_per_micro_batch // self.width

    def micro(self) -> MicroBatch:
        n = self.rows * self.width
        return MicroBatch(
            input_ids=torch.zeros(self.rows, self.width, dtype=torch.int64), position_ids=None, at=torch.arange(n),
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


def sharded(model: LanguageModel, dtype: torch.dtype) -> None:
    """Each block is a unit, tied embedding and head another."""
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    embedding, head = model.transformer.get_input_embeddings(), model.transformer.get_output_embeddings()
    ends = [[embedding, head]] if embedding.weight is head.weight else [[embedding], [head]]
    for unit in [*([block] for block in model.transformer.get_decoder().layers), *ends, [model]]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SHAPES = [
    # hidden, layers, vocabulary, tied, width, rows, blocks
    (64, 2, 500, False, 32, 4, ()),  # the head matters most
    (64, 8, 500, True, 64, 4, ("checkpoint",)),  # inputs of blocks do
    (128, 4, 1000, True, 64, 8, ()),
    (128, 4, 1000, True, 64, 2, ("checkpoint",)),  # few tokens: gradients matter
    (512, 2, 4000, False, 64, 4, ()),  # large weights
    (128, 2, 32000, True, 32, 4, ()),  # a vocabulary as real ones to the hidden size
]


@pytest.mark.parametrize(("hidden", "layers", "vocabulary", "tied", "width", "rows", "blocks"), SHAPES)
def test_float32_stages_are_planned_to_a_tenth(hidden, layers, vocabulary, tied, width, rows, blocks):
    config, architecture = configured(width, rows, blocks=blocks), qwen(hidden, layers, vocabulary, tied=tied)
    plan, real = planned(config, architecture), Real(config, architecture)
    assert beyond_state(plan, "policy") == pytest.approx(real.peak(real.policy_step), rel=TOLERANCE)
    assert beyond_state(plan, "prm") == pytest.approx(real.peak(real.prm_step), rel=TOLERANCE)
    assert beyond_state(plan, "score") == pytest.approx(real.peak(real.score), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("hidden", "layers", "vocabulary", "tied", "width", "rows", "blocks"),
    [
        (128, 2, 2000, True, 32, 4, ()),
        (128, 4, 1000, True, 32, 4, ("checkpoint",)),
        (128, 2, 1000, False, 32, 2, ()),
    ],
)
def test_sharded_bfloat16_stages_are_planned_to_a_tenth(
    hidden, layers, vocabulary, tied, width, rows, blocks, alone
):  # fmt: skip
    config = configured(width, rows, blocks=blocks, dtype="bfloat16")
    architecture = qwen(hidden, layers, vocabulary, tied=tied)
    plan, real = planned(config, architecture), Real(config, architecture)
    assert beyond_state(plan, "policy") == pytest.approx(real.peak(real.policy_step), rel=TOLERANCE)
    assert beyond_state(plan, "score") == pytest.approx(real.peak(real.score), rel=TOLERANCE)


def test_eager_attention_is_planned_with_its_scores():
    config, architecture = configured(128, 2, attention="eager"), qwen(64, 2, 500, tied=True)
    plan, real = planned(config, architecture), Real(config, architecture)
    assert beyond_state(plan, "policy") == pytest.approx(real.peak(real.policy_step), rel=TOLERANCE)


def test_fused_attention_is_linear_in_the_length_and_eager_is_not():
    def held(attention: str, width: int) -> float:
        found = count_activations(
            qwen(64, 2, 500, tied=True), dtype=torch.float32, attention=attention, width=width, checkpoint=False, lora=0
        )
        return found.held.per_token

    assert held("sdpa", 64) == held("sdpa", 2048)
    assert held("eager", 2048) > 4 * held("eager", 64)


def test_weights_gradients_and_optimizer_are_exact():
    config, architecture = configured(16, 1), qwen(64, 2, 500, tied=True)
    real = Real(config, architecture)
    for loss in (real.model(real.micro()).logp.sum(),):
        loss.backward()
    real.optimizer.step()
    member = crew_of(config, dict.fromkeys(ROLES, architecture)).policy
    state = state_of(member, config, 1)
    parameters = list(real.model.parameters())
    assert state.weights == sum(p.nbytes for p in parameters)
    assert state.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [t for s in real.optimizer.state.values() for name, t in s.items() if name != "step"]
    assert state.optimizer == sum(t.nbytes for t in moments)


@pytest.mark.parametrize(
    "architecture",
    [
        qwen(64, 3, 500, tied=True),
        qwen(64, 3, 500, tied=False),
        LlamaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96),
        Gemma2Config(
            vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
            num_key_value_heads=2, intermediate_size=96,
        ),
    ],
    ids=["tied", "untied", "llama", "gemma2"],
)  # fmt: skip
def test_parameter_counts_are_those_of_the_model(architecture):
    model = LanguageModel(AutoModelForCausalLM.from_config(architecture))
    sizes = sizes_of(architecture)
    assert sizes.parameters == model.parameter_count()
    decoder = model.transformer.get_decoder()
    assert sizes.blocks == sum(p.numel() for p in decoder.layers.parameters())
    assert sizes.head == model.transformer.lm_head.weight.numel()
    assert sizes.tied == (model.transformer.lm_head.weight is decoder.embed_tokens.weight)
    head_dim = getattr(architecture, "head_dim", None) or 16
    assert sizes.cache == sizes.layers * 2 * architecture.num_key_value_heads * head_dim


def test_shards_divide_states_and_replicas_do_not():
    big = Qwen2Config(**BIG)

    def weights(n: int, **model: object) -> int:
        plan = planned(seven_billion(model={"blocks": ["checkpoint"], **model}), big, on_gpus(n))
        return next(item.nbytes for item in plan.peak.items if item.name == "policy: weights")

    assert weights(8) == pytest.approx(weights(1) / 8, abs=1)
    assert weights(16, replicas=2) == weights(8)


def test_offloaded_models_are_in_host_memory():
    plan = planned(seven_billion(model={"offload": ["policy", "prm", "reference"]}), Qwen2Config(**BIG), on_gpus(1))
    names = {item.name for stage in plan.stages for item in stage.items}
    assert not any(name.endswith((": weights", ": optimizer")) for name in names)
    assert plan.host == 34 * sizes_of(Qwen2Config(**BIG)).parameters


def test_adapters_alone_have_gradients_and_optimizer():
    architecture = qwen(64, 2, 500, tied=True)
    config = configured(16, 1, lora=8)
    member = crew_of(config, dict.fromkeys(ROLES, architecture)).policy
    state = state_of(member, config, 1)
    # Of q, k, v, o and the MLP's three layers, of each block.
    adapters = 2 * 8 * (128 + 96 + 96 + 128 + 3 * (64 + 192))
    assert (state.gradients, state.optimizer) == (4 * adapters, 8 * adapters)
    assert state.weights == 4 * sizes_of(architecture).parameters + 4 * adapters


def test_models_that_a_run_does_not_have_take_nothing():
    plan = planned(seven_billion(advantage={"process_coef": 0.0}), Qwen2Config(**BIG), on_gpus(8))
    names = {item.name for stage in plan.stages for item in stage.items}
    assert not any(name.startswith(("PRM", "reference")) for name in names)
    assert [stage.name for stage in plan.stages] == ["rollout", "score", "policy"]
    assert [duration.name for duration in plan.durations] == ["rollout", "score", "policy"]


def test_a_server_on_other_gpus_takes_nothing_and_one_that_sleeps_its_share():
    def rollout(servers: str) -> int:
        sections: dict = {"rollout": {"engine": "vllm"}, "vllm": {"servers": servers}}
        plan = planned(seven_billion(**sections), Qwen2Config(**BIG), on_gpus(8))
        return sum(i.nbytes for s in plan.stages if s.name == "rollout" for i in s.items if i.name == "vLLM server")

    assert rollout("http://10.0.0.2:8000") == 0
    assert rollout("python --enable-sleep-mode --gpu-memory-utilization 0.4") == pytest.approx(0.4 * 80 * GIB, rel=1e-6)


def test_the_largest_budget_fits_and_a_tenth_more_does_not():
    config, big = seven_billion(model={"blocks": []}), Qwen2Config(**BIG)
    largest = planned(config, big, on_gpus(8)).largest
    assert largest is not None

    def fits(tokens: int) -> bool:
        return planned(seven_billion(model={"tokens_per_micro_batch": tokens}), big, on_gpus(8)).fits

    assert fits(largest)
    assert not fits(int(1.1 * largest))


def test_what_does_not_fit_comes_with_changes_by_key():
    big = Qwen2Config(**BIG)
    plan = planned(shipped("eurus-2-7b", "--model.blocks", "none"), big, on_gpus(1))
    assert not plan.fits
    named_ = " ".join(change.what for change in plan.changes)
    for key in ("--model.blocks checkpoint", "--model.offload", "--model.lora", "--gpus"):
        assert key in named_
    fitting = [change for change in plan.changes if change.fits]
    assert fitting
    assert all(change.nbytes <= plan.cluster.usable for change in fitting)
    # What is said to fit does.
    for change in fitting:
        words = change.what.split()
        gpus = int(words[words.index("--gpus") + 1]) if "--gpus" in words else 1
        others = [word for word in words if word not in ("--gpus", str(gpus))]
        changed = planned(shipped("eurus-2-7b", "--model.blocks", "none", *others), big, on_gpus(gpus))
        assert changed.fits
        assert changed.peak.nbytes == change.nbytes


def test_a_smaller_cache_is_suggested_where_sampling_is_too_large():
    config = seven_billion(rollout={"cache_gib": 60.0})
    changes = planned(config, Qwen2Config(**BIG), on_gpus(8)).changes
    assert any(change.fits and change.what == "--rollout.cache_gib 1.0" for change in changes)


def seconds(
    config: Config, cluster: Cluster, *, tflops: float | None = None, bandwidth: float | None = None
) -> dict[str, float]:
    crew = crew_of(config, dict.fromkeys(ROLES, Qwen2Config(**BIG)))  # type: ignore[arg-type]
    found = durations_of(
        config, crew, cluster, rates_of(DEVICES["H100"], "an H100", tflops=tflops, bandwidth=bandwidth)
    )
    return {duration.name: duration.seconds for duration in found}


def test_time_falls_with_gpus_and_rates_and_grows_with_work():
    config, cluster = seven_billion(), on_gpus(8)
    base = seconds(config, cluster)
    assert sum(seconds(config, on_gpus(16)).values()) < sum(base.values())
    assert seconds(config, cluster, tflops=800)["policy"] < base["policy"]
    assert seconds(config, cluster, bandwidth=4000)["rollout"] < base["rollout"]
    longer = seconds(seven_billion(rollout={"max_tokens": 6000}), cluster)
    assert all(longer[stage] > base[stage] for stage in base)
    assert seconds(seven_billion(policy={"epochs": 2}), cluster)["policy"] == pytest.approx(2 * base["policy"])
    assert seconds(seven_billion(model={"blocks": []}), cluster)["policy"] < base["policy"]


def test_small_micro_batches_over_many_gpus_wait_for_each_other():
    config = seven_billion(model={"tokens_per_micro_batch": 2048}, rollout={"prompts": 8192})
    cluster = on_gpus(1024)
    crew = crew_of(config, dict.fromkeys(ROLES, Qwen2Config(**BIG)))
    policy = durations_of(config, crew, cluster, RATES)[-1]
    assert policy.transfer > policy.compute
    replicated = config.model_copy(update={"model": config.model.model_copy(update={"replicas": 128})})
    assert durations_of(replicated, crew, cluster, RATES)[-1].transfer < policy.transfer


def test_times_follow_the_lengths_that_are_given_and_memory_does_not():
    config, architecture = configured(64, 4), qwen(64, 2, 500, tied=True)
    cluster = Cluster(processes=1, memory=64 * GIB, cuda=False)
    architectures = dict.fromkeys(ROLES, architecture)
    full = make_plan(config, cluster, RATES, architectures, Lengths(prompt=1, response=63))
    usual = planned(config, architecture)
    assert full.tokens == 4 * 2 * 64
    assert full.stages == usual.stages
    assert all(a.seconds > b.seconds for a, b in zip(full.durations, usual.durations, strict=True))
