"""What becomes of a run over several processes when machines, links and schedulers fail.

Two network namespaces joined by a pair of virtual interfaces stand for two machines; making them needs root, and
iproute2.
"""

import ctypes
import functools
import itertools
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prime_train.algorithm import prm
from prime_train.run.directory import read_records
from prime_train.run.saved import steps
from tests.support.paths import ROOT
from tests.support.processes import run_alone, run_ranks, started_ranks
from tests.support.runs import assert_close, bare, config_file, figures, run
from tests.support.tiny import saved_model

CLONE_NEWNET = 0x40000000
PATIENCE = 10.0
STEPS = 3


@dataclass(frozen=True)
class Machines:
    """Two network namespaces, and the link between them."""

    names: tuple[str, str]

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def link(self, machine: int) -> str:
        return f"{self.names[machine]}-if"

    def cut(self) -> None:
        """No packet gets through any more, and nobody is told so."""
        ip("netns", "exec", self.names[0], "ip", "link", "set", self.link(0), "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[Machines]:
    made = Machines((f"a{os.getpid()}", f"b{os.getpid()}"))
    try:
        for name in made.names:
            ip("netns", "add", name)
        ip("link", "add", made.link(0), "type", "veth", "peer", "name", made.link(1))
        for i, name in enumerate(made.names):
            ip("link", "set", made.link(i), "netns", name)
            for words in (
                ("addr", "add", f"{made.address(i)}/24", "dev", made.link(i)), ("link", "set", made.link(i), "up"),
                ("link", "set", "lo", "up"),
            ):  # fmt: skip
                ip("netns", "exec", name, "ip", *words)
        yield made
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"network namespaces cannot be made: {error}")
    finally:
        for name in made.names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_machine(machines: Machines, words: list[str]) -> int:
    """A run's process, of whose four ranks two are on each machine."""
    machine = int(os.environ["RANK"]) // 2
    with open(f"/var/run/netns/{machines.names[machine]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ |= {"MASTER_ADDR": machines.address(0), "GLOO_SOCKET_IFNAME": machines.link(machine)}
    return run(words)


def command(directory: Path, start: str, **changes: dict) -> list[str]:
    rollout = {"prompts": 4, "samples": 4} | changes.pop("rollout", {})
    model = changes.pop("model", {"tokens_per_micro_batch": 64})
    path = config_file(directory, start, rollout=rollout, model=model, **changes)
    return ["run", path]


@pytest.mark.slow
def test_two_machines_give_the_losses_of_one(tmp_path, machines):
    start = saved_model(tmp_path / "model", shape="16x2x2")
    one, two = (command(tmp_path / name, start) for name in ("one", "two"))
    assert run_ranks(4, run, one, deadline=120.0) == [0] * 4
    assert run_ranks(4, on_machine, machines, two, deadline=120.0) == [0] * 4
    wanted = figures(tmp_path / "one")
    assert [record["step"] for record in wanted] == list(range(STEPS + 1))
    assert_close(figures(tmp_path / "two"), wanted, rel=1e-5)


@pytest.mark.slow
def test_a_link_that_is_cut_ends_every_process_in_time_and_each_names_the_stage(tmp_path, machines):
    start = saved_model(tmp_path / "model", shape="16x2x2")
    words = command(tmp_path, start, run={"patience": PATIENCE, "checkpoint_every": 0, "steps": 10**6})
    with started_ranks(4, on_machine, machines, words) as ranks:
        metrics = tmp_path / "run" / "metrics.jsonl"
        until = time.monotonic() + 90
        while len(read_records(metrics)) < 4:
            assert time.monotonic() < until, [rank.output()[-2000:] for rank in ranks]
            time.sleep(0.1)
        machines.cut()
        began = time.monotonic()
        ended = [rank.wait(PATIENCE + 50) for rank in ranks]
        assert time.monotonic() - began < PATIENCE + 20
    for rank, end in enumerate(ended):
        assert end.code == 1, end
        assert re.search(rf"stage '\w+' of step \d+, process {rank} of 4", f"{end.output}{end.error}"), end


def run_aborted(words: list[str]) -> int:
    """A run that ends in the PRM's update as where NCCL's watchdog ends it, from a thread that is not Python's."""
    prm.learn = lambda *args: os.abort()
    return run_as_it_is(words)


def test_a_process_that_is_aborted_shows_in_which_function(tmp_path):
    words = command(tmp_path, saved_model(tmp_path / "model"), eval={"every": 0, "prompts": 1})
    ended = run_alone(run_aborted, words)
    assert ended.code == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in ended.output
    assert "in reward_and_update" in ended.output


# -- signals, and restarts by torchrun --


def torchrun(words: list[str], size: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
        "--max-restarts", str(restarts), "-m", "prime_train", *words,
    ]  # fmt: skip
    # https://github.com/pytorch/pytorch/issues/135712: otherwise workers that are started anew do not find each other.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of torchrun's workers."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def wait_for_records(directory: Path, count: int, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while len(read_records(directory / "run" / "metrics.jsonl")) < count:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_is_started_anew_by_torchrun_and_the_run_goes_on_as_if_nothing_had_been(tmp_path):
    start = saved_model(tmp_path / "model")
    eight = {"steps": 8, "patience": 60.0}
    straight, killed = (command(tmp_path / name, start, run=eight) for name in ("straight", "killed"))
    with running(torchrun(killed, restarts=2)) as process:
        wait_for_records(tmp_path / "killed", 4, process)
        os.kill(workers(process)[1], signal.SIGKILL)
        out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-4000:]
    # The same arithmetic: the steps after the checkpoint are to the bit those of a run that nobody disturbed.
    assert run_ranks(2, run_as_it_is, straight, deadline=120.0) == [0, 0]
    assert figures(tmp_path / "killed") == figures(tmp_path / "straight")
    assert [record["step"] for record in figures(tmp_path / "killed")] == list(range(9))


