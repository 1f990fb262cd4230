"""Checkpoints and run directories: what is saved comes back, to the bit, or is not there at all."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_train import models, optim
from prime_train.checkpoints import Checkpoints, Progress, progress_at
from prime_train.config import Config, Run
from prime_train.models import LanguageModel, save_model
from prime_train.rundir import RunDirectory, completed, read_records
from prime_train.scoring import token_logp

from .tiny import TOKENIZER, WIDE, batch, model, weights

PROGRESS = Progress(step=3, position=17, too_long=2, seconds=1.5)


def trained(seed=0, steps=0, tied=False):
    net = model(seed)
    if tied:
        config = net.transformer.config
        config.tie_word_embeddings = True
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        assert net.transformer.lm_head.weight is net.transformer.model.embed_tokens.weight
    optimizer = optim.adamw(net, lr=1e-2, weight_decay=0.1)
    learn(net, optimizer, steps)
    return net, optimizer


def learn(net, optimizer, steps):
    for _ in range(steps):
        logits = net.transformer(input_ids=batch().sequences.tokens[None]).logits
        assert optim.step(net, optimizer, [-logits.log_softmax(-1)[..., 7].mean()], grad_clip=1.0).applied


def assert_same(one, other):
    assert torch.equal(weights(one[0]), weights(other[0]))
    states = [optimizer.state_dict()["state"] for _, optimizer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, moments in states[0].items():
        for key, value in moments.items():
            assert torch.equal(value, states[1][name][key]), (name, key)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_optimizers_and_progress_come_back_to_the_bit(tmp_path, tied):
    saved = {"policy": trained(0, 3, tied), "prm": trained(1, 2, tied)}
    path = Checkpoints(tmp_path, keep=2).save(PROGRESS, saved)
    loaded = {"policy": trained(5, 0, tied), "prm": trained(6, 1, tied)}
    assert Checkpoints(tmp_path, keep=2).load(path, loaded) == PROGRESS
    for name in saved:
        learn(*saved[name], 2)
        learn(*loaded[name], 2)
        assert_same(saved[name], loaded[name])


def test_saving_changes_nothing_even_before_the_first_step(tmp_path):
    for steps in (0, 2):
        saved, other = trained(0, steps), trained(0, steps)
        Checkpoints(tmp_path, keep=2).save(PROGRESS, {"policy": saved})
        learn(*saved, 2)
        learn(*other, 2)
        assert_same(saved, other)


def test_a_checkpoint_of_before_the_first_step_goes_on_like_a_fresh_start(tmp_path):
    saved, loaded = trained(0), trained(5)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.load(checkpoints.save(Progress(), {"policy": saved}), {"policy": loaded})
    fresh = trained(0)
    learn(*fresh, 2)
    learn(*loaded, 2)
    assert_same(fresh, loaded)


def test_the_newest_few_are_kept(tmp_path):
    checkpoints, net = Checkpoints(tmp_path, keep=2), trained()
    assert checkpoints.latest() is None
    for step in (1, 9, 10, 100):
        checkpoints.save(Progress(step=step), {"policy": net})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    assert checkpoints.latest() == tmp_path / "step-000100"


def test_a_save_that_is_cut_off_leaves_the_newest_complete_one(tmp_path, monkeypatch):
    checkpoints, net = Checkpoints(tmp_path, keep=2), trained()
    checkpoints.save(Progress(step=1), {"policy": net})

    def full(*args, **options):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("prime_train.checkpoints.json.dumps", full)
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(Progress(step=2), {"policy": net})
    assert checkpoints.latest() == tmp_path / "step-000001"
    checkpoints.save(Progress(step=3), {"policy": net})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


# -- models in the format of transformers --


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_same_model_to_transformers_and_to_us(tmp_path, tied):
    net, _ = trained(0, 1, tied)
    save_model(net, TOKENIZER, tmp_path / "model")
    tokens = torch.tensor([[6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(plain(input_ids=tokens).logits, net.transformer(input_ids=tokens).logits)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": "sdpa"}
    for learns in (False, True):
        ours = models.load_model(str(tmp_path / "model"), **options, trained=learns)
        assert torch.equal(token_logp(ours, batch().sequences, WIDE)[0], token_logp(net, batch().sequences, WIDE)[0])
        assert all(p.requires_grad == learns for p in ours.parameters())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(TOKENIZER)


def test_a_model_that_is_trained_keeps_fp32_weights_and_computes_in_16_bits(tmp_path):
    save_model(model(), TOKENIZER, tmp_path / "model")
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "attention": "sdpa"}
    learns, frozen = (models.load_model(str(tmp_path / "model"), **options, trained=t) for t in (True, False))
    assert {p.dtype for p in learns.parameters()} == {torch.float32}
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    exact, _ = token_logp(model(), batch().sequences, WIDE)
    for net in (learns, frozen):
        logp, _ = token_logp(net, batch().sequences, WIDE)
        assert logp.dtype == torch.float32
        assert not torch.equal(logp, exact)
        torch.testing.assert_close(logp, exact, rtol=0.02, atol=0.02)


def test_a_model_whose_saving_is_cut_off_is_not_there(tmp_path, monkeypatch):
    def full(directory):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(TOKENIZER, "save_pretrained", full)
        with pytest.raises(OSError, match="no space"):
            save_model(model(), TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(model(), TOKENIZER, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- run directories --


def config_of(path, steps=5):
    return Config(run=Run(dir=path, steps=steps))


def test_records_after_the_checkpoint_are_forgotten(tmp_path):
    net = trained()
    run = RunDirectory(config_of(tmp_path), tmp_path)
    for step in range(5):
        run.log(step, {"loss": float(step)})
        run.log_samples(step, [{"outcome": 1.0}])
    run.checkpoints.save(Progress(step=2), {"policy": net})
    assert RunDirectory(config_of(tmp_path), tmp_path).resume({"policy": net}).step == 2
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [record["step"] for record in read_records(tmp_path / name)] == [0, 1, 2]


def test_a_run_that_begins_anew_forgets_everything(tmp_path):
    net = trained()
    for saved in (False, True):
        run = RunDirectory(config_of(tmp_path), tmp_path)
        run.log(0, {"loss": 0.0})
        if saved:
            run.checkpoints.save(Progress(), {"policy": net})
        assert RunDirectory(config_of(tmp_path), tmp_path).resume({"policy": net}) == Progress()
        assert read_records(tmp_path / "metrics.jsonl") == []


def test_a_last_record_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]
    assert read_records(tmp_path / "nothing.jsonl") == []


def test_finishing_saves_what_the_last_checkpoint_has_not_got(tmp_path):
    net = trained()
    run = RunDirectory(config_of(tmp_path), tmp_path)
    run.checkpoints.save(Progress(step=2), {"policy": net})
    run.finish(Progress(step=2, seconds=9.0), {"policy": net})
    assert progress_at(run.checkpoints.latest()).seconds == 0
    run.finish(Progress(step=3), {"policy": net})
    assert progress_at(run.checkpoints.latest()).step == 3


def test_a_run_is_complete_when_its_last_step_is_saved(tmp_path):
    net = trained()
    assert completed(config_of(tmp_path)) is None
    run = RunDirectory(config_of(tmp_path), tmp_path)
    run.checkpoints.save(Progress(step=4), {"policy": net})
    assert completed(config_of(tmp_path)) is None
    run.checkpoints.save(Progress(step=5), {"policy": net})
    assert completed(config_of(tmp_path)) == Progress(step=5)
    assert completed(config_of(tmp_path, steps=6)) is None


def test_the_directory_holds_the_configuration_and_what_a_skipped_update_came_from(tmp_path):
    run = RunDirectory(config_of(tmp_path), tmp_path)
    assert Config.model_validate(json.loads((tmp_path / "config.json").read_text())) == config_of(tmp_path)
    said = run.keep_nonfinite(4, batch=batch(), rewards=None)
    assert str(tmp_path / "nonfinite" / "step-000004.pt") in said
    kept = torch.load(tmp_path / "nonfinite" / "step-000004.pt")
    assert torch.equal(kept["batch"]["outcomes"], batch().outcomes)
    assert kept["rewards"] is None
