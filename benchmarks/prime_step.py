"""One PRIME step by stage: `python -m benchmarks.prime_step --json FILE`.

The model has the shape of Qwen2.5-0.5B, vocabulary included, and random weights, so every response runs to its limit
and nothing needs to be downloaded; the filter lets every prompt pass. The second step is reported: the first one
compiles kernels and fills caches.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from prime_train import arithmetic, prime, setup
from prime_train.config import Config
from prime_train.rundir import read_records
from prime_train.view import View

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "dry": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip


def make_model(directory: Path, shape: str) -> None:
    """Random weights of the Qwen2 architecture, with the tokenizer of `arithmetic`."""
    tokenizer = arithmetic.tokenizer()
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def configured(work: Path, *, dry: bool) -> Config:
    responses = {"prompts": 2, "samples": 2} if dry else {"prompts": 32, "samples": 4}
    mini_batch = responses["prompts"] * responses["samples"] // 2
    return Config.model_validate(
        {
            "run": {"dir": work / "run", "steps": 2, "checkpoint_every": 0},
            "model": {"policy": str(work / "model"), "dtype": "float32" if dry else "bfloat16"},
            "data": {"train": "arithmetic", "eval": "arithmetic", "system": "none"},
            "rollout": {**responses, "max_tokens": 8 if dry else 256},
            "filter": {"low": 0, "high": 1},
            "prm": {"mini_batch": mini_batch},
            "policy": {"mini_batch": mini_batch},
            "eval": {"every": 0, "prompts": 1},
        }
    )


def measure(*, dry: bool) -> dict:
    """Seconds by stage, tokens a second, peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", "dry" if dry else "qwen2.5-0.5b")
        config = configured(work, dry=dry)
        setup.quiet_transformers()
        prime.train(config, View())
        last = read_records(config.run.dir / "metrics.jsonl")[-1]
    stages = {name.removeprefix("time/"): value for name, value in last.items() if name.startswith("time/")}
    return {
        "model": "dry" if dry else "qwen2.5-0.5b",
        "stages": {name: seconds for name, seconds in stages.items() if name != "eval"},
        "tokens_per_s": last["throughput/tokens_per_s"],
        "peak_bytes": int(last["memory/peak_gib"] * 2**30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file of the result")
    parser.add_argument("--dry", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args()
    options.json.write_text(json.dumps(measure(dry=options.dry)) + "\n")


if __name__ == "__main__":
    main()
