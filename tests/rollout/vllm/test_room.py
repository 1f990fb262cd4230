"""Directories of snapshots, which the next run removes, and whether the policy's weights fit where they are to lie."""

import fcntl
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from prime_train import checks
from prime_train.config.settings import ConfigError, load_config
from prime_train.models.snapshot import Weights, nbytes
from prime_train.rollout.vllm import room
from prime_train.rollout.vllm.build import room_of
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.room import LOCK, PREFIX, Claim, Room, sweep
from prime_train.rollout.vllm.transport import FileTransport
from tests.support.paths import ROOT
from tests.support.tiny import model, saved_model

MAKER = """
import sys, time
from pathlib import Path
from prime_train.rollout.vllm.room import Claim

claim = Claim(Path(sys.argv[1]))
(claim.path / "snapshot-3").mkdir()
(claim.path / "snapshot-3" / "model.safetensors").write_bytes(bytes(1000))
print(claim.path, flush=True)
time.sleep(600)
"""
Usage = namedtuple("Usage", "total used free")


@contextmanager
def maker(directory):
    """Another process with a snapshot below the directory, and where that is."""
    command = [sys.executable, "-c", MAKER, str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def killed(directory):
    """What a process that was killed left there."""
    with maker(directory) as (_, path):
        pass
    assert (path / "snapshot-3" / "model.safetensors").exists()
    return path


# -- who removes what --


def test_the_next_transport_removes_what_a_killed_one_left_and_nothing_of_those_that_live(tmp_path):
    with maker(tmp_path) as (process, living):
        dead = killed(tmp_path)
        mine, other = FileTransport(tmp_path), FileTransport(tmp_path)
        assert not dead.exists()
        assert (living / "snapshot-3" / "model.safetensors").exists()
        roots = {living, mine.snapshot.parent, other.snapshot.parent}
        assert set(tmp_path.iterdir()) == roots
        process.kill()
        process.wait()
        sweep(tmp_path)
        assert set(tmp_path.iterdir()) == roots - {living}


def test_a_directory_that_is_being_made_is_not_swept(tmp_path, monkeypatch):
    # As if another process swept before and after everything that is done to make it.
    instants, sweeping = [], []

    def swept(act):
        def instant(*args, **options):
            if sweeping or args[:1] == (room.BOOT_ID,):
                return act(*args, **options)
            sweeping.append(True)
            sweep(tmp_path)
            found = act(*args, **options)
            sweep(tmp_path)
            sweeping.clear()
            instants.append(act.__name__)
            return found

        return instant

    places = {"mkdtemp": room.tempfile, "open": Path, "flock": fcntl, "chmod": Path, "rename": Path}
    for name, place in places.items():
        monkeypatch.setattr(place, name, swept(getattr(place, name)))
    claim = Claim(tmp_path)
    monkeypatch.undo()
    assert instants == list(places)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [claim.path]
    assert [path.name for path in claim.path.iterdir()] == [LOCK]


def test_a_removal_that_is_cut_off_is_done_by_the_next(tmp_path, monkeypatch):
    def cut_off(path, **_):
        (path / LOCK).unlink(missing_ok=True)
        raise KeyboardInterrupt

    killed(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path)
    monkeypatch.undo()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_made_elsewhere_or_by_others_or_has_no_lock_stays(tmp_path, monkeypatch):
    unlocked = killed(tmp_path)
    (unlocked / LOCK).unlink()
    monkeypatch.setattr(room, "BOOT_ID", tmp_path / "boot_id")
    (tmp_path / "boot_id").write_text("another-boot\n")
    elsewhere = tmp_path / f"{PREFIX}1-{room._boot()}-x"
    shutil.copytree(unlocked, elsewhere)
    (elsewhere / LOCK).touch()
    monkeypatch.undo()
    foreign = killed(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as root:
        root.setattr("os.geteuid", lambda: foreign.stat().st_uid + 1)
        sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    sweep(tmp_path)
    assert not foreign.exists()
    assert {unlocked, elsewhere} <= set(tmp_path.iterdir())


def test_a_link_with_such_a_name_leads_to_no_removal(tmp_path):
    target = tmp_path / "precious"
    (target / "inside").mkdir(parents=True)
    (target / LOCK).touch()
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / f"{PREFIX}1-{room._boot()}-x").symlink_to(target)
    sweep(shared)
    assert (target / "inside").exists()


def test_a_file_system_without_locks_does_and_nothing_is_swept_there(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    claims = [Claim(tmp_path) for _ in range(2)]
    assert set(tmp_path.iterdir()) == {claim.path for claim in claims}
    for claim in claims:
        claim.release()
    assert not list(tmp_path.iterdir())


def test_where_no_directory_can_be_made_it_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=f"^{tmp_path}/file: there can be no snapshots of weights: .*File exists"):
        FileTransport(tmp_path / "file")


# -- room --


def with_servers(tmp_path, servers, *words):
    path, policy = tmp_path / "run.toml", tmp_path / "model"
    if not policy.exists():
        saved_model(policy)
    path.write_text(f'[run]\ndir = "{tmp_path / "run"}"\n[data]\ntrain = "arithmetic"\neval = "arithmetic"\n')
    return load_config(
        str(path), ["--model.policy", str(policy), "--rollout.engine", "vllm", "--vllm.servers",
                    servers, *words]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["saved", "sft"])
def test_the_room_that_is_needed_is_what_a_snapshot_takes(tmp_path, dtype, policy):
    words = ["--model.policy", "sft", "--sft.base", "tiny:16x1x2"] if policy == "sft" else []
    found = room_of(with_servers(tmp_path, "http://127.0.0.1:9", "--model.dtype", dtype, *words))
    net = model()
    net.compute_dtype = getattr(torch, dtype)
    weights = Weights.of(net)
    assert found.needed == nbytes(weights.manifest)
    assert found.directory == Path("/dev/shm")
    transport = FileTransport(tmp_path)
    transport.publish(weights)
    written = sum(file.stat().st_size for file in transport.snapshot.glob("*.safetensors"))
    assert found.needed < written < found.needed + 4096


def test_a_start_that_finds_too_little_room_is_refused_with_where_how_much_and_what_to_do(tmp_path, monkeypatch):
    def refusal(servers, *words):
        with pytest.raises(ConfigError) as error:
            checks.refuse_impossible(with_servers(tmp_path, servers, *words))
        return str(error.value).splitlines()

    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(2**26, 2**26 - 2**12, 2**12))
    needed = nbytes(Weights.of(model()).manifest) / 2**30
    said = f"has 3.8e-06 GiB free, and one copy of the policy takes {needed:.2g} GiB"
    fp32 = ("--model.dtype", "float32")
    assert refusal("http://127.0.0.1:9", *fp32) == [f"vllm.transport: /dev/shm {said} (in a container: --shm-size)"]
    assert refusal("http://another.machine:9", *fp32) == [f"vllm.transport: {tmp_path}/run/vllm {said}"]
    assert asked == [Path("/dev/shm"), tmp_path]
    others = refusal("http://127.0.0.1:9", "--vllm.transport", "nccl", "--run.device", "cpu")
    assert not any("GiB" in problem for problem in others)


def test_a_start_whose_policy_nobody_knows_is_not_refused_for_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    checks.refuse_impossible(with_servers(tmp_path, "http://127.0.0.1:9", "--model.policy", "nobody/nothing"))


def test_what_dead_runs_left_takes_no_room(tmp_path):
    config = with_servers(tmp_path, "http://another.machine:9")
    dead = killed(tmp_path / "run" / "vllm")
    assert room_of(config).suffices
    assert not dead.exists()


def test_a_file_system_without_a_limit_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert Room.now(tmp_path / "not" / "yet", 2**40) == Room(tmp_path / "not" / "yet", math.inf, 2**40)
    assert Room.now(tmp_path, 2**40).suffices
