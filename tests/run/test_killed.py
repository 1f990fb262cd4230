"""Runs that are killed: wherever it happens, the same command again ends as the run that nobody disturbed."""

import functools
import importlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch

from prime_train import cli
from prime_train.data import arithmetic
from prime_train.run.directory import read_records
from prime_train.run.saved import damage, steps
from tests.support.processes import run_alone, run_ranks, started
from tests.support.runs import bare, config_file, figures, final_weights
from tests.support.tiny import saved_model

STEPS, EVERY = 6, 2
LOOP = (
    "prime_train.prime.load_models", "prime_train.prime.load_prompts", "prime_train.prime.evaluate",
    "prime_train.prime.collect", "prime_train.prime.pack", "prime_train.prime.score", "prime_train.prime.advantages",
    "prime_train.algorithm.prm.reward_and_update", "prime_train.algorithm.policy.update",
    "prime_train.models.optim.step", "prime_train.models.language_model.LanguageModel.forward",
    "prime_train.models.language_model.LanguageModel.next_token_logits", "torch.Tensor.backward",
    "torch.optim.AdamW.step", "prime_train.run.directory.RunDirectory.log",
    "prime_train.run.directory.RunDirectory.add", "prime_train.run.directory.RunDirectory._append",
    "prime_train.run.directory._replace",
)  # fmt: skip
SAVING = (
    "prime_train.run.checkpoints.Checkpoints.save", "prime_train.run.checkpoints.Checkpoints.wait",
    "prime_train.run.saved.begin", "prime_train.run.saved.complete", "prime_train.run.saved._write",
    "prime_train.run.saved._sync", "prime_train.run.saved.retire", "torch.save", "os.fsync", "shutil.rmtree",
)  # fmt: skip


# -- in the process that is killed --


def sit(config, kill=None, seed=0, until=STEPS):
    """Goes on with the run; kill: the n-th call of a function that is not to return. Gives the calls of each."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    arithmetic.outcome = half_right
    bare()
    calls = Counter()
    for name in (*LOOP, *SAVING):
        count(name, calls, kill[1] if kill is not None and kill[0] == name else 0)
    assert cli.main(["run", config, "--run.steps", str(until), "--run.checkpoint_every", str(EVERY)]) == 0
    return calls


def half_right(reference, response):
    return float(len(response) % 2)


def count(name, calls, last):
    """Counts the function's calls; the last one is killed as it begins."""
    owner, _, attribute = name.rpartition(".")
    try:
        place = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, of = owner.rpartition(".")
        place = getattr(importlib.import_module(module), of)
    function = getattr(place, attribute)

    @functools.wraps(function)
    def counted(*args, **options):
        calls[name] += 1
        if calls[name] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(place, attribute, counted)


# -- in the test --


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    directory: Path
    model: str
    calls: dict[str, int]
    seconds: float
    weights: torch.Tensor


