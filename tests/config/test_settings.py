"""Configurations: what is taken, and what is refused before anything is loaded, by the key's name."""

import importlib.util
import json
import os
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from prime_train import checks, cli
from prime_train.config.keys import Config
from prime_train.config.settings import ConfigError, load_config, reference_table, shipped
from prime_train.rollout.vllm.build import server_process, weights_directory
from tests.support.fake_vllm import fake_vllm, serving
from tests.support.tiny import model, saved_model


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture
def empty(tmp_path):
    """A configuration of defaults alone."""
    return written(tmp_path / "empty.toml", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prm.betta", "1"], "no key prm.betta; did you mean prm.beta?"),
        (["--polcy.lr", "1"], "no section 'polcy'; did you mean policy?"),
        (["--prm.zzzz", "1"], "no key prm.zzzz; known are update, loss, "),
        (["--rollout.prompts", "many"], "rollout.prompts: input should be a valid integer, .*got \"many\""),
        (["--rollout.prompts", "2.5"], "rollout.prompts: input should be a valid integer"),
        (["--run.wandb", "perhaps"], "run.wandb: input should be a valid boolean"),
        (["--prm.update", "later"], "prm.update: input should be 'after', 'before' or 'none', got \"later\""),
        (["--prm.beta", "0"], "prm.beta: input should be greater than 0"),
        (["--prm.beta", "-0.05"], "prm.beta: input should be greater than 0, got \"-0.05\""),
        (["--prm.beta", "nan"], "prm.beta: input should be (a finite number|greater than 0)"),
        (["--policy.entropy_coef", "nan"], "policy.entropy_coef: input should be a finite number"),
        (["--rollout.temperature", "0"], "rollout.temperature: input should be greater than 0"),
        (["--advantage.process_gamma", "1.5"], "advantage.process_gamma: input should be less than or equal to 1"),
        (["--policy.dual_clip", "1"], "policy.dual_clip: input should be greater than 1"),
        (["--filter.max_prompts", "0.5"], "filter.max_prompts: input should be greater than or equal to 1"),
        (["--filter.low", "0.9"], "filter.low must not exceed filter.high = 0.8, got 0.9"),
        (["--prm.step_pattern", "("], "prm.step_pattern must be a regular expression: "),
        (["--rollout.samples", "1"], "rollout.samples must be at least 2 for advantage.estimator 'rloo'"),
        (
            ["--rollout.samples", "1", "--advantage.estimator", "grpo"],
            "rollout.samples must be at least 2 for advantage.estimator 'grpo'",
        ),
        (["--policy.mini_batch", "1025"], r"policy.mini_batch must not exceed rollout.prompts × .* = 1024, got 1025"),
        (["--prm.mini_batch", "1025"], r"prm.mini_batch must not exceed rollout.prompts × .* = 1024, got 1025"),
        (
            ["--prm.loss", "dpo", "--prm.mini_batch", "254"],
            "prm.mini_batch must be a multiple of rollout.samples = 4 for prm.loss 'dpo'",
        ),
        (
            ["--advantage.process_coef", "0", "--advantage.outcome_coef", "0"],
            "advantage.process_coef and advantage.outcome_coef must not both be 0",
        ),
        (["prm.beta", "1"], "expected --section.key value, found prm.beta"),
        (["--beta", "1"], "expected --section.key value, found --beta"),
        (["--prm.beta"], "--prm.beta needs a value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_setting_is_refused_with_the_keys_name(empty, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(empty, words)


def test_every_wrong_value_is_told_at_once(empty):
    with pytest.raises(ConfigError) as refusal:
        load_config(empty, ["--prm.beta", "0", "--policy.lr", "-1"])
    assert {line.partition(":")[0] for line in str(refusal.value).splitlines()} == {"prm.beta", "policy.lr"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prm]\nbetta = 1", "no key prm.betta; did you mean prm.beta?"),
        ("[pmr]\nbeta = 1", "no section 'pmr'; did you mean prm?"),
        ("prm = 1", "prm must stand in a section"),
        ("[prm\n", "is not TOML"),
        ('[prm]\nbeta = "a lot"', "prm.beta: input should be a valid number"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong_in_it(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path / "run.toml", text))


def test_a_configuration_that_is_nowhere_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match=r"no file quickstrat, and no shipped configuration of that name: .*quickstart"
    ):
        load_config("quickstrat")
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.toml"):
        load_config("nowhere.toml")


def test_one_response_a_prompt_is_enough_for_reinforce(empty):
    words = ["--rollout.samples", "1", "--advantage.estimator", "reinforce"]
    assert load_config(empty, words).rollout.samples == 1


def test_a_prm_that_is_not_there_or_does_not_learn_needs_no_mini_batch(empty):
    few = ["--rollout.prompts", "2", "--policy.mini_batch", "4"]
    for words in (["--advantage.process_coef", "0"], ["--prm.update", "none"]):
        load_config(empty, [*few, *words])


def test_overrides_come_after_the_file_with_a_space_or_an_equals_sign(tmp_path):
    path = written(tmp_path / "run.toml", "[prm]\nbeta = 0.1\nlr = 1e-3\n[policy]\nlr = 0.5\n")
    words = ["--prm.beta", "0.2", "--policy.lr=1e-5", "--run.wandb", "true", "--data.system", "a = b"]
    config = load_config(path, words)
    assert (config.prm.beta, config.prm.lr, config.policy.lr) == (0.2, 1e-3, 1e-5)
    assert config.run.wandb is True
    assert config.data.system == "a = b"


def test_none_leaves_a_key_out_that_may_be_left_out_and_is_a_word_elsewhere(tmp_path):
    path = written(tmp_path / "run.toml", "[prm]\nmax_log_ratio = 0.5\n")
    config = load_config(path, ["--prm.max_log_ratio", "none", "--data.system", "none", "--prm.update", "none"])
    assert config.prm.max_log_ratio is None
    assert (config.data.system, config.prm.update) == ("none", "none")


def test_a_configuration_cannot_be_changed(empty):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(empty).prm.beta = 1.0


def test_there_are_few_keys_and_each_is_explained():
    keys = [
        (f"{section}.{key}", info)
        for section, field in Config.model_fields.items()
        for key, info in field.annotation.model_fields.items()
    ]
    assert len(keys) <= 80
    table = reference_table()
    for name, info in keys:
        assert len((info.description or "").strip()) > 5, name
        assert f"| `{name}` |" in table


def test_defaults_are_the_papers():
    config = Config()
    assert (config.rollout.prompts, config.rollout.samples, config.rollout.temperature) == (256, 4, 1.0)
    assert (config.data.max_prompt_tokens, config.rollout.max_tokens) == (1024, 3072)
    assert (config.filter.low, config.filter.high) == (0.2, 0.8)
    prm, policy, advantage = config.prm, config.policy, config.advantage
    assert (prm.update, prm.loss, prm.reference, prm.beta, prm.granularity) == ("after", "ce", "frozen", 0.05, "token")
    assert (prm.lr, prm.grad_clip, prm.mini_batch) == (1e-6, 10, 256)
    assert (policy.lr, policy.weight_decay, policy.grad_clip, policy.mini_batch) == (5e-7, 0.01, 1, 256)
    assert (policy.clip_low, policy.clip_high, policy.entropy_coef, policy.kl_coef, policy.epochs) == (
        0.2,
        0.2,
        0,
        0,
        1,
    )
    assert (advantage.estimator, advantage.whiten) == ("rloo", True)
    assert (advantage.process_gamma, advantage.outcome_gamma) == (1, 1)
    assert advantage.process_coef == advantage.outcome_coef


# -- what only the machine can tell --


def problems(config):
    with pytest.raises(ConfigError) as refusal:
        checks.refuse_impossible(config)
    return str(refusal.value).splitlines()


def possible(tmp_path, *words):
    """Defaults that need nothing from anywhere, and then words."""
    path = written(tmp_path / "run.toml", f'[run]\ndir = "{tmp_path / "run"}"\n[data]\ntrain = "arithmetic"\n')
    return load_config(path, ["--data.eval", "arithmetic", *words])


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
    written(tmp_path / "file", "")
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
    written(tmp_path / "file", "")
    words = ["--run.dir", str(tmp_path / "file"), "--data.train", "a.jsonl", "--data.eval", "b.jsonl"]
    assert [p.partition(":")[0] for p in problems(possible(tmp_path, *words))] == ["data.train", "data.eval", "run.dir"]


# -- commands --


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_configuration_passes_a_dry_run_that_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    config = load_config(name)
    monkeypatch.chdir(tmp_path)
    for source in (config.data.train, config.data.eval):
        if Path(source).suffix in checks.DATA_FILES:
            Path(source).parent.mkdir(parents=True, exist_ok=True)
            Path(source).touch()
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["run", name, "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = tomllib.loads(capsys.readouterr().out)
    assert Config.model_validate(printed) == config


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert cli.main(["run", "quickstart", "--prm.betta", "1"]) == 2
    assert capsys.readouterr().err == "prime-train: no key prm.betta; did you mean prm.beta?\n"
    assert cli.main(["run"]) == 2
    assert "run needs a configuration" in capsys.readouterr().err
    assert cli.main(["rnu"]) == 2
    assert "no command 'rnu'; there are run, " in capsys.readouterr().err


def test_keys_prints_the_table(capsys):
    assert cli.main(["keys"]) == 0
    assert capsys.readouterr().out == reference_table() + "\n"


@pytest.mark.parametrize("command", ["run", "sft", "eval", "plan", "doctor", "keys"])
@pytest.mark.parametrize("words", [["--help"], ["quickstart", "-h"]])
def test_help_is_given_anywhere_behind_a_command(command, words, capsys):
    assert cli.main([command, *words]) == 0
    assert capsys.readouterr().out.startswith("prime-train COMMAND")


def test_help_names_every_command_and_configuration(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("run", "sft", "eval", "verify", "report", "keys", *shipped()):
        assert word in text


def test_a_resolved_configuration_says_which_keys_are_left_out(empty):
    text = checks.resolved(load_config(empty))
    assert "# max_log_ratio is left out" in text
    assert f"dir = {json.dumps('runs/prime')}" in text


def test_a_depth_of_chains_that_is_no_number_is_refused(tmp_path):
    [problem] = problems(possible(tmp_path, "--data.train", "arithmetic:many"))
    assert problem == "data.train: arithmetic:N must have N operations, 1 or more, got 'arithmetic:many'"


# -- vLLM --

SERVERS = ["--rollout.engine", "vllm", "--vllm.servers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout.engine", "vllm"], "vllm.servers must be given for rollout.engine 'vllm'"),
        ([*SERVERS, " "], "vllm.servers must be given for rollout.engine 'vllm'"),
        ([*SERVERS, "http://a:1 python"], "vllm.servers must be URLs alone, .*found 'python'"),
        ([*SERVERS, "ftp://a:1"], "vllm.servers must be URLs alone, .*found 'ftp://a:1'"),
        (["--rollout.ahead", "1"], "rollout.ahead must be 0 for rollout.engine 'local'"),
        (["--rollout.ahead", "2"], "rollout.ahead: input should be less than or equal to 1"),
        (
            [*SERVERS, "python --enable-sleep-mode", "--rollout.ahead", "1"],
            "rollout.ahead must be 0 where vllm.servers has the server sleep",
        ),
        (["--rollout.importance_clamp", "-1"], "rollout.importance_clamp: input should be greater than or equal to 0"),
    ],
)
def test_impossible_rollouts_are_refused(empty, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(empty, words)


def test_servers_are_urls_or_what_starts_one(empty):
    urls = load_config(empty, [*SERVERS, " http://a:1/  https://b "]).vllm
    assert (urls.urls, urls.sleeps) == (("http://a:1", "https://b"), False)
    command = load_config(empty, [*SERVERS, "env/bin/python --enable-sleep-mode"]).vllm
    assert (command.urls, command.sleeps) == ((), True)


def test_a_server_that_cannot_be_started_is_refused(tmp_path):
    found = problems(possible(tmp_path, *SERVERS, "/nowhere/python -x"))
    assert found == ["vllm.servers: neither a URL nor a program: /nowhere/python"]
    checks.refuse_impossible(possible(tmp_path, *SERVERS, "http://127.0.0.1:9"))


def test_weights_travel_in_shared_memory_or_to_other_machines_in_the_runs_directory(tmp_path):
    here, elsewhere = (possible(tmp_path, *SERVERS, f"http://localhost:1 http://{host}:1") for host in ("[::1]", "b"))
    assert weights_directory(here) == Path("/dev/shm")
    assert weights_directory(elsewhere) == tmp_path / "run" / "vllm"


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


def test_a_server_of_the_runs_own_is_started_for_the_transport(tmp_path):
    def process(transport):
        return server_process(possible(tmp_path, *SERVERS, "python", "--vllm.transport", transport), model())

    files, nccl, ipc = (process(transport) for transport in ("file", "nccl", "ipc"))
    assert "--weight-transfer-config" not in files.command
    for name, found in (("nccl", nccl), ("ipc", ipc)):
        option = found.command[found.command.index("--weight-transfer-config") + 1]
        assert json.loads(option) == {"backend": name}
    assert [p.environment.get("VLLM_ALLOW_INSECURE_SERIALIZATION") for p in (files, nccl, ipc)] == [None, None, "1"]
