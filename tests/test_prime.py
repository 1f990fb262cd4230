"""Whole runs of tiny models: they resume to the bit, stop when asked to, say what they did, and survive mishaps."""

import json
import math
import os
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from prime_train import cli, prime
from prime_train.algorithm.advantages import Advantages
from prime_train.config.settings import load_config
from prime_train.data import arithmetic
from prime_train.models import optim
from prime_train.models.language_model import tiny_model
from prime_train.models.snapshot import save_model
from prime_train.run import setup
from prime_train.run.checkpoints import Checkpoints
from prime_train.run.directory import read_records
from prime_train.run.interrupt import Interrupted, Interrupts
from prime_train.run.setup import load_models
from tests.show.test_metrics import NAMES
from tests.support.paths import DATA, ROOT
from tests.support.runs import Sections, config_file, figures, final_weights
from tests.support.tiny import saved_model, weights

GSM8K = DATA / "gsm8k"


@pytest.fixture
def model(tmp_path):
    return saved_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The runs whose curves were asked for; drawing them, which test_report does, takes longer than a run."""
    asked: list[list[Path]] = []
    monkeypatch.setattr("prime_train.show.report.draw", lambda runs: asked.append(runs) or "a picture")
    return asked


@pytest.fixture
def half_right(monkeypatch):
    """An outcome that a random model gets right half the time: an odd sum of characters."""
    monkeypatch.setattr(arithmetic, "outcome", lambda reference, response: float(sum(map(ord, response)) % 2))


# -- resuming --


@pytest.mark.parametrize("update", ["after", "before"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, model, half_right, update):
    straight, resumed = (
        config_file(tmp_path / name, model, prm={"lr": 1e-3, "mini_batch": 4, "update": update})
        for name in ("straight", "resumed")
    )
    assert cli.main(["run", straight, "--run.steps", "4"]) == 0
    assert cli.main(["run", resumed, "--run.steps", "2"]) == 0
    assert cli.main(["run", resumed, "--run.steps", "4"]) == 0
    assert figures(tmp_path / "resumed") == figures(tmp_path / "straight")
    assert [record["step"] for record in figures(tmp_path / "straight")] == [0, 1, 2, 3, 4]
    assert torch.equal(final_weights(straight), final_weights(resumed))
    samples = [(tmp_path / name / "run" / "samples.jsonl").read_text() for name in ("straight", "resumed")]
    assert samples[0] == samples[1]


def test_a_run_that_was_killed_between_checkpoints_repeats_the_lost_steps(tmp_path, model, half_right, monkeypatch):
    straight, killed = (config_file(tmp_path / name, model) for name in ("straight", "killed"))
    words = ["--run.steps", "5", "--run.checkpoint_every", "2"]
    assert cli.main(["run", straight, *words]) == 0
    collect, rounds = prime.collect, []

    def power_cut(*args, **options):
        rounds.append(1)
        if len(rounds) == 4:
            raise MemoryError
        return collect(*args, **options)

    monkeypatch.setattr(prime, "collect", power_cut)
    with pytest.raises(MemoryError):
        cli.main(["run", killed, *words])
    assert [record["step"] for record in figures(tmp_path / "killed")] == [0, 1, 2, 3]
    assert cli.main(["run", killed, *words]) == 0
    assert figures(tmp_path / "killed") == figures(tmp_path / "straight")


def test_a_complete_run_says_so_and_loads_nothing(tmp_path, model, half_right, capsys, monkeypatch):
    path = config_file(tmp_path, model)
    assert cli.main(["run", path]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    monkeypatch.setattr(prime, "train", lambda *_: pytest.fail("trained again"))
    assert cli.main(["run", path]) == 0
    assert capsys.readouterr().out.startswith("complete: 3 steps in ")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_another_seed_is_another_run(tmp_path, model, half_right):
    for seed in (0, 1):
        path = config_file(tmp_path / str(seed), model)
        assert cli.main(["run", path, "--run.seed", str(seed), "--run.steps", "1"]) == 0
    assert figures(tmp_path / "0")[1] != figures(tmp_path / "1")[1]


# -- stopping --


def test_ctrl_c_saves_and_exits_130_and_the_same_command_goes_on(tmp_path, model, capsys):
    path = config_file(tmp_path, model, eval={"every": 0, "prompts": 1})
    command = [sys.executable, "-m", "prime_train", "run", path, "--run.steps", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while len(read_records(metrics)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on from here" in out
    assert "Traceback" not in err
    [*_, last] = read_records(metrics)
    assert last["step"] >= 2
    total = last["step"] + 2
    assert cli.main(["run", path, "--run.steps", str(total)]) == 0
    assert [record["step"] for record in read_records(metrics)] == list(range(total + 1))


def test_a_stop_before_the_first_step_changes_nothing_of_the_run(tmp_path, model, half_right, monkeypatch):
    straight, stopped = (config_file(tmp_path / name, model) for name in ("straight", "stopped"))
    assert cli.main(["run", straight]) == 0
    evaluate = prime.evaluate

    def ctrl_c(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prime, "evaluate", ctrl_c)
        assert cli.main(["run", stopped]) == 130
    assert figures(tmp_path / "stopped") == []
    assert cli.main(["run", stopped]) == 0
    assert figures(tmp_path / "stopped") == figures(tmp_path / "straight")


def test_the_first_signal_is_a_request_and_ctrl_c_after_it_stops_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested
        with pytest.raises(Interrupted):
            interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)  # of torchrun too, after the scheduler's
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -- what can be configured --

VARIANTS: dict[str, Sections] = {
    "outcomes alone": {"advantage": {"process_coef": 0.0}},
    "process rewards alone": {"advantage": {"outcome_coef": 0.0}},
    "dpo": {"prm": {"loss": "dpo", "mini_batch": 8}},
    "offline PRM": {"prm": {"update": "none"}},
    "policy as reference": {"prm": {"reference": "policy"}, "rollout": {"temperature": 0.8}},
    "steps": {"prm": {"granularity": "step", "step_pattern": "[0-9]=", "max_log_ratio": 0.1}},
    "whole": {"prm": {"granularity": "whole"}},
    "grpo": {"advantage": {"estimator": "grpo", "process_gamma": 0.9}},
    "reinforce": {"advantage": {"estimator": "reinforce", "whiten": False}},
    "kl and entropy": {"policy": {"kl_coef": 0.1, "entropy_coef": 0.01}, "rollout": {"temperature": 0.8}},
    "kl without a PRM": {"policy": {"kl_coef": 0.1}, "advantage": {"process_coef": 0.0}},
    "two epochs": {"policy": {"epochs": 2, "dual_clip": 3.0, "aggregate": "fixed"}},
    "16 bits and checkpointing": {"model": {"dtype": "bfloat16", "blocks": ["checkpoint"]}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_step_of_every_kind_has_finite_figures_and_moves_the_weights(tmp_path, model, half_right, changes):
    path = config_file(tmp_path, model, **changes)
    words = ["--run.steps", "1", "--eval.every", "0", "--policy.mini_batch", "4"]
    assert cli.main(["run", path, *words]) == 0
    [_, record] = figures(tmp_path)
    assert all(math.isfinite(value) for value in record.values())
    assert {name for found in read_records(tmp_path / "run" / "metrics.jsonl") for name in found} <= NAMES | {"step"}
    assert record["policy/grad_norm"] > 0
    assert record["skipped/policy"] == record.get("skipped/prm", 0) == 0
    assert ("prm/pairwise_accuracy" in record) == (load_config(path).advantage.process_coef > 0)


def test_the_prm_begins_at_ln_2_with_a_share_of_nothing(tmp_path, model, half_right):
    path = config_file(tmp_path, model, prm={"mini_batch": 8})
    assert cli.main(["run", path, "--run.steps", "2"]) == 0
    [_, first, second] = figures(tmp_path)
    assert first["prm/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward/max_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert first["advantage/process_share"] == pytest.approx(0, abs=1e-3)
    assert second["reward/max_log_ratio"] > 1e-4
    assert second["advantage/process_share"] > 0.01


def test_sampled_log_probs_are_those_that_the_trainer_scores(tmp_path, model, half_right):
    path = config_file(tmp_path, model, rollout={"temperature": 0.7})
    assert cli.main(["run", path]) == 0
    for record in figures(tmp_path)[1:]:
        assert record["sampler/ratio_max"] == pytest.approx(1, abs=1e-4)


def test_evaluating_the_newest_checkpoint_repeats_the_runs_own_figures(tmp_path, model, half_right, capsys):
    path = config_file(tmp_path, model)
    assert cli.main(["run", path]) == 0
    last = figures(tmp_path)[-1]
    capsys.readouterr()
    assert cli.main(["eval", path]) == 0
    assert capsys.readouterr().out == f"step 3: greedy {last['eval/greedy']:.3f}, sampled {last['eval/sampled']:.3f}\n"


def test_evaluating_loads_the_policy_alone(tmp_path, model, half_right, monkeypatch):
    path = config_file(tmp_path, model)
    assert cli.main(["run", path, "--run.steps", "1"]) == 0
    load_model, loaded, read = setup.load_model, [], dcp.FileSystemReader.read_data

    def noted(self, plan, planner):
        assert all(item.storage_index.fqn.startswith("policy.model.") for item in plan.items)
        return read(self, plan, planner)

    monkeypatch.setattr(setup, "load_model", lambda *args, **keys: loaded.append(args) or load_model(*args, **keys))
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", noted)
    monkeypatch.setattr(optim, "adamw", lambda *args, **keys: pytest.fail("made an optimizer"))
    assert cli.main(["eval", path]) == 0
    assert len(loaded) == 1


# -- mishaps --


def test_an_update_that_is_not_finite_is_skipped_kept_and_told_and_the_run_goes_on(
    tmp_path, model, half_right, monkeypatch, capsys
):
    advantages, calls = prime.advantages, []

    def first_is_nan(*args):
        calls.append(1)
        found = advantages(*args)
        return Advantages(token=found.token * float("nan"), process_share=0.0) if len(calls) == 1 else found

    monkeypatch.setattr(prime, "advantages", first_is_nan)
    assert cli.main(["run", config_file(tmp_path, model)]) == 0
    records = figures(tmp_path)
    assert [record.get("skipped/policy") for record in records] == [None, 2, 0, 0]
    assert all(math.isfinite(value) for record in records[2:] for value in record.values())
    assert (tmp_path / "run" / "nonfinite" / "step-000001.pt").exists()
    assert "warning: step 1: an update was skipped" in capsys.readouterr().out


def test_a_step_without_a_prompt_that_passes_trains_nothing_and_says_so(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(arithmetic, "outcome", lambda reference, response: 0.0)
    path = config_file(tmp_path, model, filter={"low": 0.2, "max_prompts": 2})
    untrained = torch.cat([weights(net) for net, _ in load_models(load_config(path)).trained.values()])
    assert cli.main(["run", path]) == 0
    out = capsys.readouterr().out
    assert "warning: step 1: 0 of 2 prompts passed the filter, 4 were tried (4 too hard)" in out
    assert [record.get("filter/kept") for record in figures(tmp_path)] == [None, 0, 0, 0]
    assert torch.equal(final_weights(path), untrained)


def test_verifier_errors_score_0_and_are_counted(tmp_path, model, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "def score(prompt, response):\n    if len(response) % 2:\n        raise ValueError(response)\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = config_file(tmp_path, model, verify={"custom": "picky:score", "workers": 1})
    assert cli.main(["run", path, "--run.steps", "2"]) == 0
    errors = 0
    for record in figures(tmp_path)[1:]:
        errors += record.get("verify/error", 0)
        assert record.get("verify/error", 0) + record.get("verify/ok", 0) == 8
        assert record["accuracy/before_filter"] == pytest.approx(record.get("verify/ok", 0) / 8)
    assert 0 < errors < 16


# -- from demonstrations, and from text --


def test_sft_then_prime_then_curves_are_one_command(tmp_path, drawn, capsys):
    path = config_file(tmp_path, "sft", sft={"base": "tiny:16x1x2", "data": "arithmetic", "steps": 2, "batch": 4})
    assert cli.main(["run", path]) == 0
    assert [record["step"] for record in read_records(tmp_path / "run" / "sft" / "metrics.jsonl")] == [1, 2]
    assert [record["step"] for record in figures(tmp_path)] == [0, 1, 2, 3]
    assert drawn == [[tmp_path / "run"]]
    assert capsys.readouterr().out.rstrip().endswith("curves in a picture")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_prime_on_gsm8k_has_finite_figures(tmp_path):
    if not GSM8K.is_dir():
        pytest.skip(f"needs {GSM8K}")
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", "<user>", "<bot>", *string.printable])}
    characters = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>",
        additional_special_tokens=["<user>", "<bot>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    save_model(tiny_model("16x1x2", tokenizer, 0), tokenizer, tmp_path / "model")
    path = config_file(
        tmp_path, str(tmp_path / "model"), verify={"workers": 1}, model={"tokens_per_micro_batch": 2048},
        data={
            "train": str(GSM8K / "train.jsonl"), "eval": str(GSM8K / "test.jsonl"), "max_prompt_tokens": 250,
        },
    )  # fmt: skip
    assert cli.main(["run", path, "--run.steps", "2"]) == 0
    records = figures(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(math.isfinite(value) for record in records for value in record.values())
    for record in records[1:]:
        assert (record["filter/kept"], record["verify/ok"]) == (2, 8)
    latest = Checkpoints(tmp_path / "run" / "checkpoints", keep=9).latest()
    progress = json.loads((latest / "progress.json").read_text())
    assert progress["position"] - progress["too_long"] == 4


def test_a_run_is_not_gone_on_with_under_another_configuration(tmp_path, model, half_right, capsys):
    config = config_file(tmp_path, model)
    assert cli.main(["run", config, "--run.steps", "1"]) == 0
    assert cli.main(["run", config, "--prm.beta", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "prm.beta: the run in" in said
    assert "was started with 0.05, not 0.1" in said
    assert cli.main(["run", config, "--eval.prompts", "1", "--run.steps", "2", "--rollout.cache_gib", "0.02"]) == 0


def test_evaluating_before_there_is_a_model_says_what_makes_one(tmp_path, capsys):
    config = config_file(tmp_path, "sft", sft={"base": "tiny:16x1x2", "data": "arithmetic"})
    assert cli.main(["eval", config]) == 2
    assert "prime-train run" in capsys.readouterr().err
