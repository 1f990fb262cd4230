"""A server of the run's own: its whole process tree goes with it, and its death costs no step; no vLLM needed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prime_train.rollout.vllm import server as server_module
from prime_train.rollout.vllm.build import SHARED_MEMORY
from prime_train.rollout.vllm.client import Server
from prime_train.rollout.vllm.engine import RESTARTS, VLLMEngine
from prime_train.rollout.vllm.errors import ServerDied, ServerError
from prime_train.rollout.vllm.guard import descendants
from prime_train.rollout.vllm.server import GUARD, ServerProcess, command_line, free_port
from prime_train.rollout.vllm.transport import FileTransport
from prime_train.run.directory import read_records
from tests.support.fake_vllm import EOS
from tests.support.paths import ROOT
from tests.support.runs import config_file
from tests.support.tiny import model, saved_model

FAKE = [sys.executable, str(ROOT / "tests" / "support" / "fake_vllm.py")]
SOON = 10.0


def process(tmp_path, *command, deadline=30.0):
    return ServerProcess(command or FAKE, log=tmp_path / "server.log", deadline=deadline)


def engine_on(tmp_path, *command, sleeps=False):
    (tmp_path / "weights").mkdir(exist_ok=True)
    return VLLMEngine(
        model(), FileTransport(tmp_path / "weights"), eos=[EOS], deadline=20.0, process=process(tmp_path, *command),
        sleeps=sleeps,
    )  # fmt: skip


def sample(engine, progress=lambda tokens: None):
    found = engine.sample([[7, 8], [9]], n=1, temperature=1.0, max_tokens=8, seeds=[0, 1], progress=progress)
    return [group[0].tokens for group in found]


WANT = [(7, 8, EOS), (9, EOS)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_soon(pids):
    end = time.monotonic() + SOON
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def server_pid(process):
    """Of the server itself, below its guard."""
    [pid] = [
        pid for pid in descendants(process._guard.pid) if b"fake_vllm" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return pid


@pytest.fixture
def started():
    """What this test has started, not what its process had running before."""
    before = set(descendants(os.getpid()))
    return lambda: [pid for pid in descendants(os.getpid()) if pid not in before]


# -- life and death --


def test_a_started_server_answers_and_its_whole_tree_is_gone_after_the_engine(tmp_path, started):
    with engine_on(tmp_path, *FAKE, "--orphan", str(tmp_path / "pid")) as engine:
        engine.refresh(0)
        assert sample(engine) == WANT
        tree = started()
        assert len(tree) >= 3  # guard, server and its child
        assert all(map(alive, tree))
    assert not any(map(alive, tree))
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_tree_goes_when_the_trainer_does_however_it_goes(tmp_path, number):
    script = (
        "import pathlib, sys, time\n"
        "from prime_train.rollout.vllm.server import ServerProcess\n"
        f"server = ServerProcess({[*FAKE, '--orphan', str(tmp_path / 'pid')]!r}, log=pathlib.Path(sys.argv[1]), "
        "deadline=30)\n"
        "server.start()\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "server.log")]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert trainer.stdout.readline() == b"up\n"
    tree = descendants(trainer.pid)
    assert len(tree) >= 3
    trainer.send_signal(number)
    trainer.communicate(timeout=SOON)
    assert gone_soon(tree)


def test_a_crash_of_the_program_ends_the_server(tmp_path, started):
    tree = []

    def crashing():
        with engine_on(tmp_path):
            tree.extend(started())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crashing()
    assert tree
    assert not any(map(alive, tree))


def test_what_ignores_sigterm_is_killed(monkeypatch, tmp_path):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    shortened = GUARD.read_text().replace("GRACE_S = 8.0", "GRACE_S = 0.3")
    assert shortened != GUARD.read_text()
    guard = subprocess.Popen(
        [sys.executable, "-c", shortened, sys.executable, "-c", stubborn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert guard.stdout.readline() == b"up\n"
    tree = descendants(guard.pid)
    assert len(tree) == 1
    guard.communicate(timeout=SOON)
    assert not any(map(alive, tree))


def test_a_server_killed_while_it_samples_is_started_anew_with_the_same_weights_and_nothing_is_lost(tmp_path):
    with engine_on(tmp_path) as engine:
        engine.refresh(4)
        first = server_pid(engine.process)
        os.kill(first, signal.SIGKILL)
        assert sample(engine) == WANT
        assert server_pid(engine.process) != first
        os.kill(server_pid(engine.process), signal.SIGKILL)
        engine.refresh(5)
        assert sample(engine) == WANT


def test_a_server_that_dies_again_and_again_is_given_up_with_its_log(tmp_path, monkeypatch):
    starts = []
    start = ServerProcess.start

    def counted(self, waiting):
        starts.append(1)
        start(self, waiting)

    monkeypatch.setattr(ServerProcess, "start", counted)
    with engine_on(tmp_path) as engine:
        engine.refresh(0)
        monkeypatch.setattr(engine, "_load", lambda server: dying(engine))
        os.kill(server_pid(engine.process), signal.SIGKILL)
        with pytest.raises(ServerDied, match=r"ended with status \d+; the end of .*server\.log"):
            sample(engine)
    assert len(starts) == 1 + RESTARTS


async def dying(engine):
    """Loading weights kills the server."""
    os.kill(server_pid(engine.process), signal.SIGKILL)
    await asyncio.sleep(SOON)


# -- starting --


def test_a_program_that_ends_is_said_with_the_end_of_its_log(tmp_path):
    failing = process(tmp_path, sys.executable, "-c", "print('no such model'); raise SystemExit(3)")
    with pytest.raises(ServerDied, match=r"ended with status 3; the end of .*server\.log:\n(.*\n)*no such model"):
        failing.start()


def test_a_server_that_is_not_ready_in_time_is_ended_and_said_so(tmp_path, started):
    idle = process(tmp_path, sys.executable, "-c", "import time; time.sleep(600)", deadline=0.5)
    with pytest.raises(ServerError, match=r"at http://127\.0\.0\.1:\d+ was not ready after 0\.5 s"):
        idle.start()
    assert started() == []


def test_a_port_that_is_taken_is_exchanged_for_another(tmp_path, monkeypatch):
    other = process(tmp_path / "other")
    other.start()
    taken = int(other.url.rpartition(":")[2])
    ports = iter([taken, taken, free_port()])
    monkeypatch.setattr(server_module, "free_port", lambda: next(ports))
    # Whatever holds the port is not waited for as if it were the server.
    mine = process(tmp_path)
    mine.start()
    assert mine.url != other.url
    mine.stop()
    other.stop()


def test_a_servers_command_ends_with_the_users_own_options(tmp_path):
    command = command_line("/env/bin/python --tensor-parallel-size 2", "MODEL", dtype="bfloat16", max_model_len=99)
    assert command[:3] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs"


# -- sharing a GPU --


def test_a_sleeping_server_is_woken_weights_first_and_refuses_to_sample_until_then(tmp_path, monkeypatch):
    asked = []
    attempt = Server.attempt

    async def recording(self, method, path, *body, **limit):
        asked.append(path)
        return await attempt(self, method, path, *body, **limit)

    monkeypatch.setattr(Server, "attempt", recording)
    with engine_on(tmp_path, sleeps=True) as engine:
        engine.refresh(0)
        engine.rest()
        assert asked[-1] == "/sleep?level=2"
        with pytest.raises(ServerError, match="must be refreshed"):
            sample(engine)
        asked.clear()
        engine.refresh(1)
        assert asked[:3] == ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]
        assert sample(engine) == WANT


# -- a whole run --


@pytest.mark.slow
def test_ctrl_c_in_a_run_ends_its_own_server_and_leaves_a_log_and_no_weights(tmp_path):
    # Takes vLLM's place: ignores what it is told to run, and keeps the options.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {FAKE[0]} {FAKE[1]} "$@"\n')
    python.chmod(0o755)
    path = config_file(
        tmp_path, saved_model(tmp_path / "model"), vllm={"servers": str(python)},
        eval={"every": 0, "prompts": 1},
    )  # fmt: skip
    command = [sys.executable, "-m", "prime_train", "run", path, "--rollout.engine", "vllm", "--run.steps", "100000"]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_records(tmp_path / "run" / "metrics.jsonl")) < 3:
        assert trainer.poll() is None, trainer.communicate()
        time.sleep(0.05)
    tree = descendants(trainer.pid)
    assert any(b"fake_vllm" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in tree)
    trainer.send_signal(signal.SIGINT)
    _, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 130, err
    assert gone_soon(tree)
    assert (tmp_path / "run" / "vllm" / "server.log").exists()
    assert not list(SHARED_MEMORY.glob(f"prime-weights-{trainer.pid}-*"))


def test_a_server_does_not_hear_what_torchrun_tells_the_trainer(tmp_path, monkeypatch):
    told = (
        "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE",
        "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID",
    )  # fmt: skip
    for name in told:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("FRANK", "1")
    environment = ServerProcess(["true"], log=tmp_path / "log", deadline=1.0).environment
    assert not environment.keys() & set(told)
    assert environment["FRANK"] == "1"
