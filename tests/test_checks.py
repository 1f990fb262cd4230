"""What is found wrong with a run before anything is loaded, by the key's name."""

import importlib.util
import json
import os

import pytest

from prime_train import checks
from prime_train.config.keys import Config
from prime_train.config.settings import ConfigError, load_config
from tests.support.fake_vllm import fake_vllm, serving
from tests.support.tiny import saved_model

SERVERS = ["--rollout.engine", "vllm", "--vllm.servers"]


def problems(config):
    with pytest.raises(ConfigError) as refusal:
        checks.refuse_impossible(config)
    return str(refusal.value).splitlines()


def possible(tmp_path, *words):
    """Defaults that need nothing from anywhere, and then words."""
    path = tmp_path / "run.toml"
    path.write_text(f'[run]\ndir = "{tmp_path / "run"}"\n[data]\ntrain = "arithmetic"\n')
    return load_config(str(path), ["--data.eval", "arithmetic", *words])


def test_nothing_is_found_wrong_with_what_is_possible(tmp_path):
    checks.refuse_impossible(possible(tmp_path))
    checks.refuse_impossible(possible(tmp_path, "--model.policy", saved_model(tmp_path / "model")))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_missing_data_is_refused(tmp_path, key, suffix):
    path = tmp_path / f"none{suffix}"
    assert problems(possible(tmp_path, f"--{key}", str(path))) == [f"{key}: no file {path}"]


def test_missing_demonstrations_are_refused_where_there_is_an_sft_stage(tmp_path):
    words = ["--sft.data", "none.jsonl", "--sft.base", "tiny:16x1x2"]
    checks.refuse_impossible(possible(tmp_path, *words))
    assert problems(possible(tmp_path, *words, "--model.policy", "sft")) == ["sft.data: no file none.jsonl"]


@pytest.mark.parametrize("key", ["model.policy", "model.prm", "model.reference"])
def test_missing_models_are_refused(tmp_path, key):
    [problem] = problems(possible(tmp_path, f"--{key}", str(tmp_path / "nowhere")))
    assert problem.startswith(f"{key}: no model in {tmp_path / 'nowhere'}; ")


def test_a_missing_model_of_the_sft_stage_is_refused(tmp_path):
    words = ["--model.policy", "sft", "--sft.data", "arithmetic", "--sft.base", str(tmp_path / "nowhere")]
    [problem] = problems(possible(tmp_path, *words))
    assert problem.startswith("sft.base: no model in ")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("16x1", "must be hidden x layers x heads"),
        ("big", "must be hidden x"),
        ("15x1x2", "multiple of twice its heads"),
    ],
)
def test_an_impossible_tiny_model_is_refused(tmp_path, shape, message):
    words = ["--model.policy", "sft", "--sft.data", "arithmetic", "--sft.base", f"tiny:{shape}"]
    [problem] = problems(possible(tmp_path, *words))
    assert problem.startswith("sft.base: ")
    assert message in problem


def test_a_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run" / "deep"):
        assert problems(possible(tmp_path, "--run.dir", str(path))) == [f"run.dir: {tmp_path / 'file'} is a file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_run_directory_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    [problem] = problems(possible(tmp_path, "--run.dir", str(tmp_path / "sealed" / "run")))
    assert problem == f"run.dir: {tmp_path / 'sealed'} cannot be written to"


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert problems(possible(tmp_path, "--run.device", "cuda")) == ["run.device: there is no CUDA GPU; use auto or cpu"]
    found = problems(possible(tmp_path, "--model.attention", "flash_attention_2"))
    assert "model.attention: flash_attention_2 needs a CUDA GPU; use sdpa" in found


def test_packages_that_are_not_installed_are_refused(tmp_path, monkeypatch):
    def nothing(name):
        return None if name in ("wandb", "flash_attn") else importlib.util.find_spec(name)

    monkeypatch.setattr(checks, "find_spec", nothing)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words = ["--run.wandb", "true", "--model.attention", "flash_attention_2"]
    assert [problem.partition(":")[0] for problem in problems(possible(tmp_path, *words))] == [
        "run.wandb",
        "model.attention",
    ]


def test_a_verifier_that_cannot_be_loaded_is_refused(tmp_path):
    [problem] = problems(possible(tmp_path, "--verify.custom", "nowhere:score"))
    assert problem.startswith("verify.custom: ")


def test_everything_wrong_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    words = ["--run.dir", str(tmp_path / "file"), "--data.train", "a.jsonl", "--data.eval", "b.jsonl"]
    assert [p.partition(":")[0] for p in problems(possible(tmp_path, *words))] == ["data.train", "data.eval", "run.dir"]


def test_a_resolved_configuration_says_which_keys_are_left_out():
    text = checks.resolved(Config())
    assert "# max_log_ratio is left out" in text
    assert f"dir = {json.dumps('runs/prime')}" in text


def test_a_depth_of_chains_that_is_no_number_is_refused(tmp_path):
    [problem] = problems(possible(tmp_path, "--data.train", "arithmetic:many"))
    assert problem == "data.train: arithmetic:N must have N operations, 1 or more, got 'arithmetic:many'"


# -- vLLM --


def test_a_server_that_cannot_be_started_is_refused(tmp_path):
    found = problems(possible(tmp_path, *SERVERS, "/nowhere/python -x"))
    assert found == ["vllm.servers: neither a URL nor a program: /nowhere/python"]
    checks.refuse_impossible(possible(tmp_path, *SERVERS, "http://127.0.0.1:9"))


def test_running_servers_that_were_started_otherwise_are_refused_by_name_and_others_waited_for(tmp_path):
    def without_development_routes(method, path, body):
        return (200, b'{"version": "0.32.0"}') if path == "/version" else (404, b"")

    with fake_vllm() as (good, _), serving(without_development_routes) as bad:
        found = problems(possible(tmp_path, *SERVERS, f"http://127.0.0.1:9 {good} {bad}"))
        assert len(found) == 1
        assert found[0].startswith(f"vllm.servers: {bad}: weights cannot be refreshed; start it with VLLM_SERVER_DEV")
        found = problems(possible(tmp_path, *SERVERS, good, "--vllm.transport", "nccl"))
        assert found[0] == "vllm.transport: nccl needs the policy on a CUDA GPU; use file"
        assert found[-1].startswith(f"vllm.servers: {good}: ")
