"""The SFT stage: what it learns from, when it is done, and that it resumes."""

import math
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_train import cli, sft
from prime_train.config.keys import SFT
from prime_train.config.settings import load_config
from prime_train.models.packing import pack_sequences
from prime_train.run.directory import read_records
from prime_train.run.interrupt import Interrupts
from prime_train.run.setup import joined_world
from prime_train.show.view import View
from tests.show.test_metrics import NAMES
from tests.support.runs import MEASURED
from tests.support.tiny import (
    FORMULA_TOLERANCE,
    LAYOUTS,
    TOKENIZER,
    full_logp,
    gradient,
    model,
    pairs,
    weights,
    write_jsonl,
)


def config_file(directory, **changes):
    """An SFT stage of six steps on generated chains."""
    keys = {"base": '"tiny:16x1x2"', "data": '"arithmetic"', "steps": "6", "batch": "4", "lr": "1e-2"} | changes
    directory.mkdir(exist_ok=True)
    path = directory / "run.toml"
    path.write_text(
        f'[run]\ndir = "{directory / "run"}"\ndevice = "cpu"\n[model]\npolicy = "sft"\n'
        '[data]\ntrain = "arithmetic"\neval = "arithmetic"\nsystem = "none"\n[sft]\n'
        + "".join(f"{key} = {value}\n" for key, value in keys.items())
    )
    return str(path)


def records(directory):
    found = read_records(directory / "run" / "sft" / "metrics.jsonl")
    return [{name: v for name, v in record.items() if not name.startswith(MEASURED)} for record in found]


def made(directory):
    """Weights of the model that the stage leaves."""
    found = AutoModelForCausalLM.from_pretrained(directory / "run" / "sft" / "model", dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in found.parameters()])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_loss_is_the_mean_over_all_answers_tokens_and_over_them_alone(layout):
    net, sequences = model(), pack_sequences(pairs(9, seed=4))
    logp, _ = full_logp(net, sequences)
    want = gradient(net, -logp.mean())
    losses = []
    for loss in sft.losses(net, sequences, layout):
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(-logp.mean().item(), rel=1e-5)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(found, want, **FORMULA_TOLERANCE)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nearly_nothing():
    config = SFT(lr=2.0)
    rates = [sft.learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([2.0 * step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(1.0, abs=0.05)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_the_learning_rate_is_positive_at_every_step_of_any_number(steps):
    rates = [sft.learning_rate(SFT(lr=1.0), step, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)


def test_learning_from_demonstrations_lowers_the_loss(tmp_path):
    assert cli.main(["sft", config_file(tmp_path, steps=60, batch=8)]) == 0
    found = [record["sft/loss"] for record in records(tmp_path)]
    assert found[0] == pytest.approx(math.log(len(TOKENIZER)), abs=0.2)
    assert sum(found[-5:]) / 5 < 0.75 * found[0]


def test_a_stage_that_is_done_is_not_done_again(tmp_path, capsys, monkeypatch):
    path = config_file(tmp_path)
    assert cli.main(["sft", path]) == 0
    before = made(tmp_path)
    monkeypatch.setattr(sft, "load_base", lambda _: pytest.fail("trained again"))
    assert cli.main(["sft", path]) == 0
    assert f"SFT model in {tmp_path / 'run' / 'sft' / 'model'}" in capsys.readouterr().out
    assert torch.equal(made(tmp_path), before)


def test_a_stopped_stage_goes_on_to_the_same_model(tmp_path, monkeypatch):
    straight, stopped = (config_file(tmp_path / name) for name in ("straight", "stopped"))
    assert cli.main(["sft", straight]) == 0
    learning_rate = sft.learning_rate

    def ctrl_c(config, step, steps):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(config, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "learning_rate", ctrl_c)
        assert cli.main(["sft", stopped]) == 130
    assert not (tmp_path / "stopped" / "run" / "sft" / "model").exists()
    assert [record["step"] for record in records(tmp_path / "stopped")] == [1, 2, 3]
    assert cli.main(["sft", stopped]) == 0
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    assert torch.equal(made(tmp_path / "stopped"), made(tmp_path / "straight"))


def test_time_memory_and_mfu_are_logged_saves_with_the_step_after_them(tmp_path):
    assert cli.main(["sft", config_file(tmp_path, steps=3)]) == 0
    first, *others = read_records(tmp_path / "run" / "sft" / "metrics.jsonl")
    for record in (first, *others):
        assert record.keys() <= NAMES | {"step"}
        assert 0 < record["time/sft"] <= record["time/step"]
        assert record["memory/sft_gib"] > 0
        assert 0 < record["throughput/mfu_sft"] == record["throughput/mfu"] < 1
        assert record["throughput/tokens_per_s"] > 0
    assert "time/checkpoint" not in first
    for record in others:
        assert record["time/step"] == pytest.approx(record["time/sft"] + record["time/checkpoint"])


def test_epochs_are_passes_over_the_data(tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", [{"problem": f"{i}+1", "solution": f"#{i + 1}"} for i in range(7)])
    path = config_file(tmp_path, data=f'"{data}"', steps=0, epochs=2.0, batch=3)
    assert cli.main(["sft", path]) == 0
    assert len(records(tmp_path)) == 5  # of 3 examples, for 2 × 7


def test_a_loss_that_is_not_finite_is_skipped_kept_and_told(tmp_path, monkeypatch, capsys):
    def spoiled(net, *args):
        return (loss * float("nan") for loss in losses(net, *args))

    losses = sft.losses
    monkeypatch.setattr(sft, "losses", spoiled)
    config = load_config(config_file(tmp_path, steps=1))
    with joined_world(config) as world:
        sft.train(config, View(), world, Interrupts())
    assert (tmp_path / "run" / "sft" / "nonfinite" / "step-000001.pt").exists()
    assert "an update was skipped" in capsys.readouterr().out
    assert torch.equal(made(tmp_path), weights(model(shape="16x1x2")))
