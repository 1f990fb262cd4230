"""PRIME from Python: the quickstart, made smaller, through the functions that `prime-train run` calls.

    python examples/4_prime_from_python.py

A tiny model learns worked arithmetic in which most steps are careless (SFT), then finds out from outcomes alone that
careful steps pay (PRIME). Everything that a run leaves lies in a temporary directory; the figures of each step are read
back from its metrics.jsonl.
"""

import tempfile
from pathlib import Path

import torch

from prime_train import checks, prime, sft
from prime_train.config.settings import load_config
from prime_train.run import setup
from prime_train.run.directory import read_records
from prime_train.run.interrupt import Interrupts
from prime_train.show.view import View

torch.set_num_threads(1)  # a model this small gains nothing from a second one
setup.quiet_transformers()

with tempfile.TemporaryDirectory() as directory:
    # One operation, not four, for a smaller model. Any key that `prime-train keys` lists can stand here.
    smaller = {
        "run.dir": directory, "run.steps": 8, "run.checkpoint_every": 0,
        "data.train": "arithmetic:1", "data.eval": "arithmetic:1", "sft.data": "arithmetic:1",
        "sft.base": "tiny:32x2x4", "sft.steps": 300, "sft.batch": 64, "sft.lr": 1e-2,
        "rollout.max_tokens": 16, "policy.lr": 3e-4, "eval.every": 4, "eval.prompts": 200,
    }  # fmt: skip
    config = load_config("quickstart", [f"--{key}={value}" for key, value in smaller.items()])
    checks.refuse_impossible(config)

    with setup.joined_world(config) as world:
        view = View(quiet=True)  # View() shows progress bars and samples
        interrupts = Interrupts()  # in a `with` it would have Ctrl-C save first
        sft.train(config, view, world, interrupts)
        progress = prime.train(config, view, world, interrupts)

    run = Path(directory)
    of_sft = read_records(run / "sft" / "metrics.jsonl")
    print(f"SFT: loss {of_sft[0]['sft/loss']:.3f} at step 1, {of_sft[-1]['sft/loss']:.3f} at step {of_sft[-1]['step']}")
    print(f"PRIME: {progress.step} steps in {progress.seconds:.1f} s\n")
    print(f"{'':6}{'sampled':>10}{'of pairs, the PRM':>20}{'held out,':>11}{'held out,':>11}")
    print(f"{'step':6}{'accuracy':>10}{'ranks right':>20}{'sampled':>11}{'greedy':>11}")
    columns = (
        ("accuracy/before_filter", 10), ("prm/pairwise_accuracy", 20), ("eval/sampled", 11), ("eval/greedy", 11)
    )  # fmt: skip
    for record in read_records(run / "metrics.jsonl"):
        cells = (f"{record[name]:>{width}.2f}" if name in record else " " * width for name, width in columns)
        print(f"{record['step']:<6}" + "".join(cells))
    print("\nthe run left", " ".join(sorted(path.name for path in run.iterdir())))
