"""Checkpoint directories: damage is found and named before anything is read, and a full disk costs nothing."""

import ctypes
import os
import re
import resource
import shutil
import signal

import pytest
import torch

from prime_train import cli
from prime_train.run import saved
from prime_train.run.checkpoints import Checkpoints, Progress
from prime_train.run.saved import CheckpointError, CheckpointRefused
from tests.run.test_checkpoints import save, trained
from tests.support.processes import run_alone
from tests.support.runs import config_file
from tests.support.tiny import model, saved_model, weights


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        save(checkpoints, Progress(step=step), {"policy": trained(step, step)})
    return checkpoints


def truncate(path):
    os.truncate(path, path.stat().st_size - 7)


DAMAGE = {
    "truncated": (lambda path: truncate(path / "__0_0.distcp"), r"__0_0.distcp has \d+ bytes, \d+ were written"),
    "missing": (lambda path: (path / ".metadata").unlink(), r".metadata is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest.json cannot be read: .*No such file"),
    "no progress": (lambda path: truncate(path / "progress.json"), r"progress.json cannot be read: "),
    "half a manifest": (lambda path: truncate(path / "manifest.json"), r"manifest.json cannot be read: "),
}


@pytest.mark.parametrize(("harm", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_a_weight_is_touched(two, harm, said):
    harm(two.directory / "step-000002")
    net, optimizer = trained(7)
    before = weights(net)
    how = "remove or rename that directory, and the same command goes on from step-000001"
    with pytest.raises(CheckpointRefused, match=rf"step-000002 is damaged: {said}.*; {how}"):
        two.load(two.latest(), {"policy": (net, optimizer)})
    assert torch.equal(weights(net), before)
    assert not optimizer.state
    (two.directory / "step-000002").rename(two.directory / "broken")
    assert two.load(two.latest(), {"policy": (net, optimizer)}).step == 1


def test_the_way_on_names_the_newest_one_that_is_not_damaged(two):
    save(two, Progress(step=3), {"policy": trained()})
    save(two, Progress(step=4), {"policy": trained()})
    for step in (3, 4):
        truncate(two.directory / f"step-{step:06}" / ".metadata")
    with pytest.raises(CheckpointRefused, match="goes on from the beginning: there is no other checkpoint"):
        saved.refuse_damaged(two.directory / "step-000004")


def test_a_file_that_is_not_as_long_as_it_says_is_refused_too(two):
    path = two.latest() / "__0_0.distcp"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CheckpointRefused, match="step-000002 cannot be read: "):
        two.load(two.latest(), {"policy": trained()})


def test_a_checkpoint_of_another_model_is_refused_with_the_first_tensor_that_differs(two):
    other = (model(0, "24x1x2"), trained()[1])
    before = weights(other[0])
    shapes = r"has shape \[(\d+), 16\] there and has shape \[\1, 24\] here"
    with pytest.raises(CheckpointRefused, match=rf"of another model: .*embed_tokens.weight of the policy {shapes}"):
        two.load(two.latest(), {"policy": other})
    assert torch.equal(weights(other[0]), before)
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.\S+ of the policy does not exist there and has shape"):
        two.load(two.latest(), {"policy": (model(0, "16x2x2"), trained()[1])})
    with pytest.raises(CheckpointRefused, match=r"of the prm does not exist there"):
        two.load(two.latest(), {"prm": trained()})


def test_leftovers_of_a_save_are_removed_by_the_next_one_and_never_taken(two):
    for name in ("step-000003.partial", "step-000001.partial"):
        (two.directory / name).mkdir()
        (two.directory / name / "__0_0.distcp").write_text("half a fi")
    assert two.latest().name == "step-000002"
    two.load(two.latest(), {"policy": trained()})
    assert len(list(two.directory.glob("*.partial"))) == 2
    save(two, Progress(step=3), {"policy": trained()})
    assert sorted(path.name for path in two.directory.iterdir()) == ["step-000002", "step-000003"]


def test_progress_that_cannot_be_written_anew_stays_as_it_was(two, monkeypatch):
    monkeypatch.setattr(saved, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"step-000002/progress.json could not be written anew: .*No space"):
        two.save(Progress(step=2, seconds=9.0), {"policy": trained()})
    two.save(Progress(step=2), {"policy": trained()})
    assert two.load(two.latest(), {"policy": trained()}) == Progress(step=2)


# -- a full disk --


def in_a_small_file_system(directory):
    """Mounts one that nobody else sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user = 0x20000, 0x10000000
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        return False
    return not libc.mount(b"none", str(directory).encode(), b"tmpfs", 0, b"size=512k")


def fill_the_disk(directory):
    if not in_a_small_file_system(directory):
        return None
    first, second = trained(0, 1), trained(1, 2)
    checkpoints = Checkpoints(directory, keep=2)
    save(checkpoints, Progress(step=1), {"policy": first})
    files = {path.name: path.read_bytes() for path in (directory / "step-000001").iterdir()}
    room = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    (directory / "others").write_bytes(b"\0" * (room - 20_000))
    checkpoints.save(Progress(step=2), {"policy": second})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        said = str(error)
    left = sorted(path.name for path in directory.iterdir())
    untouched = {path.name: path.read_bytes() for path in (directory / "step-000001").iterdir()} == files
    (directory / "others").unlink()
    loaded = trained(5)
    assert checkpoints.load(checkpoints.latest(), {"policy": loaded}).step == 1
    assert torch.equal(weights(loaded[0]), weights(first[0]))
    save(checkpoints, Progress(step=2), {"policy": second})
    return said, left, untouched


def test_a_disk_that_fills_during_a_save_keeps_the_former_checkpoint(tmp_path):
    ended = run_alone(fill_the_disk, tmp_path)
    assert ended.code == 0, ended
    if ended.result is None:
        pytest.skip("needs the right to mount a file system, as root or in a user namespace")
    said, left, untouched = ended.result
    assert "step-000002 could not be written: [Errno 28] No space left on device" in said
    assert "bytes are free there; the last complete one is step-000001, untouched; make room" in said
    assert left == ["others", "step-000001"]
    assert untouched


def save_with_a_limit_on_files(directory):
    checkpoints = Checkpoints(directory, keep=2)
    save(checkpoints, Progress(step=1), {"policy": trained(0, 1)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints.save(Progress(step=2), {"policy": trained(1, 2)})
    checkpoints.wait()


def test_a_file_that_cannot_grow_is_told_without_an_assertion_of_torch(tmp_path):
    ended = run_alone(save_with_a_limit_on_files, tmp_path)
    assert "CheckpointError: the checkpoint" in ended.error
    assert "step-000002 could not be written: [Errno 27] File too large" in ended.error
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


# -- what the command says --


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and a run of two steps from it."""
    directory = tmp_path_factory.mktemp("made")
    path = config_of(directory, saved_model(directory / "model"))
    assert cli.main(["run", path, "--run.steps", "2"]) == 0
    return directory


def config_of(directory, start):
    return config_file(directory, start, eval={"every": 0, "prompts": 1}, verify={"workers": 1})


@pytest.fixture
def run_of_two_steps(tmp_path, made):
    shutil.copytree(made / "run", tmp_path / "run")
    return config_of(tmp_path, str(made / "model"))


def test_the_command_refuses_a_damaged_checkpoint_in_a_sentence(tmp_path, run_of_two_steps, capsys):
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    truncate(newest / "__0_0.distcp")
    capsys.readouterr()
    for command in ("run", "eval"):
        assert cli.main([command, run_of_two_steps]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"prime-train: the checkpoint {newest} is damaged: __0_0.distcp has ")
        assert said.endswith("the same command goes on from step-000001\n")


def test_the_configuration_in_the_checkpoint_is_compared_too(tmp_path, run_of_two_steps, capsys):
    (tmp_path / "run" / "config.json").unlink()
    assert cli.main(["run", run_of_two_steps, "--policy.clip_low", "0.1"]) == 2
    assert "policy.clip_low: the run in" in capsys.readouterr().err
    assert cli.main(["run", run_of_two_steps, "--run.keep_every", "2", "--run.steps", "3"]) == 0


def test_the_command_ends_with_1_where_a_checkpoint_cannot_be_written(tmp_path, run_of_two_steps, capsys, monkeypatch):
    monkeypatch.setattr(saved, "complete", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert cli.main(["run", run_of_two_steps, "--run.steps", "4"]) == 1
    out, err = capsys.readouterr()
    assert "step-000003 could not be written: [Errno 28] No space left on device" in out
    assert err.startswith(f"prime-train: the checkpoint {tmp_path}/run/checkpoints/step-000004 could not be written: ")
    assert "the last complete one is step-000002, untouched" in err
    monkeypatch.undo()
    assert cli.main(["run", run_of_two_steps, "--run.steps", "3"]) == 0


def test_a_step_is_saved_at_once_where_the_save_before_it_failed(tmp_path, run_of_two_steps, capsys, monkeypatch):
    complete, failures = saved.complete, [OSError(28, "No space left on device")]

    def full_once(final, *args):
        if failures:
            raise failures.pop()
        complete(final, *args)

    monkeypatch.setattr(saved, "complete", full_once)
    words = ["--run.steps", "20", "--run.checkpoint_every", "3", "--run.keep_every", "1"]
    assert cli.main(["run", run_of_two_steps, *words]) == 0
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the checkpoint")]
    assert "step-000003 could not be written: [Errno 28] No space left on device" in warning
    instead = int(re.search(r"step (\d+) is saved at once instead$", warning)[1])
    assert 3 < instead <= 6
    due = {1, 2, 6, 9, 12, 15, 18, 20}  # 1 and 2 are of the run before
    assert set(saved.steps(tmp_path / "run" / "checkpoints")) == due | {instead}
