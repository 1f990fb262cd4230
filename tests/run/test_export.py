"""Exported models: those of the checkpoint, to transformers too, from the weights alone."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_train import cli
from prime_train.config.settings import load_config
from prime_train.models import language_model
from prime_train.models.snapshot import save_model
from prime_train.run.checkpoints import Checkpoints, Progress
from tests.run.test_checkpoint_ranks import save_there
from tests.run.test_checkpoints import learn, net_of, save
from tests.support.processes import run_ranks
from tests.support.runs import config_file
from tests.support.tiny import TOKENIZER, saved_model

TOKENS = torch.tensor([[6, 7, 8, 9]])


def run_of(directory, tied=False, **changes):
    """A run whose models start from one on disk."""
    save_model(net_of(0, tied), TOKENIZER, directory / "model")
    return config_file(directory, str(directory / "model"), **changes)


def trained(seed, steps, tied=False):
    net = net_of(seed, tied)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    learn(net, optimizer, steps)
    return net, optimizer


def saved_run(directory, tied=False):
    """With checkpoints of steps 1 and 2; gives their policies and PRMs."""
    config, made = run_of(directory, tied), {}
    checkpoints = Checkpoints(directory / "run" / "checkpoints", keep=2)
    for step in (1, 2):
        made[step] = {"policy": trained(0, step, tied), "prm": trained(1, step, tied)}
        save(checkpoints, Progress(step=step), made[step])
    return config, made


def logits(net):
    return net(input_ids=TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_has_the_checkpoints_logits_in_transformers(tmp_path, tied, capsys):
    config, made = saved_run(tmp_path, tied)
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", config, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"policy of {tmp_path}/run/checkpoints/step-000002 in {out}\n"
    found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert found.dtype == torch.float32
    assert torch.equal(logits(found), logits(made[2]["policy"][0].transformer))
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(out).get_vocab() == TOKENIZER.get_vocab()


def test_an_older_checkpoint_the_prm_and_another_dtype_can_be_asked_for(tmp_path):
    config, made = saved_run(tmp_path)
    words = ["--model", "prm", "--checkpoint", "step-000001", "--dtype", "bfloat16", "--out", str(tmp_path / "out")]
    assert cli.main(["export", config, *words]) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert torch.equal(logits(found), logits(made[1]["prm"][0].transformer.to(torch.bfloat16)))


def test_a_run_that_was_moved_is_exported_from_its_directory(tmp_path):
    config, made = saved_run(tmp_path / "before")
    (tmp_path / "before" / "run" / "config.json").write_text(load_config(config).model_dump_json())
    (tmp_path / "before" / "run").rename(tmp_path / "after")
    assert cli.main(["export", str(tmp_path / "after"), "--out", str(tmp_path / "out")]) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(found), logits(made[2]["policy"][0].transformer))


def test_what_several_processes_saved_is_exported_without_its_optimizers(tmp_path, monkeypatch):
    save_model(net_of(5, True, "18x2x3"), TOKENIZER, tmp_path / "model")
    config = config_file(tmp_path, str(tmp_path / "model"))
    written = run_ranks(2, save_there, tmp_path / "run" / "checkpoints", 1, "tied")[0]
    read, read_data = [], dcp.FileSystemReader.read_data

    def noted(self, plan, planner):
        read.extend(item.storage_index.fqn for item in plan.items)
        return read_data(self, plan, planner)

    monkeypatch.setattr(dcp.FileSystemReader, "read_data", noted)
    assert cli.main(["export", config, "--out", str(tmp_path / "out")]) == 0
    assert read
    assert all(name.startswith("policy.model.") for name in read)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, p in found.named_parameters():
        assert torch.equal(p, written[f"transformer.{name}"]), name


REFUSED = {
    "existing directory": (["--out", "{}"], "--out: {} exists"),
    "no such checkpoint": (
        ["--out", "{}/out", "--checkpoint", "step-000007"],
        "--checkpoint: no step-000007 in {}/run/checkpoints; there are step-000001, step-000002",
    ),
    "no PRM": (["--out", "{}/out", "--advantage.process_coef", "0"], "--model: this run trains no PRM"),
    "unknown key": (["--out", "{}/out", "--run.stepz", "0"], "no key run.stepz; did you mean run.steps?"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path, words, said, capsys):
    config, _ = saved_run(tmp_path)
    assert cli.main(["export", config, "--model", "prm", *(word.format(tmp_path) for word in words)]) == 2
    assert said.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_before_there_is_a_checkpoint_nothing_is_exported(tmp_path, capsys):
    assert cli.main(["export", run_of(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "there is none yet" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is no run's directory" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_not_exported(tmp_path, capsys):
    config, _ = saved_run(tmp_path)
    (tmp_path / "nothing").mkdir()
    assert (
        cli.main(["export", config, "--model.policy", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    )
    assert f"model.policy: {tmp_path}/nothing cannot be read: " in capsys.readouterr().err
    saved_model(tmp_path / "other", shape="24x1x2")
    assert cli.main(["export", config, "--model.policy", str(tmp_path / "other"), "--out", str(tmp_path / "out")]) == 2
    assert "is of another model: transformer.model.embed_tokens.weight of the policy" in capsys.readouterr().err


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, capsys):
    config, _ = saved_run(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(language_model.PreTrainedTokenizerBase, "save_pretrained", full)
    assert cli.main(["export", config, "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path}/out could not be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["export", "report", "verify"])
@pytest.mark.parametrize("words", [["--help"], ["runs/one", "-h"]])
def test_commands_with_options_of_their_own_tell_them(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *words])
    assert ended.value.code == 0
    assert f"usage: prime-train {command}" in capsys.readouterr().out
