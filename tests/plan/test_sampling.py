"""What the embedded engine is planned to hold, against what it allocates on a CPU."""

import pytest
from transformers import Qwen2Config

from benchmarks.prime_step import SHAPES
from prime_train.config.keys import Config
from prime_train.models.distributed import joined
from prime_train.plan.command import verdict
from prime_train.plan.durations import lengths_of, moves_of
from prime_train.plan.memory import crew_of, rows_of
from prime_train.plan.rates import LAUNCHES
from prime_train.plan.records import GIB
from prime_train.plan.sampling import PACKS_GROUPS, asked_of
from prime_train.plan.sizes import sizes_of
from prime_train.rollout.sampler import GREEDY, LocalEngine
from tests.support.plans import CPU, RATES, ROLES, TOLERANCE, Real, beyond_state, on_gpus, planned, seven_billion
from tests.support.shapes import BIG, qwen, shipped


def sampled(
    prompt: int, response: int, *, asked: tuple[int, int], held_out: tuple[int, int], gib: float, dtype: str = "float32"
) -> Config:
    """Rounds of `asked` (prompts, samples) and evaluations of `held_out`, with a cache of so many GiB."""
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": prompt},
            "rollout": {"max_tokens": response, "prompts": asked[0], "samples": asked[1], "cache_gib": gib},
            "model": {"dtype": dtype, "attention": "sdpa"},
            "prm": {"mini_batch": 2},
            "policy": {"mini_batch": 2},
            "eval": {"prompts": held_out[0], "samples": held_out[1]},
        }
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("hidden", "layers", "vocabulary", "prompt", "response", "asked", "held_out", "gib"),
    [
        (64, 4, 500, 64, 64, (4, 8), (40, 0), 1.0),  # the cache matters most
        (64, 4, 500, 64, 64, (4, 8), (40, 0), 0.004),  # and bounds the rows
        (64, 2, 32000, 16, 16, (4, 8), (40, 4), 1.0),  # the logits do
        # the prompts do, in several pieces
        pytest.param(256, 2, 500, 512, 8, (32, 2), (40, 0), 1.0, marks=pytest.mark.slow),
        (128, 2, 500, 256, 8, (16, 2), (8, 0), 1.0),  # and in one
    ],
)
def test_sampling_is_planned_to_a_tenth(
    hidden, layers, vocabulary, prompt, response, asked, held_out, gib, ragged
):  # fmt: skip
    config = sampled(prompt, response, asked=asked, held_out=held_out, gib=gib)
    architecture = qwen(hidden, layers, vocabulary, tied=True)
    plan, real = planned(config, architecture), Real(config, architecture)
    engine = LocalEngine(real.model, eos=[], cache_bytes=gib * GIB)

    def sample(prompts: int, n: int, temperature: float) -> None:
        # Of one length they need no mask.
        tokens = [[5] * (prompt - (ragged and i % 2)) for i in range(prompts)]
        seeds = list(range(prompts))
        engine.sample(tokens, n=n, temperature=temperature, max_tokens=response, seeds=seeds)

    def evaluate() -> None:
        sample(held_out[0], 1, GREEDY)
        if held_out[1]:
            sample(held_out[0], held_out[1], 1.0)

    assert beyond_state(plan, "rollout") == pytest.approx(real.peak(lambda: sample(*asked, 1.0)), rel=TOLERANCE)
    assert beyond_state(plan, "evaluation") == pytest.approx(real.peak(evaluate), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("hidden", "layers", "vocabulary", "prompt", "response"), [(64, 4, 500, 64, 64), (64, 2, 32000, 16, 16)]
)
def test_sharded_bfloat16_sampling_is_planned_to_a_tenth(hidden, layers, vocabulary, prompt, response):
    config = sampled(prompt, response, asked=(4, 8), held_out=(40, 0), gib=1.0, dtype="bfloat16")
    architecture = qwen(hidden, layers, vocabulary, tied=True)
    plan = planned(config, architecture)
    with joined(CPU, replicas=1, patience=60, sharded=True) as world:
        real = Real(config, architecture, world)
        engine = LocalEngine(real.model, eos=[], cache_bytes=GIB, world=world)

        def sample(prompts: int, n: int, temperature: float) -> None:
            tokens, seeds = [[5] * (prompt - i % 2) for i in range(prompts)], list(range(prompts))
            engine.sample(tokens, n=n, temperature=temperature, max_tokens=response, seeds=seeds)

        rollouts, evaluation = real.peak(lambda: sample(4, 8, 1.0)), real.peak(lambda: sample(40, 1, GREEDY))
    assert beyond_state(plan, "rollout") == pytest.approx(rollouts, rel=TOLERANCE)
    assert beyond_state(plan, "evaluation") == pytest.approx(evaluation, rel=TOLERANCE)


