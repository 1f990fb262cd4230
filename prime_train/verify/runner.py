"""Runs one answer's tests. Executed inside the sandbox by path, never imported by the trainer; standard library only.

stdin   the request, one JSON object: code, tests, limits, uid, judge_uid, isolated, directory, deadline
stdout  the line "ready"; for each test a line of JSON {outcome, seconds, size}, then `size` bytes, what was printed or
        returned

Expected outputs of stdin and call tests are not in the request: they are compared outside, so whatever a candidate
writes here is only its own output. A test given as assertions is run by a judge, a second process that has the
assertions; the functions they call are proxies, whose calls go to the candidate's process and whose results come back
as plain data. Each test is a fresh fork of this process, which holds no other descriptor when the candidate's code
starts; when it ends, every process of the sandbox but this one is killed and the scratch directory is emptied.
"""

from __future__ import annotations

import bisect  # noqa: F401  imported here, once, so that the forks of every test find them ready
import builtins
import collections  # noqa: F401
import contextlib
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import resource
import select
import signal
import sys
import time
import types

TYPE_CHECKING = False  # without importing typing, which takes longer than a test
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

    Json = dict[str, Any]

MIB = 1 << 20


# -- plain data between the judge and the candidate -----------------------------------------------------------------


class Handle:
    """The judge's stand-in for a value that is no plain data: it can be passed back, and equals nothing."""

    def __init__(self, key: int) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def pack(value: Any, keep: Callable[[Any], Any]) -> Any:
    """Plain data as JSON with tagged containers; `keep(value)` is the tag and key of what is not plain."""
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    if isinstance(value, complex):
        return ["complex", repr(value.real), repr(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    for tag, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return [tag, *(pack(v, keep) for v in value)]
    if isinstance(value, dict):
        return ["dict", *([pack(k, keep), pack(v, keep)] for k, v in value.items())]
    return keep(value)


def unpack(data: Any, find: Callable[[str, Any], Any]) -> Any:
    """The inverse of pack; `find(tag, key)` gives what was kept."""
    if not isinstance(data, list):
        return data
    tag, rest = data[0], data[1:]
    if tag == "float":
        return float(rest[0])
    if tag == "complex":
        return complex(float(rest[0]), float(rest[1]))
    if tag == "bytes":
        return bytes.fromhex(rest[0])
    if tag in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, tag)(unpack(v, find) for v in rest)
    if tag == "dict":
        return {unpack(k, find): unpack(v, find) for k, v in rest}
    return find(tag, rest[0])


def send(stream: TextIO, message: Any) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


# -- what runs in a test's own process ------------------------------------------------------------------------------


def load(code: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, "answer.py", "exec"), module.__dict__)
    return module


def run_program(code: str, test: Json) -> None:
    load(code, "__main__")


