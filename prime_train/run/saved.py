"""Checkpoint directories as files: complete where they exist, the newest few kept, damage found before it is read.

A checkpoint is written into `step-000010.partial`. When all of its files are on the disk, a manifest of their sizes is
added and the directory renamed; one that is given up is renamed back before it is removed. So whatever cuts a program
off, `step-000010` has all it should have, and a `.partial` is rubbish.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
"""Not in the manifest: of one step's checkpoint it may come again, with what has become known since."""
PARTIAL = ".partial"


class CheckpointError(Exception):
    """A checkpoint could not be written, in words for whoever started the run. Older ones are as they were."""


class CheckpointRefused(CheckpointError):
    """A checkpoint cannot be gone on with, in words for whoever started the run. No weight has been touched."""


def named(directory: Path, step: int) -> Path:
    """Where the step's checkpoint stands, or is to stand."""
    return directory / f"step-{step:06}"


def steps(directory: Path) -> dict[int, Path]:
    """Complete checkpoints by step, in order; none where there is no such directory."""
    found = {}
    for path in directory.glob("step-*"):
        if match := re.fullmatch(r"step-(\d{6,})", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(steps(directory).values()), None)


def begin(final: Path) -> Path:
    """A new directory to write into, after what others left behind is removed."""
    for leftover in final.parent.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover)
    partial = final.with_suffix(PARTIAL)
    partial.mkdir(parents=True)
    return partial


def complete(final: Path, progress: str, texts: Mapping[str, str]) -> None:
    """Adds progress, other files and the manifest to what `begin` gave, whose files are on the disk, and names it."""
    partial = final.with_suffix(PARTIAL)
    for name, text in texts.items():
        _write(partial / name, text)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    _write(partial / MANIFEST, json.dumps(sizes, indent=1))
    _write(partial / PROGRESS, progress)
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)


def noted(final: Path, progress: str) -> bool:
    """Whether this checkpoint exists, which then has this progress.

    Raises:
        CheckpointError: it exists and keeps the progress it had: the other cannot be written.
    """
    if not final.exists():
        return False
    if (final / PROGRESS).read_text() != progress:
        aside = final / f"{PROGRESS}.tmp"
        try:
            _write(aside, progress)
            aside.replace(final / PROGRESS)
        except OSError as error:
            raise CheckpointError(f"{final / PROGRESS} could not be written anew: {error}") from error
    return True


def retire(directory: Path, *, keep: int, keep_every: int) -> None:
    """Removes all but the newest `keep` and, unless that is 0, every multiple of `keep_every`."""
    found = steps(directory)
    for step in list(found)[:-keep]:
        if not (keep_every and step % keep_every == 0):
            aside = found[step].with_suffix(PARTIAL)
            found[step].rename(aside)
            shutil.rmtree(aside)


def damage(path: Path) -> str:
    """What of a checkpoint is not as it was written; nothing where all is."""
    sizes: dict[str, int] = {}
    for text in (PROGRESS, MANIFEST):
        try:
            sizes = json.loads((path / text).read_text())
        except (OSError, ValueError) as error:
            return f"{text} cannot be read: {error}"
    found = {name: (path / name).stat().st_size if (path / name).exists() else None for name in sizes}
    return ", ".join(
        f"{name} is missing" if found[name] is None else f"{name} has {found[name]} bytes, {size} were written"
        for name, size in sizes.items()
        if found[name] != size
    )


def refuse_damaged(path: Path) -> None:
    """Before anything of it is read.

    Raises:
        CheckpointRefused: files are missing or of another size; says how to go on without them.
    """
    if not (found := damage(path)):
        return
    others = [other for other in steps(path.parent).values() if other != path and not damage(other)]
    then = f"from {others[-1].name}" if others else "from the beginning: there is no other checkpoint"
    raise CheckpointRefused(
        f"the checkpoint {path} is damaged: {found}; remove or rename that directory, and the same command goes on "
        f"{then}"
    )


def unwritable(final: Path, why: str) -> str:
    """What to say when a checkpoint could not be written; what there is of it is removed."""
    shutil.rmtree(final.with_suffix(PARTIAL), ignore_errors=True)
    free = shutil.disk_usage(final.parent).free if final.parent.exists() else 0
    last = newest(final.parent)
    then = f"the last complete one is {last.name}, untouched" if last else "there is none before it"
    return (
        f"the checkpoint {final} could not be written: {why}; {free} bytes are free there; {then}; make room, and the "
        "same command goes on"
    )


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Has the names in it on the disk, where the system can do that."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
