"""Processes for tests: ranks of a run that find each other as torchrun's do, and runs that can be killed.

They are forked off a server that has imported torch, transformers and the trainer, so that each is there within tenths
of a second. A function to be run in them is named by its module, so it stands at the top of a test's file.
"""

import atexit
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

PRELOADED = (
    "prime_train.cli", "prime_train.checks", "prime_train.prime", "prime_train.sft", "prime_train.show.report",
    "prime_train.models.distributed", "transformers.models.qwen2.modeling_qwen2", "peft", "tests.support.tiny",
)  # fmt: skip
GRACE = 2.0
"""Seconds that the other ranks have to end by themselves after one has failed."""
TICK = 0.01
LAST_WORDS = 4000
"""Characters of a process's output that an error shows."""


class ProcessFailed(Exception):
    """A process raised, was killed or did not end in time; tells for each what it raised and wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended."""

    code: int
    """0, 1 where the function raised, or −9 where signal 9 killed it."""
    output: str
    """What it wrote to stdout and stderr."""
    result: Any = None
    error: str = ""
    """The traceback of what it raised."""

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.error}\n{self.output[-LAST_WORDS:]}"


def run_ranks(n: int, function: Callable[..., Any], *args: Any, deadline: float = 60.0) -> list[Any]:
    """What `function(*args)` returns in each of n processes, by rank.

    Each has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them, and
    gloo's on the loopback.

    Raises:
        ProcessFailed: one raised, or they took longer than the deadline, seconds. Then none of them runs any more.
    """
    with started_ranks(n, function, *args) as ranks:
        until, failed = time.monotonic() + deadline, False
        while not all(rank.ended for rank in ranks) and time.monotonic() < until:
            if not failed and any(rank.ended and rank.ended.code for rank in ranks):
                failed, until = True, min(until, time.monotonic() + GRACE)
            _server().attend()
        ends = [rank.ended for rank in ranks]
    if all(end is not None and end.code == 0 for end in ends):
        return [end.result for end in ends if end is not None]
    raise ProcessFailed("\n".join(f"-- rank {i}: {end or 'still running'}" for i, end in enumerate(ends)))