def run_as_it_is(words: list[str]) -> int:
    from prime_train import cli

    return cli.main(words)


def test_sigterm_saves_and_exits_0_and_the_same_command_goes_on(tmp_path):
    start = saved_model(tmp_path / "model")
    words = command(tmp_path, start, run={"checkpoint_every": 0, "steps": 10**6}, model={})
    with started_ranks(1, run_as_it_is, words) as [child]:
        until = time.monotonic() + 60
        while len(read_records(tmp_path / "run" / "metrics.jsonl")) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGTERM)
        ended = child.wait(30.0)
    assert (ended.code, ended.result) == (0, 0), ended
    assert "the same command goes on from here" in ended.output
    stopped = read_records(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert run_ranks(1, run_as_it_is, [*words, "--run.steps", str(stopped + 1)]) == [0]
    assert [record["step"] for record in figures(tmp_path)] == list(range(stopped + 2))


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_of_several_processes_stops_all_of_them_and_saves(tmp_path, told):
    start = saved_model(tmp_path / "model")
    words = command(tmp_path, start, run={"checkpoint_every": 0, "steps": 10**6})
    with started_ranks(2, run_as_it_is, words) as ranks:
        until = time.monotonic() + 60
        while len(read_records(tmp_path / "run" / "metrics.jsonl")) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(ranks[told].pid, signal.SIGTERM)
        ended = [rank.wait(30.0) for rank in ranks]
    assert [(end.code, end.result) for end in ended] == [(0, 0)] * 2, ended
    stopped = read_records(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:06}").is_dir()


def run_terminated(words: list[str], *moments: tuple[str, int]) -> int:
    """A run that SIGTERM reaches as each of these functions is called for the n-th time."""
    bare()
    for name, n in moments:
        owner, _, attribute = name.rpartition(".")
        place = pkgutil.resolve_name(owner)
        setattr(place, attribute, terminated_by(getattr(place, attribute), n))
    return run_as_it_is(words)


def terminated_by(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    @functools.wraps(function)
    def counted(*args, **options):
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    return counted


SFT = {"base": "tiny:16x1x2", "data": "arithmetic", "steps": 2, "batch": 4}
# What is called when the signals come, and the newest step of PRIME that is saved.
SIGTERMS = {
    "again in the last save": ([("prime_train.algorithm.policy.update", 2), ("prime_train.run.saved.complete", 4)], 2),
    "in the last save of a run that is complete": ([("prime_train.run.directory.RunDirectory.finish", 2)], STEPS),
    "in the last step of SFT": ([("prime_train.sft.learning_rate", 2)], None),
    "while models load": ([("prime_train.prime.load_models", 1)], None),
    "while a run resumes": ([("prime_train.run.directory.RunDirectory.resume", 2)], None),
    "while curves are drawn": ([("prime_train.show.report.draw", 1)], STEPS),
    "while SFT's model is saved": ([("prime_train.sft.save_model", 1)], None),
}


@pytest.mark.parametrize(
    ("moments", "newest"),
    [pytest.param(*of, id=name, marks=[pytest.mark.slow] * (i > 2)) for i, (name, of) in enumerate(SIGTERMS.items())],
)
def test_sigterm_at_any_time_exits_0_and_loses_nothing(tmp_path, moments, newest):
    words = command(tmp_path, "sft", sft=SFT)
    ended = run_alone(run_terminated, words, *moments)
    assert (ended.code, ended.result) == (0, 0), ended
    assert max(steps(tmp_path / "run" / "checkpoints"), default=None) == newest
    assert ("complete:" if newest == STEPS else "the same command goes on from here") in ended.output
    assert not list(tmp_path.glob("run/**/*.partial"))
    assert (tmp_path / "run" / "sft" / "model").is_dir()
    assert run_alone(run_terminated, words).result == 0
    assert [record["step"] for record in figures(tmp_path)] == list(range(STEPS + 1))