def plain(value: Any) -> Any:
    """For json.dumps: arrays and sets as lists, anything else is not comparable."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset, range)):
        return list(value)
    raise TypeError(type(value).__name__)


def run_call(code: str, test: Json) -> None:
    """Writes the returned value as JSON to descriptor 3."""
    module = load(code, "answer")
    owner = module.Solution() if hasattr(module, "Solution") else module
    value = getattr(owner, test["call"])(*test["args"])
    # Written by os.write: it needs nothing of the modules that the candidate may have changed.
    data = json.dumps(value, default=plain).encode()
    while data:
        data = data[os.write(3, data) :]


def restart(code: str, test: Json) -> None:
    """Becomes `serve` in a new interpreter: the memory of this one, a fork of the runner's, has the assertions."""
    os.execv(sys.executable, [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", __file__, "serve"])


def serve(code: str) -> None:
    """The candidate's side of an asserted test: calls come in on descriptor 3, results go out."""
    import socket

    stream = socket.socket(fileno=3)
    lines, out = stream.makefile("r"), stream.makefile("w")
    module = load(code, "answer")
    kept: list[Any] = []

    def keep(value: Any) -> Any:
        kept.append(value)
        return ["handle", len(kept) - 1]

    def find(tag: str, key: Any) -> Any:
        return kept[key] if tag == "handle" else getattr(module, key)

    for line in lines:
        name, args, kwargs = unpack(json.loads(line), find)
        try:
            reply = ["value", pack(getattr(module, name)(*args, **kwargs), keep)]
        except Exception as error:
            reply = ["raised", type(error).__name__]
        send(out, reply)


def judge(code: str, test: Json) -> None:
    """Runs the assertions, which the candidate never sees, on proxies; exits 0 where all of them hold."""
    import socket

    stream = socket.socket(fileno=3)
    lines, out = stream.makefile("r"), stream.makefile("w")

    class Proxy:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            send(out, pack([self.name, args, kwargs], keep))
            reply = json.loads(lines.readline())
            if reply[0] == "value":
                return unpack(reply[1], lambda tag, key: Handle(key))
            raised = getattr(builtins, str(reply[1]), Exception)
            raise raised if isinstance(raised, type) and issubclass(raised, Exception) else Exception

    def keep(value: Any) -> Any:
        if isinstance(value, Handle):
            return ["handle", value.key]
        if isinstance(value, Proxy):
            return ["name", value.name]
        raise TypeError(type(value).__name__)

    space = {"__name__": "judge"}
    exec(compile(test.get("preamble", ""), "preamble.py", "exec"), space)
    space.update({name: Proxy(name) for name in test["names"]})
    exec(compile(test["asserts"], "tests.py", "exec"), space)


def become(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def confine(limits: Json, uid: int | None) -> None:
    """Limits that a process cannot raise again, then a user that owns nothing."""
    memory, seconds = limits["memory_mb"] * MIB, int(limits["seconds"]) + 1
    for name, value in (
        ("AS", memory), ("CPU", seconds), ("FSIZE", limits["output_mb"] * MIB), ("NPROC", limits["processes"]),
        ("NOFILE", 64), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0),
    ):  # fmt: skip
        limit, hard = getattr(resource, f"RLIMIT_{name}"), resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    become(uid)


def fork(
    body: Callable[[str, Json], None], test: Json, request: Json, uid: int | None, stdin: int, stdout: int,
    channel: int | None = None,
) -> int:  # fmt: skip
    """A process with stdin, stdout and the channel as its descriptors 0, 1 and 3, which runs body and exits."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        # First out of the way of the numbers that are about to be taken.
        moved = [
            os.dup2(fd, 100 + i) for i, fd in enumerate((stdin, stdout, null, null if channel is None else channel))
        ]
        for number, fd in enumerate(moved):
            os.dup2(fd, number)
        os.closerange(4 if channel is not None else 3, 4096)
        confine(request["limits"], uid)
        os.chdir(request["directory"])
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
        sys.argv = ["answer.py"]
        vars(builtins).update(exit=sys.exit, quit=sys.exit)
        body(request["code"], test)
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None or stop.code == 0 else 1
    except BaseException:
        status = 1
    finally:
        try:
            sys.stdout.flush()
        except BaseException:
            status = 1
        os._exit(status)


# -- the runner -----------------------------------------------------------------------------------------------------


def wait(pid: int, until: float) -> int | None:
    """The exit status of pid, or None where it still runs at `until` (time.monotonic)."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return None
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_all(pids: list[int], isolated: bool) -> None:
    """Every other process of the sandbox; without one, the process groups of the test."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    # kill(-1) spares only the namespace's init and this process, its second one. Nowhere else may it ever run.
    while isolated and os.getpid() == 2 and os.getppid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.001)


def empty(directory: str, uid: int | None) -> None:
    """Leaves nothing of one test to the next; done as the user who owns what is there."""
    if not os.listdir(directory):
        return
    pid = os.fork()
    if not pid:
        try:
            become(uid)
            remove(directory)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def remove(directory: str) -> None:
    """What is in the directory, closed folders too."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            remove(entry.path)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


def scratch(directory: str, data: bytes = b"") -> int:
    """A file without a name: nothing that could be found, replaced or linked to."""
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def run_test(request: Json, test: Json, until: float) -> tuple[str, bytes]:
    directory, uid = request["directory"], request["uid"]
    stdin, stdout, fds = scratch(directory, test.get("stdin", "").encode()), scratch(directory), []
    try:
        if "asserts" in test:
            import socket

            ours, theirs = socket.socketpair()
            source = scratch(directory, request["code"].encode())
            fds.append(source)
            served = fork(restart, test, request, uid, source, stdout, theirs.fileno())
            theirs.close()
            decided = fork(judge, test, request, request["judge_uid"], stdin, stdout, ours.fileno())
            ours.close()
            pids, result = [decided, served], None
        elif "call" in test:
            result = scratch(directory)
            fds.append(result)
            pids = [fork(run_call, test, request, uid, stdin, stdout, result)]
        else:
            pids, result = [fork(run_program, test, request, uid, stdin, stdout)], stdout
        status = wait(pids[0], until)
        kill_all(pids, request["isolated"])
        outcome = "timeout" if status is None else "ended" if status == 0 else "failed"
        data = b""
        if outcome == "ended" and result is not None:
            size = os.fstat(result).st_size
            os.lseek(result, 0, os.SEEK_SET)
            while len(data) < size and (part := os.read(result, size - len(data))):
                data += part
        return outcome, data
    finally:
        for fd in (stdin, stdout, *fds):
            os.close(fd)
        empty(directory, uid)


def main() -> None:
    if __file__ == "/runner.py" and os.path.isdir("/site"):
        sys.path.append("/site")
    if sys.argv[1:] == ["serve"]:
        serve(sys.stdin.read())
        return
    with open(0, "rb", closefd=False) as stream:
        request = json.load(stream)
    out, end = os.dup(1), time.monotonic() + request["deadline"]
    os.write(out, b"ready\n")
    for test in request["tests"]:
        start = time.monotonic()
        outcome, data = "timeout", b""
        if start < end:
            outcome, data = run_test(request, test, min(end, start + request["limits"]["seconds"]))
        head = {"outcome": outcome, "seconds": round(time.monotonic() - start, 4), "size": len(data)}
        data = json.dumps(head).encode() + b"\n" + data
        while data:
            data = data[os.write(out, data) :]


main()