@contextmanager
def started_ranks(n: int, function: Callable[..., Any], *args: Any) -> Iterator[list["Child"]]:
    """The same processes while they run; what is left of them at the end is killed."""
    port = free_port()
    shared = {
        "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    ranks: list[Child] = []
    try:
        for rank in range(n):
            ranks.append(_server().start({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, args))
        yield ranks
    finally:
        for child in ranks:
            child.end()


@contextmanager
def started(function: Callable[..., Any], *args: Any) -> Iterator["Child"]:
    """One process that is nobody's rank, while it runs `function(*args)`; killed at the end if it still does."""
    child = _server().start({}, function, args)
    try:
        yield child
    finally:
        child.end()


def run_alone(function: Callable[..., Any], *args: Any, deadline: float = 60.0) -> Ended:
    """How a process of its own ends that runs `function(*args)`, however it does.

    Raises:
        ProcessFailed: it took longer than the deadline, seconds.
    """
    with started(function, *args) as child:
        return child.wait(deadline)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(eq=False, slots=True)
class Child:
    """A process that runs a function."""

    pid: int
    directory: Path
    ended: Ended | None = field(default=None)

    def kill(self) -> None:
        """As the kernel does it when memory runs out: at once, and it alone, not the processes it started. One that has
        ended is left as it is."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, deadline: float = 60.0) -> Ended:
        """How it ended.

        Raises:
            ProcessFailed: not within the deadline, seconds.
        """
        until = time.monotonic() + deadline
        while self.ended is None and time.monotonic() < until:
            _server().attend()
        if self.ended is None:
            raise ProcessFailed(f"still running after {deadline} s\n{self.output()[-LAST_WORDS:]}")
        return self.ended

    def end(self) -> None:
        """Kills it and what it started, where that still runs."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self.wait()

    def output(self) -> str:
        return (self.directory / "output").read_text(errors="replace")

    def became(self, status: int) -> None:
        """Takes note of its end."""
        code, result, error = os.waitstatus_to_exitcode(status), None, ""
        if (left := self.directory / "result").exists():
            result, error = pickle.loads(left.read_bytes())
        self.ended = Ended(code=code, output=self.output(), result=result, error=error)


class Server:
    """The process that the others are forked off."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="processes-")
        self._children: dict[int, Child] = {}
        self._count = 0
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._socket = ours
        self._stream = ours.makefile("rwb")
        atexit.register(self.close)

    def start(self, environment: Mapping[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> Child:
        self._count += 1
        directory = Path(self._directory.name) / str(self._count)
        directory.mkdir()
        (directory / "output").touch()
        # Named in the child's own terms: what the parent has imported need not be imported by the server.
        named = (function.__module__, function.__qualname__)
        pickle.dump((directory, dict(environment), named, pickle.dumps(args)), self._stream)
        self._stream.flush()
        while (heard := self._hear())[0] != "began":
            self._note(heard)
        child = self._children[heard[1]] = Child(heard[1], directory)
        return child

    def attend(self) -> None:
        """Takes note of a process that has ended, if one does within a tick."""
        if select.select([self._socket], [], [], TICK)[0]:
            self._note(self._hear())

    def close(self) -> None:
        """Ends the server, and with it all that it started."""
        self._stream.close()
        self._socket.close()
        self._process.wait()
        self._directory.cleanup()

    def _hear(self) -> tuple[str, int, int]:
        return pickle.loads(_received(self._socket))

    def _note(self, heard: tuple[str, int, int]) -> None:
        _, pid, status = heard
        self._children.pop(pid).became(status)


_running: list[Server] = []


def _server() -> Server:
    if not _running:
        _running.append(Server())
    return _running[0]


# -- in the server --


def _serve(connection: socket.socket) -> None:
    """Forks a process for each request, tells of their ends, and ends all when nobody asks any more."""
    children: set[int] = set()
    with connection.makefile("rb") as requests:
        while True:
            if select.select([connection], [], [], TICK)[0]:
                try:
                    directory, environment, named, args = pickle.load(requests)
                except EOFError:
                    break
                pid = os.fork()
                if pid == 0:
                    os.setpgid(0, 0)
                    connection.close()
                    _work(directory, environment, named, args)
                os.setpgid(pid, pid)
                children.add(pid)
                _send(connection, ("began", pid, 0))
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                children.discard(ended[0])
                _send(connection, ("ended", *ended))
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def _work(directory: Path, environment: dict[str, str], named: tuple[str, str], args: bytes) -> None:
    """Runs the function and leaves what it returned or raised in a file.

    Then it exits as any program does, but for the seconds that Python takes to clear away modules shared with others.
    """
    os.environ.update(environment)
    with (directory / "output").open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    result, error = None, ""
    try:
        function = importlib.import_module(named[0])
        for name in named[1].split("."):
            function = getattr(function, name)
        result = function(*pickle.loads(args))  # type: ignore[operator]
    except BaseException:
        error = traceback.format_exc()
    aside = directory / "result.tmp"
    # Not by multiprocessing's pickler, whose tensors live as long as their sender.
    aside.write_bytes(pickle.dumps((result, error)))
    aside.rename(directory / "result")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if error else 0)


def _send(connection: socket.socket, message: tuple[str, int, int]) -> None:
    data = pickle.dumps(message)
    connection.sendall(len(data).to_bytes(4, "big") + data)


def _received(connection: socket.socket) -> bytes:
    def exactly(n: int) -> bytes:
        data = b""
        while len(data) < n:
            if not (more := connection.recv(n - len(data))):
                raise ProcessFailed("the processes' server is gone")
            data += more
        return data

    return exactly(int.from_bytes(exactly(4), "big"))


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    _serve(socket.socket(fileno=int(sys.argv[1])))
