"""`prime-train plan`, and what `run` does with a plan."""

import pytest
import torch
from transformers import Qwen2Config

from prime_train import cli
from prime_train.plan import command
from prime_train.plan.models import architectures_of
from prime_train.plan.records import GIB, Unplannable
from tests.support.shapes import BIG, shipped


def test_plan_command_needs_no_weights(tmp_path, capsys):
    Qwen2Config(**BIG).save_pretrained(tmp_path)
    words = ["plan", "eurus-2-7b", "--model.policy", str(tmp_path), "--gpus", "8", "--memory", "80"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "largest model.tokens_per_micro_batch that fits" in printed
    assert "Assumed" in printed
    assert cli.main([*words[:-3], "1", "--memory=80"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_plan_command_refuses_odd_options(capsys):
    for words in (["--gpus", "none"], ["--memory", "-1"], ["--gpus", "1.5"]):
        assert cli.main(["plan", "quickstart", *words]) == 2
        assert words[0] in capsys.readouterr().err


def test_the_memory_of_hosts_is_an_option_and_decides(tmp_path, capsys):
    Qwen2Config(**BIG).save_pretrained(tmp_path)
    words = [
        "plan", "eurus-2-7b", "--model.policy", str(tmp_path), "--gpus", "1", "--memory", "80", "--model.offload",
        "policy,prm,reference",
    ]  # fmt: skip
    assert cli.main(words) == 0
    assert "what it has is not known: --host-memory" in capsys.readouterr().out
    assert cli.main([*words, "--host-memory", "256"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit: each host needs" in printed
    assert "of 255.2 GiB that can be filled of 256.0 (offloaded models" in printed
    assert cli.main([*words, "--host-memory", "512"]) == 0
    assert "\nfits: each host needs" in capsys.readouterr().out


def test_a_run_on_gpus_is_planned_with_this_hosts_memory(monkeypatch):
    monkeypatch.setattr(command, "device_of", lambda config: torch.device("cuda"))
    monkeypatch.setattr(command, "memory_bytes", lambda device: (80 if device.type == "cuda" else 200) * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert command.plan_here(shipped("quickstart")).cluster.host == 200 * GIB


def test_models_of_random_weights_are_planned_by_their_shape():
    config = shipped("quickstart")
    assert architectures_of(config)["policy"].hidden_size == 64


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host on which nothing fits."""
    monkeypatch.setattr(command, "memory_bytes", lambda device: 769 << 20)


def test_run_refuses_what_does_not_fit_unless_forced(tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    trained: list[str] = []
    monkeypatch.setattr("prime_train.sft.train", lambda config, view, *world: trained.append("sft"))
    words = ["run", "quickstart", "--run.dir", str(tmp_path / "run")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "does not fit" in said
    assert "--force" in said
    assert not trained
    assert cli.main([*words, "--force"]) == 130  # the stage that stands in for SFT says that it was interrupted
    assert trained == ["sft"]
    assert "does not fit" in capsys.readouterr().out


def test_dry_run_prints_configuration_and_plan(tmp_path, capsys):
    assert cli.main(["run", "quickstart", "--run.dir", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "[rollout]" in printed
    assert "seconds a step" in printed


def test_a_model_that_cannot_be_reached_is_named(tmp_path, monkeypatch, capsys):
    def unreachable(name: str, **_: object) -> None:
        raise OSError(f"no connection for {name}")

    monkeypatch.setattr("prime_train.plan.models.AutoConfig.from_pretrained", unreachable)
    override = ["--model.policy", "nobody/nothing", "--run.dir", str(tmp_path / "run")]
    assert cli.main(["plan", "quickstart", *override]) == 2
    assert "model.policy: no config.json of nobody/nothing" in capsys.readouterr().err
    assert cli.main(["run", "quickstart", *override, "--dry-run"]) == 0
    assert "no plan: model.policy" in capsys.readouterr().out
    # A run goes on: loading the model will say what is wrong.
    assert "not planned" in (command.refuse_too_large(shipped("quickstart", *override), force=False) or "")
    with pytest.raises(Unplannable, match="nobody/nothing"):
        architectures_of(shipped("quickstart", *override))


def test_processes_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(command, "memory_bytes", lambda device: 16 * GIB)
    cluster = command.plan_here(shipped("quickstart")).cluster
    assert (cluster.processes, cluster.memory) == (2, 8 * GIB)
