"""Where snapshots lie: a directory that lasts as long as its maker, and the room there is for one.

    made      under a hidden name, and locked (flock on a file in it) before it gets its own
    held      while its maker lives; however that ends, the kernel gives the lock up
    removed   by its maker, or by whoever makes the next one, or asks for room, and can have its lock

What the trainer starts are other programs, which inherit no lock. On a network file system one machine's locks may mean
nothing to another, so directories have their machine's boot in their names, and those of other boots are left alone.
"""

import contextlib
import fcntl
import math
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Of the machine since it was started: the same in all of its containers, and on no other machine."""
PREFIX, LOCK = "prime-weights-", "lock"
GIB = 2**30


class Claim:
    """A new directory, `path`, below `directory`, for this process until it ends or releases it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory)
        self.directory = directory
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{os.getpid()}-{_boot()}-", dir=directory))
        self._lock = (made / LOCK).open("w")
        with contextlib.suppress(OSError):  # without locks on this file system nobody can have this one either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Servers may run as another user.
        made.chmod(0o755)
        # Nobody sweeps here under the hidden name, and under this one it was never without its lock.
        self.path = made.rename(made.with_name(made.name.removeprefix(".")))

    def release(self) -> None:
        self._lock.close()
        _remove(self.path)


def sweep(directory: Path) -> None:
    """Removes what processes of this user and machine left there that are gone."""
    for path in directory.glob(f"{PREFIX}*-{_boot()}-*"):
        with contextlib.suppress(OSError):  # its maker lives, or somebody else removes it at this moment
            if path.lstat().st_uid == os.geteuid() and not path.is_symlink():
                with (path / LOCK).open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)


def _remove(path: Path) -> None:
    """The lock last: what is cut off in the middle can still be swept."""
    with contextlib.suppress(OSError):
        for inside in path.iterdir():
            if inside.name != LOCK:
                shutil.rmtree(inside, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def _boot() -> str:
    try:
        return BOOT_ID.read_text().replace("-", "")[:12]
    except OSError:
        return platform.node()


@dataclass(frozen=True, slots=True)
class Room:
    """For one copy of the policy, in bytes."""

    directory: Path
    free: float
    needed: int

    @classmethod
    def now(cls, directory: Path, needed: int) -> "Room":
        """In a directory that need not be there yet."""
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        usage = shutil.disk_usage(there)
        # A file system without a limit, such as tmpfs with size=0, says that it has no bytes at all.
        return cls(directory, usage.free if usage.total else math.inf, needed)

    @property
    def suffices(self) -> bool:
        return self.free >= self.needed

    def __str__(self) -> str:
        more = " (in a container: --shm-size)" if self.directory == SHARED_MEMORY and not self.suffices else ""
        return (
            f"{self.directory} has {_gib(self.free)} free, and one copy of the policy takes {_gib(self.needed)}{more}"
        )


def _gib(nbytes: float) -> str:
    value = nbytes / GIB
    return f"{value:.1f} GiB" if value >= 0.1 or not value else f"{value:.2g} GiB"
