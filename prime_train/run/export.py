"""The policy or the PRM of a checkpoint in the format of `transformers`, on one process without a GPU."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from ..config.keys import Config
from ..config.settings import ConfigError, load_config
from ..models.language_model import LanguageModel, load_model
from ..models.snapshot import save_model
from .checkpoints import CONFIG, load_weights
from .directory import CHECKPOINTS
from .saved import CheckpointError, newest, steps
from .setup import model_path, quiet_transformers

MODELS = ("policy", "prm")
DTYPES = ("float32", "bfloat16", "float16")


def export(config: Config, out: Path, *, name: str = "policy", checkpoint: str | None = None, dtype: str = "") -> Path:
    """Writes the model to `out`, tokenizer included, and returns the checkpoint it is from.

    The weights alone are read, whatever number of processes saved them; needs host memory for them in fp32. What is
    cut off in the middle leaves no `out`.

    Args:
        checkpoint: such as step-000010; the newest where left out.
        dtype: of the weights written; that of the run's computation where left out.

    Raises:
        ConfigError: no such checkpoint or model, or `out` exists.
        CheckpointRefused: the checkpoint is damaged, or of another model.
        CheckpointError: `out` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists; give a directory that does not")
    if name == "prm" and (config.advantage.process_coef == 0 or config.prm.update == "none"):
        raise ConfigError("--model: this run trains no PRM")
    path = _chosen(config.run.dir / CHECKPOINTS, checkpoint)
    start = str(model_path(config, name))
    model = _starting_point(config, start)
    load_weights(path, name, model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, AutoTokenizer.from_pretrained(start), out, dtype=getattr(torch, dtype or config.model.dtype))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
        raise CheckpointError(f"{out} could not be written: {error}") from error
    return path


def main(words: Sequence[str]) -> int:
    """`prime-train export CONFIG|RUN_DIR [--checkpoint step-000010] [--model policy|prm] --out DIR [--dtype …]`."""
    parser = argparse.ArgumentParser(prog="prime-train export", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="CONFIG|RUN_DIR", help="a configuration, as for `run`, or the run's directory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument("--model", choices=MODELS, default="policy", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="step-000010", help="the newest by default")
    parser.add_argument("--dtype", choices=DTYPES, default="", help="that of the run's computation by default")
    options, others = parser.parse_known_args(words)
    config = _config(options.run, others)
    quiet_transformers()
    path = export(config, options.out, name=options.model, checkpoint=options.checkpoint, dtype=options.dtype)
    print(f"{options.model} of {path} in {options.out}")
    return 0


def _starting_point(config: Config, start: str) -> LanguageModel:
    """The model as its training began, on the host."""
    dtype = getattr(torch, config.model.dtype)
    try:
        return load_model(start, dtype=dtype, attention="sdpa", trained=True, lora=config.model.lora)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.policy: {start} cannot be read: {error}") from error


def _config(run: str, overrides: Sequence[str]) -> Config:
    """Of a run in a directory, which may have been moved since, or as any command takes it."""
    directory = Path(run)
    if not directory.is_dir():
        return load_config(run, overrides)
    if overrides:
        raise ConfigError(f"a run's directory has its own configuration; nothing can be given with it: {overrides[0]}")
    try:
        config = Config.model_validate_json((directory / CONFIG).read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{directory} is no run's directory of this version: {error}") from None
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": directory})})


def _chosen(directory: Path, checkpoint: str | None) -> Path:
    found = newest(directory) if checkpoint is None else directory / checkpoint
    known = list(steps(directory).values())
    if found not in known:
        there = f"there are {', '.join(path.name for path in known)}" if known else "there is none yet"
        raise ConfigError(f"--checkpoint: no {checkpoint or 'checkpoint'} in {directory}; {there}")
    assert found is not None
    return found