def run_in(directory, model):
    changes = {"run": {"keep_checkpoints": 1}, "eval": {"every": 2, "prompts": 3, "samples": 1}}
    return config_file(directory, model, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    model = saved_model(directory / "model")
    config = run_in(directory, model)
    run_alone(abs, 0)
    began = time.monotonic()
    ended = run_alone(sit, config)
    assert ended.code == 0, ended
    return Undisturbed(
        directory=directory, model=model, calls=ended.result, seconds=time.monotonic() - began,
        weights=final_weights(config),
    )  # fmt: skip


def assert_nothing_is_lost(directory):
    """But the steps since the last save, and the save that was being written; what there is, is complete."""
    found = steps(directory / "run" / "checkpoints")
    assert not any(damage(path) for path in found.values())
    records = read_records(directory / "run" / "metrics.jsonl")
    logged = records[-1]["step"] if records else 0
    newest = max(found, default=0)
    assert newest >= (logged - 1) // EVERY * EVERY - EVERY
    return newest


def assert_goes_on(directory, config, undisturbed):
    """The same command makes the steps that are missing, and ends as the undisturbed run."""
    newest = assert_nothing_is_lost(directory)
    ended = run_alone(sit, config, None, 1)
    assert ended.code == 0, ended
    assert ended.result["prime_train.prime.collect"] == STEPS - newest
    assert_same(directory, config, undisturbed)
    # The next save has removed what the one that was cut off left; a run that is complete saves nothing.
    assert newest == STEPS or not list((directory / "run" / "checkpoints").glob("*.partial"))


def assert_same(directory, config, undisturbed):
    assert figures(directory) == figures(undisturbed.directory)
    samples = [(path / "run" / "samples.jsonl").read_text() for path in (directory, undisturbed.directory)]
    assert samples[0] == samples[1]
    assert torch.equal(final_weights(config), undisturbed.weights)


def kill_and_go_on(directory, undisturbed, function, n):
    config = run_in(directory, undisturbed.model)
    ended = run_alone(sit, config, (function, n))
    assert ended.code == -signal.SIGKILL, ended
    assert_goes_on(directory, config, undisturbed)


# By where in the run, as a share of the function's calls.
DELIBERATE = {
    "in a save, before the rename": ("prime_train.run.saved._sync", 0.3),
    "in a rollout": ("prime_train.models.language_model.LanguageModel.next_token_logits", 0.6),
    "in an update": ("torch.optim.AdamW.step", 0.6),
}
IN_A_SAVE = {
    "between the tensors of a file": ("torch.save", 0.5),
    "between files": ("prime_train.run.saved._write", 0.4),
    "before old ones are removed": ("prime_train.run.saved.retire", 0.7),
    "while old ones are removed": ("shutil.rmtree", 0.5),
}


@pytest.mark.parametrize(("function", "share"), DELIBERATE.values(), ids=DELIBERATE)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(tmp_path, undisturbed, function, share):
    kill_and_go_on(tmp_path, undisturbed, function, max(1, round(share * undisturbed.calls[function])))


@pytest.mark.slow
@pytest.mark.parametrize(("function", "share"), IN_A_SAVE.values(), ids=IN_A_SAVE)
def test_a_run_that_is_killed_in_a_save_goes_on_as_if_nothing_had_been(tmp_path, undisturbed, function, share):
    kill_and_go_on(tmp_path, undisturbed, function, max(1, round(share * undisturbed.calls[function])))


def test_no_random_state_of_the_process_matters(tmp_path, undisturbed):
    config = run_in(tmp_path, undisturbed.model)
    assert run_alone(sit, config, None, 12345).code == 0
    assert_same(tmp_path, config, undisturbed)


def moments(calls):
    """Ten seeded ones."""
    rng = random.Random(20261121)
    functions = [name for name in (*LOOP, *SAVING) if calls[name]]
    return [(name, rng.randint(1, calls[name])) for name in rng.sample(functions, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("i", range(10))
def test_a_run_that_is_killed_at_a_random_call_goes_on_as_if_nothing_had_been(tmp_path, undisturbed, i):
    kill_and_go_on(tmp_path, undisturbed, *moments(undisturbed.calls)[i])


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_at_any_time_ends_as_if_nothing_had_been(tmp_path, undisturbed):
    config, rng, killed = run_in(tmp_path, undisturbed.model), random.Random(7), 0
    while killed < 10:
        with started(sit, config) as child:
            time.sleep(rng.uniform(0.3, 0.9) * undisturbed.seconds)
            child.kill()  # if it still runs
            killed += child.wait().code == -signal.SIGKILL
        assert_nothing_is_lost(tmp_path)
        if max(steps(tmp_path / "run" / "checkpoints"), default=0) == STEPS:
            break
    ended = run_alone(sit, config)
    assert ended.code == 0, ended
    assert killed
    assert_same(tmp_path, config, undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_over_any_number_of_processes(tmp_path, undisturbed):
    config = run_in(tmp_path, undisturbed.model)
    for processes, until in ((2, 2), (4, 4), (1, STEPS)):
        run_ranks(processes, sit, config, None, 0, until, deadline=120)
    found, expected = figures(tmp_path), figures(undisturbed.directory)
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            # Sums over processes are rounded in another order.
            assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (one["step"], name)
