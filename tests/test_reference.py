"""`prime-train keys` and `prime-train metrics`: everything is in them, and is found again."""

import re
import subprocess
import sys

import pytest

from prime_train import cli, reference
from prime_train.config.keys import Config
from prime_train.config.settings import ConfigError, load_config, sections
from prime_train.show.metrics import METRICS
from tests.support.paths import ROOT

BOOKS = {"keys": reference.keys(), "metrics": reference.metrics()}
ENTRIES = {name: [entry for chapter in book.chapters for entry in chapter.entries] for name, book in BOOKS.items()}
PAGES = {"keys": ROOT / "prime_train/config/KEYS.md", "metrics": ROOT / "prime_train/show/METRICS.md"}


def printed(capsys, *words):
    assert cli.main(words) == 0
    return capsys.readouterr().out


def found(command, *words):
    """Names of what is shown, and of what else has the words."""
    result = reference.find(BOOKS[command], words)
    return [entry.name for chapter in result.chapters for entry in chapter.entries], list(result.others)


# -- everything is there --


def test_every_key_is_there_in_order_and_every_section_and_key_is_explained():
    names = [f"{section}.{key}" for section, keys in sections().items() for key in keys.model_fields]
    assert [entry.name for entry in ENTRIES["keys"]] == names
    for entry in ENTRIES["keys"]:
        assert len(entry.meaning) > 5, entry.name
    for section in sections().values():
        assert re.fullmatch(r".{10,90}\.", section.__doc__ or ""), section


def test_every_metric_is_there():
    assert [entry.name for entry in ENTRIES["metrics"]] == [m.name for group in METRICS for m in group.metrics]


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("run.dir", "path", "runs/prime"),
        ("run.seed", "integer from 0 to 2147483647", "0"),
        ("run.wandb", "true | false", "false"),
        ("model.prm", "text or none", "none"),
        ("model.blocks", "any of checkpoint, compile, liger", "none"),
        ("rollout.prompts", "integer ≥ 1", "256"),
        ("rollout.temperature", "number > 0", "1.0"),
        ("filter.low", "number from 0 to 1", "0.2"),
        ("prm.loss", "ce | dpo", "ce"),
        ("policy.dual_clip", "number > 1 or none", "none"),
        ("policy.entropy_coef", "number", "0.0"),
        ("vllm.servers", "text", '""'),
    ],
)
def test_a_key_has_what_it_may_be_and_its_default(key, kind, default):
    [entry] = [entry for entry in ENTRIES["keys"] if entry.name == key]
    assert (entry.kind, entry.default) == (kind, default)


def test_defaults_given_on_the_command_line_as_they_are_printed_are_the_defaults(tmp_path):
    (tmp_path / "empty.toml").touch()
    words = [word for entry in ENTRIES["keys"] for word in (f"--{entry.name}", entry.default.replace('""', ""))]
    assert load_config(str(tmp_path / "empty.toml"), words) == Config()


def test_keys_that_are_named_in_explanations_exist():
    keys = {entry.name for entry in ENTRIES["keys"]}
    named = {
        key
        for book in BOOKS.values()
        for chapter in book.chapters
        for text in (book.intro, chapter.meaning, *(entry.meaning for entry in chapter.entries))
        for key in re.findall(r"`([a-z]+\.[a-z_]+)`", text)
    }
    assert "rollout.max_tokens" in named
    assert named <= keys


@pytest.mark.parametrize("command", PAGES)
def test_the_page_is_what_the_command_prints(command, capsys):
    page = PAGES[command].read_text()
    assert page == printed(capsys, command, "--markdown"), "make reference"
    assert page.startswith(f"<!-- Made by `prime-train {command} --markdown`")
    for entry in ENTRIES[command]:
        assert f"\n| `{entry.name}` | " in page


@pytest.mark.parametrize("command", PAGES)
def test_rows_of_a_page_have_as_many_cells_as_its_head(command):
    rows = [line for line in PAGES[command].read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(BOOKS[command].columns) + 1}


# -- it is found --


