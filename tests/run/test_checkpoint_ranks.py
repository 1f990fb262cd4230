"""Checkpoints of several processes: any number goes on with what any other saved, and an error of one is all's."""

import json
import os
import signal
import time

import pytest
import torch

from prime_train.config.keys import Config, Run
from prime_train.models import optim
from prime_train.models.distributed import joined, shard, whole
from prime_train.models.language_model import add_adapters
from prime_train.run.checkpoints import Checkpoints, Progress, load_weights, progress_at
from prime_train.run.directory import RunDirectory, read_records
from prime_train.run.saved import CheckpointError, CheckpointRefused, damage, steps
from tests.run.test_checkpoints import net_of
from tests.support.processes import ProcessFailed, run_ranks
from tests.support.tiny import CPU, model

PROGRESS = Progress(step=3, position=17, too_long=2, seconds=1.5)
SHAPE = "18x2x3"  # no number of processes divides all of its dimensions


def world_of(replicas=1):
    """0 replicas: one process, whose models are not sharded."""
    return joined(CPU, replicas=max(replicas, 1), patience=30, sharded=replicas > 0)


def trained(world, seed, steps, kind="whole"):
    """A model on its way, the same on any number of processes up to rounding: gradients are of the weights alone."""
    net = net_of(seed, kind == "tied", SHAPE)
    if kind == "lora":
        add_adapters(net, 2)
    shard(net, world)
    optimizer = optim.adamw(net, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        for p in (p for p in net.parameters() if p.requires_grad):
            p.grad = p.detach().sin()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def contents(net, optimizer):
    """Whole weights and moments of what is trained, by name."""
    names = {p: name for name, p in net.named_parameters() if p.requires_grad}
    found = {name: whole(p.detach()).clone() for p, name in names.items()}
    for p, moments in optimizer.state.items():
        found |= {f"{names[p]}/{key}": whole(value).clone() for key, value in moments.items()}
    return found


def save_there(directory, replicas, kind):
    with world_of(replicas) as world:
        pair = trained(world, 0, 3, kind)
        checkpoints = Checkpoints(directory, keep=2, world=world)
        checkpoints.save(PROGRESS, {"policy": pair})
        checkpoints.wait()
        return contents(*pair)


def load_there(directory, replicas, kind):
    with world_of(replicas) as world:
        pair = trained(world, 5, 1, kind)
        checkpoints = Checkpoints(directory, keep=2, world=world)
        return checkpoints.load(checkpoints.latest(), {"policy": pair}), contents(*pair)


# Processes, and replicas of the sharded models; 0 is not sharded.
PAIRS = [
    ((2, 1), (4, 1), "whole"),
    ((2, 1), (1, 0), "tied"),
    ((1, 0), (2, 1), "tied"),
    ((2, 1), (1, 0), "lora"),
    ((2, 1), (1, 1), "whole"),  # sharded over one process, for mixed precision or offloading
    pytest.param((4, 2), (3, 1), "tied", marks=pytest.mark.slow),
    pytest.param((3, 1), (4, 2), "lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("saving", "loading", "kind"), PAIRS)
def test_another_number_of_processes_goes_on_from_the_same_weights_and_moments(tmp_path, saving, loading, kind):
    written = run_ranks(saving[0], save_there, tmp_path, saving[1], kind)[0]
    for progress, loaded in run_ranks(loading[0], load_there, tmp_path, loading[1], kind):
        assert progress == PROGRESS
        assert loaded.keys() == written.keys()
        for name, value in written.items():
            assert torch.equal(loaded[name], value), name


def test_one_process_takes_the_weights_of_several_without_their_optimizers(tmp_path):
    written = run_ranks(2, save_there, tmp_path, 1, "tied")[0]
    net = net_of(5, True, SHAPE)
    load_weights(tmp_path / "step-000003", "policy", net)
    for name, p in net.named_parameters():
        assert torch.equal(p, written[name])
    with pytest.raises(CheckpointRefused, match=r"embed_tokens.weight of the policy has shape \[\d+, 18\] there and"):
        load_weights(tmp_path / "step-000003", "policy", model(0, "24x2x3"))


def take_weights(directory):
    with world_of() as world:
        net = shard(net_of(5, True, SHAPE), world)
        load_weights(directory / "step-000003", "policy", net, world)
        return {name: whole(p.detach()).clone() for name, p in net.named_parameters()}


def test_several_processes_take_the_weights_alone(tmp_path):
    written = run_ranks(1, save_there, tmp_path, 0, "tied")[0]
    for taken in run_ranks(2, take_weights, tmp_path):
        for name, weight in taken.items():
            assert torch.equal(weight, written[name]), name


# -- errors --


def saved_once(world, directory):
    """A model and its optimizer, and checkpoints of which step 1 is complete."""
    pair = trained(world, 0, 1)
    checkpoints = Checkpoints(directory, keep=2, world=world)
    checkpoints.save(Progress(step=1), {"policy": pair})
    checkpoints.wait()
    return pair, checkpoints


def disk_is_full_for(rank, directory):
    with world_of() as world:
        pair, checkpoints = saved_once(world, directory)
        if world.rank == rank:
            torch.save = _full
        checkpoints.save(Progress(step=2), {"policy": pair})
        try:
            checkpoints.wait()
        except CheckpointError as error:
            return str(error)


def _full(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_write_ends_the_save_of_all_and_the_one_before_stays(tmp_path, rank):
    said = run_ranks(2, disk_is_full_for, rank, tmp_path)
    assert all(f"No space left on device (process {rank})" in words for words in said)
    assert "the last complete one is step-000001, untouched" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def disk_is_full_once_for(rank, directory):
    with world_of() as world:
        pair, warned = {"policy": trained(world, 0, 1)}, []
        run = RunDirectory(Config(run=Run(dir=directory)), directory, world, warned.append)
        save = torch.save
        if world.rank == rank:
            torch.save = _full
        run.save(Progress(step=1), pair, due=True)
        while not run.checkpoints.failed():
            time.sleep(0.01)
        torch.save = save
        run.save(Progress(step=2), pair, due=False)
        return warned, list(steps(directory / "checkpoints"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_failed_on_one_process_is_made_up_for_by_all_at_the_next_step(tmp_path, rank):
    for [warned], there in run_ranks(2, disk_is_full_once_for, rank, tmp_path):
        assert f"No space left on device (process {rank})" in warned
        assert there == [2]


def killed_in_a_save(rank, directory):
    with world_of() as world:
        pair, checkpoints = saved_once(world, directory)
        if world.rank == rank:
            torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(Progress(step=2), {"policy": pair})
        checkpoints.wait()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_in_a_save_leaves_the_one_before(tmp_path, rank):
    with pytest.raises(ProcessFailed, match=rf"rank {rank}: exit code -9"):
        run_ranks(2, killed_in_a_save, rank, tmp_path)
    assert list(steps(tmp_path)) == [1]
    assert not damage(tmp_path / "step-000001")
    progress, _ = run_ranks(2, load_there, tmp_path, 1, "whole")[1]
    assert progress.step == 1


def test_a_damaged_checkpoint_is_refused_on_all_processes(tmp_path):
    run_ranks(2, save_there, tmp_path, 1, "whole")
    (tmp_path / "step-000003" / "__1_0.distcp").unlink()
    with pytest.raises(ProcessFailed) as failed:
        run_ranks(2, load_there, tmp_path, 1, "whole")
    said = "CheckpointRefused: the checkpoint .*step-000003 is damaged: __1_0.distcp is missing"
    assert failed.match(rf"(?s)rank 0.*{said}.*rank 1.*{said}")


# -- run directories --


def steps_of_a_run(directory):
    with world_of() as world:
        pair = trained(world, 0, 1)
        run = RunDirectory(Config(run=Run(dir=directory)), directory, world)
        progress = run.resume({"policy": pair})
        for step in range(progress.step + 1, progress.step + 3):
            run.log(step, {"rank": float(world.rank)})
            run.log_samples(step, [{"rank": world.rank}])
            said = run.keep_nonfinite(step, batch=None)
            progress = Progress(step=step)
            run.checkpoints.save(progress, {"policy": pair})
        run.log(step + 1, {"rank": float(world.rank)})
        run.finish(progress, {"policy": pair})
        return progress.step, said


def test_of_several_processes_the_one_that_leads_writes_the_records(tmp_path):
    assert len(set(run_ranks(2, steps_of_a_run, tmp_path))) == 1
    assert {step for step, _ in run_ranks(2, steps_of_a_run, tmp_path)} == {4}
    for name, expected in (("metrics.jsonl", [1, 2, 3, 4, 5]), ("samples.jsonl", [1, 2, 3, 4])):
        assert read_records(tmp_path / name) == [
            {"step": step, "rank": 0.0 if name == "metrics.jsonl" else 0} for step in expected
        ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    latest = tmp_path / "checkpoints" / "step-000004"
    assert progress_at(latest).step == 4
    assert json.loads((latest / "config.json").read_text())["run"]["dir"] == str(tmp_path)
