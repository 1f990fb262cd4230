"""Each of examples/, as a person runs it, and what it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prime_train import checks
from prime_train.config.settings import load_config
from tests.support.fake_vllm import fake_vllm
from tests.support.paths import ROOT
from tests.support.tiny import saved_model

FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
NUMBER = r"(-?[\d.]+(?:e[+-]\d+)?)"


def run(name: str, *arguments: str, cwd: Path = ROOT, path: Path | None = None, **environment: str):
    """`python examples/NAME ARGUMENTS`, on an 80-column terminal; kernels are not interpreted in it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VLLM_URL", "RANK")}
    return subprocess.run(
        [sys.executable, str(path or Path("examples", name)), *arguments], capture_output=True, text=True, cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment},
    )  # fmt: skip


def printed(name: str, *arguments: str, **options) -> str:
    done = run(name, *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """Of the pattern's one group, `#`, in each of its matches."""
    return [float(found) for found in re.findall(pattern.replace("#", NUMBER), text)]


def test_log_probs_example_errs_less_than_full_logits():
    said = printed("1_log_probs.py")
    steps = numbers(r"log-prob +#", said.partition("relative error")[0])
    assert steps == sorted(steps)
    table = re.findall(rf"^([a-z-][a-z -]+?) +{NUMBER} +{NUMBER} +{NUMBER}$", said, re.M)
    assert [name for name, *_ in table] == ["log-prob", "entropy", "gradient of hidden", "gradient of weight"]
    for _, full, in_fp32, fused in table:
        assert float(fused) < min(float(full), float(in_fp32)) / 2
    assert "9,496 MiB with 16,384 tokens" in said


@pytest.mark.slow
def test_grpo_example_learns():
    rewards = numbers(r"reward #", printed("2_grpo.py"))
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.8


@pytest.mark.slow
def test_implicit_rewards_example_blames_the_wrong_digit():
    said = printed("3_implicit_rewards.py", FORCE_COLOR="1", TERM="xterm-256color")
    [blamed] = numbers(r"wrong digit in #%", said)
    [chance] = numbers(r"by chance: #%", said)
    assert blamed > 60 > 6 * chance
    assert re.search(r"\x1b\[[\d;]*48;[25];", said)  # a coloured background
    assert said.count("#") >= 9  # answers of six in the table and of three in numbers


@pytest.mark.slow
def test_prime_example_gets_better_at_held_out_problems():
    said = printed("4_prime_from_python.py")
    evaluated = [line.split() for line in re.findall(r"^\d+ .*\d$", said, re.M)]
    held_out = [[float(value) for value in cells[-2:]] for cells in evaluated if len(cells) in (3, 5)]
    assert len(held_out) == 3
    assert all(after > before for before, after in zip(held_out[0], held_out[-1], strict=True))
    assert "metrics.jsonl" in said


@pytest.mark.parametrize("elsewhere", [False, True])
def test_own_verifier_example_counts_what_hangs_and_raises(elsewhere, tmp_path):
    name = "5_own_verifier.py"
    said = printed(name, cwd=tmp_path, path=FOLDER / name) if elsewhere else printed(name)
    scores = re.findall(r"^([a-z, ]+?) +(\d\.\d)  (ok|error|timeout)", said, re.M)
    assert scores == [
        ("careful", "1.0", "ok"),
        ("careless, right", "0.5", "ok"),
        ("careless, wrong", "0.0", "ok"),
        ("no steps", "0.0", "error"),
        ("endless digits", "0.0", "timeout"),
    ]
    assert "time-outs 1, errors 1" in said


def test_own_verifier_examples_options_are_accepted_for_a_run(monkeypatch):
    """With the folder on the path, as `PYTHONPATH=examples` puts it there."""
    monkeypatch.syspath_prepend(str(FOLDER))
    [options] = re.findall(r"PYTHONPATH=examples prime-train run quickstart \\\n(.*)", printed("5_own_verifier.py"))
    config = load_config("quickstart", options.split())
    assert config.verify.custom == "5_own_verifier:careful"
    checks.refuse_impossible(config)


def test_own_data_example_shows_prompts_and_what_becomes_of_the_others():
    said = printed("6_own_data.py")
    assert re.findall(r"^(\w+): \w+, \d+ tokens, answer (.+)$", said, re.M) == [
        ("sum", "22"),
        ("half", "1.5"),
        ("root", "3"),
        ("double", r'{"inputs": ["2\n"], "outputs": ["4\n"]}'),
    ]
    assert "<|user|>What is 17 + 5?" in said
    assert "dropped: 1" in said
    flat = " ".join(said.split())
    assert "it has problem" in flat
    assert "line 1, is not JSON" in flat


def test_vllm_example_without_a_server_says_that_it_is_skipped():
    said = printed("7_vllm_rollouts.py")
    assert said.startswith("skipped: no server")
    assert "vllm serve" in said
    assert max(map(len, said.splitlines())) <= 80


def test_vllm_example_prints_responses_and_log_probs_of_a_server(tmp_path):
    with fake_vllm() as (url, fake):
        fake.name = saved_model(tmp_path / "model")
        said = printed("7_vllm_rollouts.py", url)
    assert len(fake.loaded) == 1  # the weights
    assert said.count("log-prob of each: -0.50 -0.50") == 4
    assert "17+5-3+4" in said


@pytest.mark.slow
def test_two_processes_example_agrees_with_one_process():
    said = printed("8_two_processes.py")
    shares = re.findall(r"process \d of 2: (\d+) of (\d+) response tokens, ([\d,]+) of ([\d,]+) weights", said)
    assert len(shares) == 2
    assert sum(int(tokens) for tokens, *_ in shares) == int(shares[0][1])
    one, two = numbers(r"loss on \w+ process(?:es)? +#", said)
    assert abs(one - two) < 1e-6
    assert numbers(r"agree within # of", said)[0] < 1e-5


def test_every_example_is_in_the_table_and_has_a_test():
    table = re.findall(r"^\| \[`(.+?)`\]\((.+?)\).*`(.+?)` \|$", (FOLDER / "README.md").read_text(), re.M)
    assert [name for name, *_ in table] == EXAMPLES
    tests = Path(__file__).read_text()
    for name, link, command in table:
        assert link == name
        assert command == f"python examples/{name}"
        assert command in (FOLDER / name).read_text().split('"""')[1]
        assert f'"{name}"' in tests
