"""Checkpoints of a run: complete where their directory exists, the newest few kept."""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .models import LanguageModel

Trained = Mapping[str, tuple[LanguageModel, torch.optim.Optimizer]]
"""Models that are trained, by name, with their optimizers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands between two steps. Everything random is drawn from the seed and the step."""

    step: int = 0
    position: int = 0
    """Prompts taken from the stream."""
    too_long: int = 0
    """Prompts left out for their length."""
    seconds: float = 0.0
    """Of training, over all sittings."""


class Checkpoints:
    """Directory of `step-000010`, …, each with models, optimizers and progress."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def latest(self) -> Path | None:
        """The newest complete one."""
        return max(self.directory.glob("step-??????"), default=None)

    def latest_step(self) -> int:
        """The step of the newest complete one, −1 without any."""
        latest = self.latest()
        return -1 if latest is None else int(latest.name.removeprefix("step-"))

    def save(self, progress: Progress, trained: Trained) -> Path:
        """Writes aside, then renames: what is cut off in the middle leaves no checkpoint, only a `.partial`."""
        final = self.directory / f"step-{progress.step:06}"
        partial = final.with_suffix(".partial")
        for leftover in self.directory.glob("*.partial"):
            shutil.rmtree(leftover)
        with _one_process():
            dcp.save(_state(trained), checkpoint_id=partial, no_dist=True)
        (partial / "progress.json").write_text(json.dumps(asdict(progress)))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in sorted(self.directory.glob("step-??????"))[: -self.keep]:
            shutil.rmtree(old)
        return final

    def load(self, path: Path, trained: Trained) -> Progress:
        """Restores models and optimizers in place."""
        state = _state(trained)
        with _one_process():
            dcp.load(state, checkpoint_id=path, no_dist=True)
        for name, (model, optimizer) in trained.items():
            set_state_dict(
                model, optimizer, model_state_dict=state[name]["model"], optim_state_dict=state[name]["optimizer"]
            )
        return progress_at(path)


def progress_at(path: Path) -> Progress:
    """Where the run stood that left this checkpoint."""
    return Progress(**json.loads((path / "progress.json").read_text()))


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns that it is not running distributed, which is what no_dist says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(trained: Trained) -> dict[str, Any]:
    state = {}
    for name, (model, optimizer) in trained.items():
        fresh = not optimizer.state
        weights, moments = get_state_dict(model, optimizer)
        if fresh:
            # torch has made its state by a step on zeros, which leaves nothing behind but that it was counted.
            for moment in optimizer.state.values():
                moment["step"].zero_()
        state[name] = {"model": weights, "optimizer": moments}
    return state
