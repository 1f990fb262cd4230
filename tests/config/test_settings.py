"""Configurations: what is taken, and what is refused by the key's name."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from prime_train.config.keys import Config
from prime_train.config.settings import ConfigError, load_config


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
