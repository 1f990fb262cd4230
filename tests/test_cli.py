"""The command line: what it prints, and with which code it exits."""

import tomllib
from pathlib import Path

import pytest

from prime_train import checks, cli
from prime_train.config.keys import Config
from prime_train.config.settings import load_config, shipped


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


@pytest.mark.parametrize("command", ["run", "sft", "eval", "plan", "doctor", "keys", "metrics"])
@pytest.mark.parametrize("words", [["--help"], ["quickstart", "-h"]])
def test_help_is_given_anywhere_behind_a_command(command, words, capsys):
    assert cli.main([command, *words]) == 0
    assert capsys.readouterr().out.startswith("prime-train COMMAND")


def test_help_names_every_command_and_configuration(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("run", "sft", "eval", "verify", "report", "keys", "metrics", *shipped()):
        assert word in text


def test_help_fits_80_columns(capsys):
    cli.main(["--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
