"""Several processes of a run: what they tell each other, sharded models, and results that do not depend on how many."""

import os
import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_train.algorithm import policy, prm
from prime_train.algorithm.scoring import token_logp
from prime_train.config.keys import PRM, Policy
from prime_train.models import language_model, optim
from prime_train.models.distributed import ALONE, OtherProcessFailed, fill, joined, shard, whole
from prime_train.models.language_model import LanguageModel, add_adapters
from prime_train.models.packing import Layout
from prime_train.records import Scores
from prime_train.rollout.sampler import LocalEngine
from tests.support.processes import ProcessFailed, run_ranks
from tests.support.runs import assert_close, config_file, figures, run
from tests.support.tiny import CPU, EOS, batch, model, saved_model, weights

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def join(replicas: int = 1, patience: float = 60.0, sharded: bool = True):
    return joined(CPU, replicas=replicas, patience=patience, sharded=sharded)


# -- what processes tell each other --


def exchange() -> dict[str, Any]:
    with join() as world:
        rank = world.rank

        def odd_fails() -> int:
            if rank % 2:
                raise KeyError(f"rank {rank}")
            return rank

        found: dict[str, Any] = {
            "each": world.each(lambda: rank * 10),
            "spread": world.spread(list("abcdefg"), lambda share: [f"{item}{rank}" for item in share]),
            "nothing": world.spread([], lambda share: list(share)),
            "first": world.first(lambda: f"of {rank}"),
            "sum": world.sum(torch.tensor([1.0, float(rank)])).tolist(),
            "max": world.max(torch.tensor([-5.0, float(rank)])).tolist(),
            "any": (world.any(rank == 2), world.any(False)),
            "apart": world.apart().each(lambda: rank),
        }
        try:
            world.each(odd_fails)
        except KeyError as error:
            found["error"] = str(error)
        return found


def test_processes_share_out_work_and_agree_on_results():
    found = run_ranks(3, exchange)
    for rank in range(3):
        assert found[rank]["each"] == [0, 10, 20]
        assert found[rank]["spread"] == ["a0", "b1", "c2", "d0", "e1", "f2", "g0"]
        assert found[rank]["nothing"] == []
        assert found[rank]["first"] == "of 0"
        assert found[rank]["sum"] == [3.0, 3.0]
        assert found[rank]["max"] == [-5.0, 2.0]
        assert found[rank]["any"] == (True, False)
        assert found[rank]["apart"] == [0, 1, 2]


def test_what_one_process_raises_all_raise():
    assert [found["error"] for found in run_ranks(3, exchange)] == ["'rank 1'"] * 3