def test_evaluation_is_planned_with_all_of_its_prompts():
    small = Qwen2Config(**SHAPES["qwen2.5-0.5b"])
    config = shipped("qwen2.5-0.5b-gsm8k", "--run.device", "cpu")
    crew = crew_of(config, dict.fromkeys(ROLES, small))
    rows = {(asked.stage, asked.samples): rows_of(asked, config, crew).rows for asked in asked_of(config, 1)}
    assert rows == {("rollout", 8): 512, ("evaluation", 1): 1319}
    assert rows_of(asked_of(config, 4)[1], config, crew).rows == 330
    plan = planned(config, small, on_gpus(1))
    found = {stage.name: {i.name: i.nbytes for i in stage.items} for stage in plan.stages}
    assert found["evaluation"]["key-value cache"] > 2 * found["rollout"]["key-value cache"]
    # As many as the real engine samples together.
    more = shipped("qwen2.5-0.5b-gsm8k", "--eval.samples", "4", "--rollout.cache_gib", "2")
    cached = 2 * GIB // (1024 * 2 * 24 * 2 * 64 * 2)
    assert [rows_of(asked, more, crew).rows for asked in asked_of(more, 1)] == [cached // n * n for n in (8, 1, 4)]


def test_where_sampling_does_not_fit_no_micro_batch_is_blamed():
    config = seven_billion(rollout={"cache_gib": 100.0}, eval={"prompts": 8192})
    plan = planned(config, Qwen2Config(**BIG), on_gpus(8))
    said = verdict(plan, config)
    assert plan.peak.name == "evaluation"
    assert "rollout.cache_gib and eval.prompts and eval.samples decide that" in said
    assert "no model.tokens_per_micro_batch fits" not in said
    assert plan.largest
    assert not any("tokens_per_micro_batch" in change.what for change in plan.changes)


def test_a_smaller_cache_is_suggested_where_sampling_is_too_large():
    config = seven_billion(rollout={"cache_gib": 60.0}, eval={"prompts": 8192})
    changes = planned(config, Qwen2Config(**BIG), on_gpus(8)).changes
    # The largest half of what is configured that fits.
    assert any(change.fits and change.what == "--rollout.cache_gib 30.0" for change in changes)


def test_the_embedded_engine_moves_its_cache_three_times_and_a_server_once():
    big = Qwen2Config(**BIG)
    sizes = sizes_of(big)
    sdpa, eager, flash = (
        seven_billion(model={"attention": attention}) for attention in ("sdpa", "eager", "flash_attention_2")
    )
    served = seven_billion(rollout={"engine": "vllm"}, vllm={"servers": "http://10.0.0.2:8000"})
    assert moves_of(sdpa, sizes) == (3 if PACKS_GROUPS else 3 + 2 * 7)
    assert moves_of(eager, sizes) == 3 + 2 * 7  # 28 heads of queries, 4 of keys and values
    assert moves_of(flash, sizes) == 5
    assert moves_of(served, sizes) == 1
    moved = [planned(config, big, on_gpus(8)).durations[0].transfer for config in (flash, eager)]
    mean = lengths_of(eager)
    tokens = 2 * 256 * 4 / 8 * mean.response * (mean.prompt + mean.response / 2)  # half of the prompts pass the filter
    assert moved[1] - moved[0] == pytest.approx(12 * tokens * sizes.cache * 2 / RATES.bandwidth)


def test_launching_kernels_bounds_how_fast_the_embedded_engine_decodes():
    small = {"prompts": 8, "samples": 2, "max_tokens": 1000}
    sections: dict = {"rollout": small, "filter": {"low": 0, "high": 1}}
    sections |= {"prm": {"mini_batch": 16}, "policy": {"mini_batch": 16}}
    config = seven_billion(**sections)
    found = planned(config, qwen(64, 4, 500, tied=True), on_gpus(1))
    duration = found.durations[0]
    assert duration.launches == pytest.approx(1000 * 4 * LAUNCHES)
    assert duration.seconds >= duration.launches > 100 * duration.transfer
    assert any("to launch its kernels; assumed" in line for line in found.assumptions)
    served = seven_billion(**sections | {"rollout": {**small, "engine": "vllm"}, "vllm": {"servers": "http://a:1"}})
    assert planned(served, qwen(64, 4, 500, tied=True), on_gpus(1)).durations[0].launches == 0
