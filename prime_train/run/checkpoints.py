"""Checkpoints of a run: models, optimizers, progress and configuration, written while training goes on.

They hold whole tensors in pieces (torch.distributed.checkpoint), so any number of processes can go on with what any
other number saved, sharded or not. Of a model there is what is trained, and of tied weights one. The state of random
generators is not in them: everything random is drawn from the seed and the step.
"""

import gc
import json
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from ..models.distributed import ALONE, World
from ..models.language_model import LanguageModel
from . import saved
from .saved import CheckpointError, CheckpointRefused

Trained = Mapping[str, tuple[LanguageModel, torch.optim.Optimizer]]
"""Models that are trained, by name, with their optimizers."""
# What a checkpoint has is compared with the model before it is read, and frozen weights it has not: not strict.
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
CONFIG = "config.json"
"""The configuration of a run, and of the run that a checkpoint is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands between two steps. Everything random is drawn from the seed and the step."""

    step: int = 0
    position: int = 0
    """Prompts taken from the stream."""
    too_long: int = 0
    """Prompts left out for their length."""
    evaluated: bool = False
    """Whether all evaluations that are due have been made."""
    seconds: float = 0.0
    """Of training, over all sittings."""


class Checkpoints:
    """Directory of `step-000010`, …, which all processes of the run see. Making one is collective.

    A save copies everything to host memory, where it stays until the files are written in the background.
    """

    def __init__(
        self, directory: Path, *, keep: int, keep_every: int = 0, config: str = "{}", world: World = ALONE
    ) -> None:
        """
        Args:
            keep: how many of the newest ones stay.
            keep_every: multiples of this step stay too, for good; 0 for none.
            config: JSON of the run's configuration, for each to have.
        """
        self.directory, self._keep, self._keep_every, self._config = directory, keep, keep_every, config
        self._world, self._writers = world, world.apart()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[str] | None = None

    def latest(self) -> Path | None:
        """The newest complete one, the same on all processes. Collective."""
        return self._world.first(lambda: saved.newest(self.directory))

    def save(self, progress: Progress, trained: Trained) -> Path:
        """Takes everything as it is now, and returns where it will be, complete, once it is written. Collective.

        Waits for the save before it, if that is still being written. Of a step that has a checkpoint the progress alone
        is written again: the rest is the same.

        Raises:
            CheckpointError: the save before it failed.
        """
        self.wait()
        final, text = saved.named(self.directory, progress.step), json.dumps(asdict(progress))
        if not self._world.first(lambda: saved.noted(final, text)):
            _expect_one_process()
            staged = dcp.FileSystemWriter(final).stage(
                {name: _state(model, optimizer) for name, (model, optimizer) in trained.items()}
            )
            self._saving = self._thread.submit(self._write, final, staged, text)
        return final

    def wait(self) -> None:
        """Until what is being saved is complete. Collective.

        Raises:
            CheckpointError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            self._world.each(lambda: _raise(saving.result()))

    def failed(self) -> bool:
        """Whether what is being saved has failed by now, which `wait` then tells. Collective."""
        saving = self._saving
        return self._world.any(saving is not None and saving.done() and bool(saving.exception() or saving.result()))

    def load(self, path: Path, trained: Trained) -> Progress:
        """Restores models and optimizers in place. Collective.

        Raises:
            CheckpointRefused: it is damaged, or of other models; nothing was changed.
        """
        self._world.first(lambda: saved.refuse_damaged(path))
        self._world.each(lambda: _refuse_other_models(path, {name: model for name, (model, _) in trained.items()}))
        state = {name: _state(model, optimizer) for name, (model, optimizer) in trained.items()}
        _read(path, state, self._world)
        for name, (model, optimizer) in trained.items():
            set_state_dict(
                model, optimizer, model_state_dict=state[name]["model"], optim_state_dict=state[name]["optimizer"],
                options=OPTIONS,
            )  # fmt: skip
        return self._world.first(lambda: progress_at(path))

    def _write(self, final: Path, staged: dict[str, Any], progress: str) -> str:
        """Runs beside the training, with a process group of its own.

        Gives what went wrong, if anything did, in words: an exception would keep all that was staged.
        """
        world = self._writers
        try:
            partial = world.first(lambda: saved.begin(final))
            # What is staged is on the host. To copy ahead from a GPU torch would ask for a stream in this thread, whose
            # GPU is the first one on every process.
            writer = _Writer(partial, per_thread_copy_ahead=0)
            dcp.save(staged, storage_writer=writer, process_group=world.group, no_dist=world.group is None)
            world.first(lambda: saved.complete(final, progress, {CONFIG: self._config}))
        except (Exception, CheckpointException) as error:
            # Each process says it of itself, and the one that leads removes what there is: none writes any more.
            return saved.unwritable(final, _why(error)) if world.leads else _why(error)
        try:
            world.first(lambda: saved.retire(self.directory, keep=self._keep, keep_every=self._keep_every))
        except OSError as error:
            return f"older checkpoints than {final} could not be removed: {error}"
        return ""


def progress_at(path: Path) -> Progress:
    """Where the run stood that left this checkpoint."""
    return Progress(**json.loads((path / saved.PROGRESS).read_text()))


def load_weights(path: Path, name: str, model: LanguageModel, world: World = ALONE) -> None:
    """Gives a model its weights in a checkpoint of any number of processes; optimizers are not read. Collective.

    Raises:
        CheckpointRefused: it is damaged, or of another model; nothing was changed.
    """
    world.first(lambda: saved.refuse_damaged(path))
    world.each(lambda: _refuse_other_models(path, {name: model}))
    state: dict[str, Any] = {name: {"model": _weights(model)}}
    _read(path, state, world)
    set_model_state_dict(model, state[name]["model"], options=OPTIONS)


class _Writer(dcp.FileSystemWriter):
    """Says what the system said: torch.save hides a full disk behind an assertion of its own."""

    def write_data(self, *args: Any, **options: Any) -> Any:
        try:
            return super().write_data(*args, **options)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from error


def _read(path: Path, state: dict[str, Any], world: World) -> None:
    _expect_one_process()
    try:
        dcp.load(state, checkpoint_id=path, process_group=world.group, no_dist=world.group is None)
    except CheckpointException as error:
        raise CheckpointRefused(f"the checkpoint {path} cannot be read: {_why(error)}") from error


def _raise(failed: str) -> None:
    if failed:
        gc.collect()  # the tracebacks of what failed have all that was staged
        raise CheckpointError(failed)


def _why(error: BaseException) -> str:
    """What went wrong, in the words of the first process where it did."""
    if not isinstance(error, CheckpointException):
        return str(error)
    rank, (cause, _) = min(error.failures.items())
    return f"{cause} (process {rank})"


def _expect_one_process() -> None:
    """torch warns that it is not running distributed, which is what no_dist says."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _refuse_other_models(path: Path, models: Mapping[str, nn.Module]) -> None:
    stored: dict[str, Any] = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, model in models.items():
        prefix = f"{name}.model."
        there = {key.removeprefix(prefix): list(stored[key].size) for key in stored if key.startswith(prefix)}
        here = {key: list(tensor.shape) for key, tensor in _weights(model).items()}
        if other := next((key for key in here | there if there.get(key) != here.get(key)), None):
            raise CheckpointRefused(
                f"the checkpoint {path} is of another model: {other} of the {name} {_shape(there.get(other))} there "
                f"and {_shape(here.get(other))} here"
            )


def _shape(shape: list[int] | None) -> str:
    return "does not exist" if shape is None else f"has shape {shape}"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of a model, by name, one of tied weights."""
    return _once(model, get_model_state_dict(model, options=OPTIONS))


def _state(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    fresh = not optimizer.state
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    if fresh:
        # torch has made its state by a step on zeros, which leaves nothing behind but that it was counted.
        for moment in optimizer.state.values():
            moment["step"].zero_()
    return {"model": _once(model, weights), "optimizer": moments}


def _once(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Without the other names of tied weights."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = names - {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in weights.items() if name not in others}
