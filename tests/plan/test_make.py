"""The plan against what real tensors on a CPU take, allocation by allocation, as torch's profiler reports them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from benchmarks.prime_step import SHAPES
from prime_kernels.devices import DEVICES
from prime_train.config.keys import Config
from prime_train.models.distributed import World, joined
from prime_train.models.language_model import LanguageModel
from prime_train.plan.activations import count_activations
from prime_train.plan.command import verdict
from prime_train.plan.durations import Lengths, durations_of
from prime_train.plan.make import make_plan
from prime_train.plan.memory import ASLEEP, STAGED, VLLM_SHARE, crew_of, state_of
from prime_train.plan.rates import rates_of
from prime_train.plan.records import GIB, PROCESS, Cluster, Item, Plan
from prime_train.plan.sizes import sizes_of
from tests.support.plans import (
    CPU,
    RATES,
    ROLES,
    TOLERANCE,
    Real,
    beyond_state,
    configured,
    on_gpus,
    planned,
    seven_billion,
)
from tests.support.shapes import BIG, qwen, shipped


@pytest.fixture
def world() -> Iterator[World]:
    """Of this process alone, over which models are sharded."""
    with joined(CPU, replicas=1, patience=60, sharded=True) as world:
        yield world


SIZES = [
    # hidden, layers, vocabulary, tied, width, rows, blocks
    (64, 2, 500, False, 32, 4, ()),  # the head matters most
    (64, 8, 500, True, 64, 4, ("checkpoint",)),  # inputs of blocks do
    (128, 4, 1000, True, 64, 8, ()),
    (128, 4, 1000, True, 64, 2, ("checkpoint",)),  # few tokens: gradients matter
    (512, 2, 4000, False, 64, 4, ()),  # large weights
    (128, 2, 32000, True, 32, 4, ()),  # a vocabulary as real ones to the hidden size
]


@pytest.mark.parametrize(("hidden", "layers", "vocabulary", "tied", "width", "rows", "blocks"), SIZES)
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
    hidden, layers, vocabulary, tied, width, rows, blocks, world
):  # fmt: skip
    config = configured(width, rows, blocks=blocks, dtype="bfloat16")
    architecture = qwen(hidden, layers, vocabulary, tied=tied)
    plan, real = planned(config, architecture), Real(config, architecture, world)
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
    assert plan.host[0] == Item("offloaded models", 34 * sizes_of(Qwen2Config(**BIG)).parameters)


def test_the_memory_of_hosts_decides_where_it_is_known():
    big = Qwen2Config(**BIG)
    everything = seven_billion(model={"blocks": ["checkpoint"], "offload": ["policy", "prm", "reference"]})

    def plan(gib: float | None) -> Plan:
        host = None if gib is None else round(gib * GIB)
        return planned(everything, big, replace(on_gpus(1), host=host))

    needed = sum(item.nbytes for item in plan(None).host)
    assert plan(None).fits
    assert plan((needed + PROCESS) / GIB).fits
    refused = plan((needed + PROCESS) / GIB - 1)
    assert not refused.fits
    assert refused.peak.nbytes <= refused.cluster.usable
    assert "does not fit: each host needs" in verdict(refused, everything)
    assert verdict(refused, everything).startswith("does not fit")
    # Adapters need less of it; what needs more of it than there is is not said to fit.
    changes = {change.what: change for change in refused.changes}
    assert changes["--model.lora 32"].fits
    small = planned(seven_billion(), big, replace(on_gpus(1), host=200 * GIB))
    for change in small.changes:
        assert not (change.fits and change.host > 200 * GIB), change


def test_a_checkpoint_is_twice_in_host_memory_until_it_is_written():
    architecture = qwen(64, 2, 500, tied=True)
    parameters = sizes_of(architecture).parameters
    on_gpu = planned(configured(16, 1, offload=[]), architecture, on_gpus(4))
    assert on_gpu.host == (Item(STAGED, 2 * 12 * parameters),)  # of policy and PRM, in the shares of four processes
    replicated = planned(configured(16, 1, replicas=2), architecture, on_gpus(4))
    assert replicated.host == (Item(STAGED, 2 * 2 * 12 * parameters),)
    # On a CPU in the memory that everything else is in.
    on_cpu = planned(configured(16, 1), architecture)
    assert on_cpu.host == ()
    assert all(Item(STAGED, 2 * 12 * parameters) in stage.items for stage in on_cpu.stages)
    adapters = planned(configured(16, 1, lora=8), architecture, on_gpus(1)).host
    assert adapters == (Item(STAGED, 2 * 12 * 8 * sizes_of(architecture).linear_ends),)


def test_offloaded_models_of_a_run_on_a_cpu_are_in_its_memory():
    architecture = qwen(64, 2, 500, tied=True)
    usual, offloaded = (planned(configured(16, 1, offload=o), architecture) for o in ([], ["policy"]))
    assert next(i for i in offloaded.peak.items if i.name == "policy: weights").nbytes > 0
    assert beyond_state(offloaded, "score") >= beyond_state(usual, "score")


@pytest.mark.parametrize(
    ("name", "shape", "gpus"),
    [
        ("qwen2.5-0.5b-gsm8k", SHAPES["qwen2.5-0.5b"], 1),
        ("qwen2.5-1.5b-gsm8k", SHAPES["qwen2.5-1.5b"], 1),
        ("eurus-2-7b", BIG, 8),
    ],
)
def test_shipped_configurations_fit_the_gpus_that_they_are_for(name, shape, gpus):
    plan = planned(shipped(name), Qwen2Config(**shape), on_gpus(gpus))
    assert plan.fits
    assert plan.largest


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
    assert [stage.name for stage in plan.stages] == ["rollout", "evaluation", "score", "policy"]
    assert [duration.name for duration in plan.durations] == ["rollout", "score", "policy"]


def test_a_server_of_the_runs_own_takes_its_share_of_the_gpu_unless_it_sleeps_or_has_others():
    def server(words: str, cluster: Cluster | None = None) -> dict[str, float]:
        sections: dict = {"rollout": {"engine": "vllm"}, "vllm": {"servers": words}}
        plan = planned(seven_billion(**sections), Qwen2Config(**BIG), cluster or on_gpus(8))
        return {s.name: sum(i.nbytes for i in s.items if i.name == "vLLM server") / (80 * GIB) for s in plan.stages}

    def all_stages(share: float) -> dict[str, object]:
        return {stage: pytest.approx(share, rel=1e-6) for stage in ("rollout", "score", "prm", "policy")}

    assert server("http://10.0.0.2:8000") == all_stages(0)
    assert server("python") == all_stages(VLLM_SHARE)
    assert server("python --gpu-memory-utilization 0.4") == all_stages(0.4)
    assert server("python --gpu_memory_utilization=0.4") == all_stages(0.4)
    assert server("python --device-ids 7 --gpu-memory-utilization 0.4") == all_stages(0)
    asleep = all_stages(ASLEEP / (80 * GIB))
    sleeping = "python --enable-sleep-mode --gpu-memory-utilization 0.4"
    assert server(sleeping) == asleep | {"rollout": pytest.approx(0.4, rel=1e-6)}
    assert server("python", Cluster(processes=1, memory=64 * GIB, cuda=False)) == all_stages(0)


def test_what_a_sleeping_server_keeps_is_among_the_assumptions():
    sections: dict = {"rollout": {"engine": "vllm"}, "vllm": {"servers": "python --enable-sleep-mode"}}
    plan = planned(seven_billion(**sections), Qwen2Config(**BIG), on_gpus(8))
    assert any("while it sleeps; assumed" in line for line in plan.assumptions)


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
    # A model so small waits for its kernels' launches, whose number follows the longest response alone.
    assert all(a.compute > b.compute for a, b in zip(full.durations, usual.durations, strict=True))
    assert all(a.seconds > b.seconds for a, b in zip(full.durations[1:], usual.durations[1:], strict=True))