@pytest.mark.parametrize(
    ("words", "names", "others"),
    [
        ("lr", ["sft.lr", "prm.lr", "policy.lr"], []),
        ("LR", ["sft.lr", "prm.lr", "policy.lr"], []),
        ("policy lr", ["policy.lr"], []),
        ("learning rate", ["sft.lr", "prm.lr", "policy.lr"], []),
        ("rate", ["sft.lr", "prm.lr", "policy.lr"], []),  # and not where it is in the middle of a word
        ("nccl", ["vllm.transport"], []),
        ("rollout.max_tokens", ["rollout.max_tokens"], []),
        ("temperature", ["rollout.temperature"], ["eval.samples"]),
        ("filter", ["filter.low", "filter.high", "filter.max_prompts", "filter.drop_truncated"], []),
    ],
)  # fmt: skip
def test_keys_are_found_by_section_name_part_of_a_name_and_else_by_what_is_said(words, names, others):
    assert found("keys", *words.split()) == (names, others)


def test_a_section_is_shown_whole_and_keys_elsewhere_with_its_name_are_told():
    names, others = found("keys", "policy")
    assert names == [f"policy.{key}" for key in sections()["policy"].model_fields]
    assert others == ["model.policy"]


@pytest.mark.parametrize(
    ("words", "names", "others"),
    [
        ("mfu", ["throughput/mfu_STAGE", "throughput/mfu"], []),
        ("throughput/mfu", ["throughput/mfu"], []),
        ("throughput/mfu_prm", ["throughput/mfu_STAGE"], []),
        ("time/stage", ["time/STAGE"], []),
        ("verify", ["verify/STATUS"], []),
        ("timeout", ["verify/STATUS"], []),
        ("hacking", ["reward/rare_wrong"], []),
        ("right wrong", ["verify/STATUS", "reward/right"], []),
    ],
)  # fmt: skip
def test_metrics_are_found_so_too_and_by_the_names_of_a_family(words, names, others):
    assert found("metrics", *words.split()) == (names, others)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("keys max_toknes", "no key has 'max_toknes' in its name or its description; did you mean rollout.max_tokens"),
        ("keys toknes", "or rollout.max_tokens?"),
        ("keys rolout", "did you mean rollout or "),
        ("keys wandb lr", "no key has 'wandb' and 'lr' in its name or its description; did you mean run.wandb or "),
        ("keys zzzz", "; sections are run, model, data, "),
        ("keys --all", "keys takes words to search for, or --markdown alone, found --all"),
        ("keys lr --markdown", "keys takes words to search for, or --markdown alone, found --markdown"),
        ("metrics pairwse", "no metric has 'pairwse' in its name or its description; did you mean prm/pairwise_acc"),
        ("metrics zzzz", "; groups are eval, accuracy, "),
    ],
)
def test_what_is_not_found_is_refused_in_one_line_with_the_nearest_names(words, said, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prime-train: ")
    assert err.count("\n") == 1
    assert said in err


def test_what_words_have_is_nothing_less_than_all_of_them():
    with pytest.raises(ConfigError):
        found("keys", "lr", "zzzz")


# -- it is readable --


@pytest.mark.parametrize("command", BOOKS)
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_all_of_it_fits_the_width_and_nothing_is_lost(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = printed(capsys, command)
    assert max(map(len, text.splitlines())) <= columns
    assert max(map(len, text.splitlines())) > columns - 10
    assert all(line == line.rstrip() for line in text.splitlines())
    flat = " ".join(text.split())
    for entry in ENTRIES[command]:
        assert f"{entry.name} {entry.kind}" in flat
        assert entry.meaning in flat


def test_one_key_is_printed_below_its_section(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert printed(capsys, "keys", "prm.loss") == (
        "[prm]  The implicit PRM: its rewards, and what it learns from outcomes.\n"
        "  prm.loss  ce | dpo; default ce\n"
        "      Cross-entropy of outcomes, or a preference for each response over its\n"
        "      group's opposite ones.\n"
    )


def test_other_keys_with_the_word_are_named_at_the_end(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert printed(capsys, "keys", "temperature").endswith("\n\nAlso in eval.samples.\n")


def test_a_terminal_gets_the_same_text_with_bold_names(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    plain = printed(capsys, "keys", "prm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    bold = printed(capsys, "keys", "prm")
    assert "\n  \x1b[1mprm.loss\x1b[0m  ce | dpo" in bold
    assert re.sub(r"\x1b\[\d+m", "", bold) == plain
    assert "\x1b" not in plain


@pytest.mark.parametrize("command", BOOKS)
def test_an_answer_does_not_wait_for_torch(command):
    code = f"import sys; from prime_train import cli; cli.main(['{command}']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")
