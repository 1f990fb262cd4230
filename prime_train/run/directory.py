"""A run's directory: its configuration, metrics, samples, checkpoints and plots.

Of several processes the one that leads writes, and all read. Checkpoints alone are written by all.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ..config.keys import Config
from ..models.distributed import ALONE, World
from .checkpoints import CONFIG, Checkpoints, Progress, Trained, progress_at
from .saved import CheckpointError, newest, steps

CHECKPOINTS = "checkpoints"
"""Directory of a run's checkpoints."""


class RunDirectory:
    """What a run leaves on disk. The same command in the same directory goes on where the last one stopped.

    config.json  metrics.jsonl  samples.jsonl  tensorboard/  checkpoints/step-??????/  nonfinite/

    The SFT stage has such a directory of its own in `sft/`, and leaves its model in `sft/model/`.
    """

    def __init__(
        self, config: Config, path: Path, world: World = ALONE, warn: Callable[[str], None] = warnings.warn
    ) -> None:
        """Collective."""
        self.path, self._world, self._warn = path, world, warn
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        resolved = config.model_dump_json(indent=2)
        world.first(lambda: self._open(config, resolved))
        self.checkpoints = Checkpoints(
            path / CHECKPOINTS, keep=config.run.keep_checkpoints, keep_every=config.run.keep_every, config=resolved,
            world=world,
        )  # fmt: skip

    def _open(self, config: Config, resolved: str) -> None:
        directory = self.path / CHECKPOINTS
        directory.mkdir(parents=True, exist_ok=True)
        _replace(self.path / CONFIG, resolved)
        self._tensorboard = SummaryWriter(
            str(self.path / "tensorboard"), purge_step=max(steps(directory), default=-1) + 1
        )
        self._wandb = _start_wandb(config) if config.run.wandb else None

    def resume(self, trained: Trained) -> Progress:
        """Restores the newest checkpoint, if there is one, and forgets what was recorded after it. Collective.

        Raises:
            CheckpointRefused: it is damaged, or of other models; nothing was changed.
        """
        latest = self.checkpoints.latest()
        progress = self.checkpoints.load(latest, trained) if latest else Progress()
        self._world.first(lambda: self._forget_after(progress.step if latest else -1))
        return progress

    def save(self, progress: Progress, trained: Trained, *, due: bool) -> None:
        """Saves in the background if that is due. Collective.

        Where the save before it failed, this step is saved, due or not, before training goes on: otherwise all steps
        up to the next save could be lost with it.

        Raises:
            CheckpointError: that failed, too.
        """
        if not due and not self.checkpoints.failed():
            return
        failed = ""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            failed = str(error)
        if failed:
            self._warn(f"{failed}; step {progress.step} is saved at once instead")
        self.checkpoints.save(progress, trained)
        if failed:
            self.checkpoints.wait()

    def finish(self, progress: Progress, trained: Trained) -> None:
        """Saves what the last checkpoint has not got, waits until it is written, and closes the logs. Collective.

        Raises:
            CheckpointError: it could not be written.
        """
        self.save(progress, trained, due=True)
        self.checkpoints.wait()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def keep_nonfinite(self, step: int, **records: Any) -> str:
        """Saves what led to a skipped update, of the process that leads, and says where."""
        path = self.path / "nonfinite" / f"step-{step:06}.pt"
        if self._world.leads:
            path.parent.mkdir(exist_ok=True)
            torch.save({name: None if record is None else asdict(record) for name, record in records.items()}, path)
        return f"an update was skipped because its loss or gradient was not finite; the batch is in {path}"

    def _forget_after(self, step: int) -> None:
        """Drops records of later steps: they were not checkpointed and are about to be made again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            records = [record for record in read_records(self.path / name) if record["step"] <= step]
            self._put(name, records)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a step's figures to metrics.jsonl, TensorBoard and, if asked for, W&B."""
        if not self._world.leads:
            return
        self._append("metrics.jsonl", {"step": step, **_finite(figures)})
        self._draw(step, figures)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs figures of a step that may have been logged already: then they go into its record."""
        records = read_records(self.path / "metrics.jsonl") if self._world.leads else []
        if not records or records[-1]["step"] != step:
            self.log(step, figures)
            return
        records[-1] |= _finite(figures)
        self._put("metrics.jsonl", records)
        self._draw(step, figures)

    def _draw(self, step: int, figures: Mapping[str, float]) -> None:
        """In TensorBoard and W&B."""
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(figures), step=step)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Adds sample responses with their tokens' rewards to samples.jsonl."""
        for sample in samples if self._world.leads else ():
            self._append("samples.jsonl", {"step": step, **sample})

    def _put(self, name: str, records: list[dict[str, Any]]) -> None:
        """These records instead of those there are, or, where it is cut off, those there are."""
        _replace(self.path / name, "".join(json.dumps(record) + "\n" for record in records))

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def completed(config: Config) -> Progress | None:
    """Where a run stands that has nothing left to do; None for any other. No model is loaded to find out."""
    latest = newest(config.run.dir / CHECKPOINTS)
    progress = progress_at(latest) if latest else None
    return progress if progress and progress.evaluated and progress.step >= config.run.steps else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file, none if there is no file; a last line that was cut off is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: what is not finite is null."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _replace(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def _start_wandb(config: Config) -> Any:
    import wandb

    return wandb.init(
        project="prime", name=config.run.dir.name, dir=config.run.dir, config=config.model_dump(mode="json")
    )
