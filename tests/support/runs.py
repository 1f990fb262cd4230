"""Small runs: their configuration, and what they leave to compare."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prime_train import cli
from prime_train.config.settings import load_config
from prime_train.data import arithmetic
from prime_train.plan import command as plan_command
from prime_train.run.checkpoints import Checkpoints
from prime_train.run.directory import read_records
from prime_train.run.setup import load_models
from prime_train.show import report
from tests.support.tiny import weights

MEASURED = ("time/", "throughput/", "memory/")

Sections = dict[str, dict[str, Any]]


def bare() -> None:
    """Has runs of this process, which is a test's own, train alone: nothing is planned before, no curves are drawn
    after."""
    planning: Any = plan_command
    planning.refuse_too_large = lambda config, force: None
    drawing: Any = report
    drawing.draw = lambda runs: "a picture"


def config_file(directory: Path, start: str, **changes: dict[str, Any]) -> str:
    """A run of a few small steps in directory/run that keeps every prompt."""
    sections: Sections = {
        "run": {"dir": str(directory / "run"), "steps": 3, "checkpoint_every": 1, "device": "cpu"},
        "model": {"policy": start, "dtype": "float32", "tokens_per_micro_batch": 256},
        "data": {"train": "arithmetic:2", "eval": "arithmetic:2", "system": "none"},
        "rollout": {"prompts": 2, "samples": 4, "max_tokens": 12, "cache_gib": 0.01},
        "filter": {"low": 0.0, "high": 1.0},
        "prm": {"lr": 1e-3, "mini_batch": 4},
        "policy": {"lr": 1e-3, "mini_batch": 4},
        "eval": {"every": 1, "prompts": 3, "samples": 1},
    }
    for section, keys in changes.items():
        sections[section] = sections.get(section, {}) | keys
    directory.mkdir(exist_ok=True)
    path = directory / "run.toml"
    path.write_text(
        "".join(
            f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            for section, keys in sections.items()
        )
    )
    return str(path)


def figures(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, without what no two runs have in common."""
    return [
        {name: value for name, value in record.items() if not name.startswith(MEASURED)}
        for record in read_records(directory / "run" / "metrics.jsonl")
    ]


def final_weights(config_path: str, *words: str) -> torch.Tensor:
    config = load_config(config_path, words)
    trained = load_models(config).trained
    checkpoints = Checkpoints(config.run.dir / "checkpoints", keep=9)
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.load(latest, trained)
    return torch.cat([weights(net) for net, _ in trained.values()])


def run(words: list[str]) -> int:
    """`prime-train` with an outcome that a random model gets right half the time."""
    bare()
    arithmetic.outcome = lambda reference, response: float(sum(map(ord, response)) % 2)
    return cli.main(words)


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]], rel: float) -> None:
    assert [record.keys() for record in found] == [record.keys() for record in wanted]
    for record, want in zip(found, wanted, strict=True):
        for name, value in want.items():
            assert record[name] == pytest.approx(value, rel=rel, abs=1e-6), (record["step"], name)
