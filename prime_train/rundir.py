"""A run's directory: its configuration, metrics, samples, checkpoints and plots."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from .checkpoints import Checkpoints, Progress, Trained, progress_at
from .config import Config

CHECKPOINTS = "checkpoints"
"""Directory of a run's checkpoints."""
CONFIG = "config.json"
"""The configuration that a run was started with."""


class RunDirectory:
    """What a run leaves on disk. The same command in the same directory goes on where the last one stopped.

    config.json  metrics.jsonl  samples.jsonl  tensorboard/  checkpoints/step-??????/  nonfinite/

    The SFT stage has such a directory of its own in `sft/`, and leaves its model in `sft/model/`.
    """

    def __init__(self, config: Config, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep=config.run.keep_checkpoints)
        self.checkpoints.directory.mkdir(exist_ok=True)
        (self.path / CONFIG).write_text(config.model_dump_json(indent=2))
        next_step = self.checkpoints.latest_step() + 1
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=next_step)
        self._wandb = _start_wandb(config) if config.run.wandb else None

    def resume(self, trained: Trained) -> Progress:
        """Restores the newest checkpoint, if there is one, and forgets what was recorded after it."""
        latest = self.checkpoints.latest()
        progress = self.checkpoints.load(latest, trained) if latest else Progress()
        # What comes before the first step is recorded again too, by a run that starts there.
        self._forget_after(progress.step or -1)
        return progress

    def finish(self, progress: Progress, trained: Trained) -> None:
        """Saves what the last checkpoint has not got, and closes the logs."""
        if progress.step > self.checkpoints.latest_step():
            self.checkpoints.save(progress, trained)
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def keep_nonfinite(self, step: int, **records: Any) -> str:
        """Saves what led to a skipped update, and says where."""
        path = self.path / "nonfinite" / f"step-{step:06}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save({name: None if record is None else asdict(record) for name, record in records.items()}, path)
        return f"an update was skipped because its loss or gradient was not finite; the batch is in {path}"

    def _forget_after(self, step: int) -> None:
        """Drops records of later steps: they were not checkpointed and are about to be made again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            records = [record for record in read_records(self.path / name) if record["step"] <= step]
            _replace(self.path / name, "".join(json.dumps(record) + "\n" for record in records))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a step's figures to metrics.jsonl, TensorBoard and, if asked for, W&B."""
        # JSON has no NaN: what is not finite is null.
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._append("metrics.jsonl", {"step": step, **finite})
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(figures), step=step)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Adds sample responses with their tokens' rewards to samples.jsonl."""
        for sample in samples:
            self._append("samples.jsonl", {"step": step, **sample})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def completed(config: Config) -> Progress | None:
    """Where a run stands that has nothing left to do; None for any other. No model is loaded to find out."""
    latest = Checkpoints(config.run.dir / CHECKPOINTS, keep=config.run.keep_checkpoints).latest()
    progress = progress_at(latest) if latest else None
    return progress if progress and progress.step >= config.run.steps else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file, none if there is no file; a last line that was cut off is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _replace(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def _start_wandb(config: Config) -> Any:
    import wandb

    return wandb.init(
        project="prime", name=config.run.dir.name, dir=config.run.dir, config=config.model_dump(mode="json")
    )
