"""Runs a command and ends all that came of it: `python guard.py COMMAND …`, on Linux, with the standard library alone.

The command's process tree is ended when standard input closes, which happens however the process that holds its other
end goes, when the command itself ends, and on SIGTERM or SIGINT. Processes that left their parent or their session are
found too: as a subreaper the guard inherits every orphan below it. Exits with the command's status, 0 where it
was the guard that ended it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 8.0
"""From the request to end, SIGTERM, to SIGKILL."""
_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    wake_read, wake_write = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(wake_write, b"!"))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(child.pid)
    select.select([sys.stdin.fileno(), wake_read, ended], [], [])
    status = child.poll()
    end_descendants()
    return 0 if status is None else status if status >= 0 else 128 - status


def end_descendants() -> None:
    """SIGTERM to every process below this one, SIGKILL to those that are left after a while, until there are none."""
    signal_all(signal.SIGTERM)
    last = time.monotonic() + GRACE_S
    while descendants(os.getpid()):
        if time.monotonic() > last:
            signal_all(signal.SIGKILL)
        reap()
        time.sleep(0.02)


def signal_all(number: signal.Signals) -> None:
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap() -> None:
    """Has every child that has ended go."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(pid: int) -> list[int]:
    """Every process below pid."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