class Unpicklable(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def fail_oddly() -> str:
    with join() as world:

        def compute() -> None:
            if world.rank == 1:
                raise Unpicklable("this", "that")

        try:
            world.each(compute)
        except Unpicklable as error:
            return f"own: {error}"
        except OtherProcessFailed as error:
            return str(error)
    return "nothing"


def test_an_error_that_cannot_travel_is_told_in_words():
    assert run_ranks(2, fail_oddly) == ["process 1: Unpicklable: this and that", "own: this and that"]


def stay_away() -> None:
    with join(patience=2.0) as world:
        if world.rank == 1:
            time.sleep(30)
        world.each(lambda: None)


def test_a_process_that_does_not_come_is_named_after_the_time_limit():
    with pytest.raises(ProcessFailed, match=r"(?s)Rank 1 failed to pass monitoredBarrier|rank.*1.*monitoredBarrier"):
        run_ranks(2, stay_away, deadline=20.0)


def go_missing() -> None:
    with join(patience=2.0) as world:
        if world.rank == 1:
            time.sleep(30)

        def fail() -> None:
            raise ValueError("the reason")

        world.each(fail)


def test_a_process_that_cannot_tell_the_others_of_its_error_raises_it_all_the_same():
    with pytest.raises(ProcessFailed, match=r"(?s)rank 0: .*ValueError: the reason.*rank 1"):
        run_ranks(2, go_missing, deadline=20.0)


def time_limits() -> list[float]:
    with join(replicas=2, patience=7.0) as world:
        assert world.mesh is not None
        groups = [world.group, *(world.mesh.get_group(name) for name in ("replicate", "shard"))]
        backends = [group._get_backend(CPU) for group in groups]
        return [backend.options._timeout.total_seconds() for backend in backends]


def test_every_group_has_the_time_limit():
    assert run_ranks(4, time_limits) == [[7.0, 7.0, 7.0]] * 4


def test_one_process_needs_nobody():
    assert ALONE.each(lambda: 3) == [3]
    assert ALONE.spread("ab", lambda share: [item.upper() for item in share]) == ["A", "B"]
    assert ALONE.first(lambda: 4) == 4
    assert ALONE.any(True)
    with joined(CPU, replicas=1, patience=1.0, sharded=False) as world:
        assert (world.rank, world.size, world.mesh) == (0, 1, None)


# -- sharded models --

CASES = {
    "fp32": {},
    "tied": {"tied": True},
    "hsdp": {"replicas": 2},
    "offload": {"offload": True},
    "checkpoint": {"blocks": ("checkpoint",)},
    "lora": {"lora": 2},
}


def made(seed: int, *, tied: bool = False, lora: int = 0, blocks: tuple[str, ...] = (), empty: bool = False) -> Any:
    """A model; empty on the meta device."""
    with torch.device("meta" if empty else "cpu"):
        net = model(seed, "16x2x2")
        if tied:
            net.transformer.config.tie_word_embeddings = True
            net.transformer.lm_head.weight = net.transformer.get_input_embeddings().weight
    if lora:
        add_adapters(net, lora)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name, parameter in net.named_parameters():
                if "lora_B" in name and not empty:
                    torch.nn.init.normal_(parameter, std=0.1)
    language_model.work_on_blocks(net, blocks)
    return net


def learnt(replicas: int = 1, offload: bool = False, **kind: Any) -> dict[str, Any]:
    """What three PRM and three policy steps leave, on this process's share of the work."""
    with join(replicas, sharded="WORLD_SIZE" in os.environ) as world:
        nets: list[LanguageModel] = []
        for seed in (0, 1):
            net = made(seed, **kind, empty=world.mesh is not None)
            if world.mesh is not None:
                shard(net, world, offload=offload)
                fill(net, made(seed, **kind) if world.leads else None, world, offload=offload)
            nets.append(net)
        actor, judge = nets
        layout, made_of = Layout(budget=60, world=world), batch(groups=3, K=4)
        old, entropy = token_logp(actor, made_of.sequences, layout, entropy=True)
        reference, _ = token_logp(judge, made_of.sequences, layout)
        scores = Scores(old=old, entropy=entropy, reference=reference - 0.1, reference_tempered=None)
        advantages = torch.randn(len(old), generator=torch.Generator().manual_seed(3))
        optimizers = [optim.adamw(net, lr=1e-3, weight_decay=0.1) for net in nets]
        figures: list[float] = []
        for step in range(3):
            rewards, learned = prm.learn(PRM(mini_batch=5), judge, optimizers[1], made_of, reference - 0.1, layout)
            updated = policy.update(
                Policy(mini_batch=7), actor, optimizers[0], made_of, scores, advantages, layout, temperature=1.0,
                max_tokens=12, seed=step,
            )  # fmt: skip
            figures += [learned.loss, learned.grad_norm, updated.loss, updated.grad_norm, updated.approx_kl]
            figures += [updated.clip_fraction, updated.ratio_max]
        with torch.no_grad():
            final = torch.cat([whole(p.detach()).flatten().cpu() for net in nets for p in net.parameters()])
        return {
            "figures": torch.tensor(figures), "rewards": rewards.token, "logits": rewards.logits, "weights": final,
            "scores": torch.stack([old, entropy]), "moved": float((final - begun(kind)).abs().max()),
        }  # fmt: skip


def begun(kind: dict[str, Any]) -> torch.Tensor:
    return torch.cat([weights(made(seed, **kind)) for seed in (0, 1)])


@pytest.mark.parametrize(("case", "size"), [(case, 4 if case in ("fp32", "hsdp") else 2) for case in CASES])
def test_learning_does_not_depend_on_the_number_of_processes(case, size):
    """Three steps of PRM and policy: scores, losses, norms, rewards and weights, against one process without FSDP."""
    options = CASES[case]
    kind = {name: value for name, value in options.items() if name not in ("replicas", "offload")}
    alone = learnt(**kind)
    assert alone["moved"] > 1e-3
    for found in run_ranks(size, learnt_on_ranks, options, deadline=100.0):
        for name in ("scores", "figures", "rewards", "logits"):
            torch.testing.assert_close(found[name], alone[name], **ROUNDING, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=1e-4)


def learnt_on_ranks(options: dict[str, Any]) -> dict[str, Any]:
    return learnt(**options)


def sampled() -> list[Any]:
    asked = [[5 + i, 6, 7][: 1 + i % 3] for i in range(9)]
    with join(sharded="WORLD_SIZE" in os.environ) as world:
        net = made(0, empty=world.mesh is not None)
        if world.mesh is not None:
            shard(net, world)
            fill(net, made(0) if world.leads else None, world)
        engine = LocalEngine(net, eos=[EOS], cache_bytes=2**20, world=world)
        found = [
            engine.sample(asked, n=3, temperature=temperature, max_tokens=12, seeds=range(100, 109))
            for temperature in (1.0, 0.0)
        ]
        # Weights are sharded again afterwards, and can be learnt.
        logp, _ = token_logp(net, batch().sequences, Layout(budget=60, world=world))
        return [[(r.tokens, r.finished) for of in found for group in of for r in group], logp]


def test_what_is_sampled_does_not_depend_on_the_number_of_processes():
    responses, logp = sampled()
    assert len({tokens for tokens, _ in responses}) > 20
    for found, scored in run_ranks(3, sampled):
        assert found == responses
        torch.testing.assert_close(scored, logp, **ROUNDING)


# -- whole runs --


@pytest.mark.slow
def test_losses_of_five_steps_are_those_of_one_process_with_two_and_with_four(tmp_path):
    start = saved_model(tmp_path / "model", shape="16x2x2")
    for size in (1, 2, 4):
        path = config_file(
            tmp_path / str(size), start, rollout={"prompts": 4, "samples": 4}, prm={"mini_batch": 8},
            policy={"mini_batch": 8, "kl_coef": 0.1, "entropy_coef": 0.01}, model={"tokens_per_micro_batch": 64},
        )  # fmt: skip
        words = ["run", path, "--run.steps", "5", "--run.checkpoint_every", "0"]
        assert run_ranks(size, run, words, deadline=200.0) == [0] * size
    wanted = figures(tmp_path / "1")
    assert len(wanted) == 6
    for size in (2, 4):
        assert_close(figures(tmp_path / str(size)), wanted, rel=1e-5)


@pytest.mark.slow
def test_sft_and_prime_in_16_bits_run_over_two_processes(tmp_path):
    path = config_file(
        tmp_path, "sft", sft={"base": "tiny:16x1x2", "data": "arithmetic", "steps": 2, "batch": 4},
        model={"dtype": "bfloat16"},
    )  # fmt: skip
    assert run_ranks(2, run, ["run", path, "--run.steps", "2"], deadline=100.0) == [0, 0]
    assert [record["step"] for record in figures(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "run" / "sft" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_adapters_train_over_two_processes_and_are_exported_merged(tmp_path):
    start = saved_model(tmp_path / "model", shape="16x2x2")
    for size in (1, 2):
        path = config_file(tmp_path / str(size), start, model={"lora": 2, "policy": start, "dtype": "float32"})
        words = ["run", path, "--run.steps", "2", "--eval.every", "0", "--eval.prompts", "1"]
        assert run_ranks(size, run, words, deadline=100.0) == [0] * size
        out = tmp_path / f"exported-{size}"
        assert run_ranks(1, run, ["export", path, "--out", str(out), "--dtype", "float32"], deadline=60.0) == [0]
    assert_close(figures(tmp_path / "2"), figures(tmp_path / "1"), rel=1e-4)
    before, one, two = (
        AutoModelForCausalLM.from_pretrained(path) for path in (start, tmp_path / "exported-1", tmp_path / "exported-2")
    )
    tokens = torch.tensor([[6, 7, 8, 9]])
    logits = [net(input_ids=tokens).logits for net in (before, one, two)]
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert one.state_dict().keys() == before.state_dict().keys()


@pytest.mark.slow
def test_offloaded_models_give_the_figures_of_the_others(tmp_path):
    start = saved_model(tmp_path / "model")
    for name, offload in (("none", []), ("all", ["policy", "prm", "reference"])):
        path = config_file(tmp_path / name, start, model={"offload": offload, "policy": start, "dtype": "float32"})
        assert run_ranks(2, run, ["run", path, "--run.steps", "2"], deadline=100.0) == [0, 0]
    assert figures(tmp_path / "all") == figures(tmp_path / "none")


@pytest.mark.slow
def test_compiled_blocks_give_the_figures_of_the_others(tmp_path):
    start = saved_model(tmp_path / "model")
    for name, blocks in (("none", []), ("compiled", ["compile"])):
        path = config_file(tmp_path / name, start, model={"blocks": blocks, "policy": start, "dtype": "float32"})
        words = ["run", path, "--run.steps", "1", "--eval.prompts", "1"]
        assert run_ranks(1, run, words, deadline=250.0) == [0]
    compiled, plain = (figures(tmp_path / name)[1] for name in ("compiled", "none"))
    for name in ("prm/loss", "prm/grad_norm", "policy/loss", "policy/grad_norm"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-3), name


def test_a_model_without_a_mesh_is_refused_16_bits_of_its_fp32_weights():
    net = model()
    net.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="bfloat16 copies of fp32 weights are FSDP's"):
        shard(net, ALONE)


def test_offloaded_weights_do_not_decide_where_is_computed():
    with join() as world:
        net = shard(made(0, empty=True), world, offload=True)
        assert net.transformer.device == torch.device("meta")
        assert net.device == world.device == CPU
