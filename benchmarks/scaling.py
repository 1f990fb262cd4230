"""How a step scales: measured here over a few processes, predicted by the plan's model for 8 to 1,024 GPUs.

`python -m benchmarks.scaling --out DIR` runs the same small PRIME run under torchrun with each number of processes and
leaves DIR/scaling.json and DIR/scaling.md. The predictions are no measurements: they are what `prime-train plan` says,
memory and time, of models of Qwen2.5's shapes, with its assumptions beside them. `--processes` without numbers predicts
alone, which takes seconds: what DIR has of measurements stays as it is, with the environment that it is of.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config

from benchmarks.environment import describe
from benchmarks.prime_step import make_model
from prime_kernels.devices import DEVICES
from prime_train.config.keys import Config
from prime_train.plan.durations import batch_tokens
from prime_train.plan.flops import stage_flops
from prime_train.plan.make import make_plan
from prime_train.plan.rates import rates_of
from prime_train.plan.records import GIB, Cluster, Plan, Role
from prime_train.plan.sizes import sizes_of
from prime_train.run.directory import read_records

SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads: config.json of Qwen/Qwen2.5-7B, -32B and -72B; their
    # vocabulary is 152,064, embedding and head are not tied
    "7B": (3584, 18944, 28, 28, 4),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}
VOCABULARY = 152064
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
DEVICE, DEVICE_GIB, PER_NODE = "H100", 80, 8
PROMPTS_PER_GPU, SAMPLES, STEPS_PER_BATCH = 4, 4, 4
BUDGET = 16384
ENGINES = {"7B": "local", "32B": "vllm", "72B": "vllm"}
"""The embedded engine holds a whole copy of the policy on each GPU."""

WORKLOAD = (
    "--run.steps", "3", "--run.checkpoint_every", "0", "--data.train", "arithmetic", "--rollout.prompts", "16",
    "--rollout.samples", "4", "--rollout.max_tokens", "48", "--filter.low", "0", "--filter.high", "1",
    "--policy.mini_batch", "32", "--prm.mini_batch", "32", "--eval.every", "0", "--eval.prompts", "1",
)  # fmt: skip
"""Of the measured runs, which are the quickstart otherwise: every prompt passes, so all runs have the same work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The last step of a run with so many processes."""

    processes: int
    status: str
    """"ok", or why there are no numbers."""
    seconds: float | None = None
    tokens_per_s: float | None = None
    stages: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the plan says of a model on so many GPUs. No measurement."""

    model: str
    gpus: int
    replicas: int
    fits: bool
    gib: float
    """Of the fullest stage, one GPU."""
    seconds: float
    """Of a step."""
    tokens_per_s: float
    """Trained tokens, all GPUs together."""
    mfu: float
    """Model FLOPs of scoring, PRM and policy over their seconds and the devices' peak."""
    stages: dict[str, float]


def measure(work: Path, processes: Sequence[int]) -> Iterator[Measured]:
    """Runs the workload once with each number of processes, one thread each."""
    make_model(work / "model", "dry")
    for n in processes:
        directory = work / f"run-{n}"
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m") if n > 1 else ()
        command = (
            sys.executable, "-m", *launcher, "prime_train", "run", "quickstart", "--run.dir", str(directory),
            "--model.policy", str(work / "model"), *WORKLOAD,
        )  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            yield Measured(processes=n, status=f"failed ({done.returncode}): {lines[-1].strip()[:140]}")
            continue
        last = read_records(directory / "metrics.jsonl")[-1]
        yield Measured(
            processes=n, status="ok", seconds=last["time/step"], tokens_per_s=last["throughput/tokens_per_s"],
            stages={name.removeprefix("time/"): value for name, value in last.items() if name.startswith("time/")},
        )  # fmt: skip


def predict(models: Sequence[str] = tuple(SHAPES), gpus: Sequence[int] = GPUS) -> list[Predicted]:
    """Every model on every number of GPUs, with as many replicas as come within 2% of the shortest step that fits."""
    found = []
    for model in models:
        for n in gpus:
            tried = [predicted(model, n, n // shards) for shards in _powers(n)]
            fitting = [p for p in tried if p.fits]
            shortest = min((p.seconds for p in fitting), default=0.0)
            found.append(next((p for p in fitting if p.seconds <= 1.02 * shortest), tried[-1]))
    return found


def predicted(model: str, gpus: int, replicas: int) -> Predicted:
    """A model of this shape, weights sharded over gpus / replicas."""
    config, plan = planned(model, gpus, replicas)
    sizes = sizes_of(architecture(model))
    training = [d for d in plan.durations if d.name in stage_flops(config, batch_tokens(config), policy=sizes)]
    peak = DEVICES[DEVICE].flops * gpus
    return Predicted(
        model=model, gpus=gpus, replicas=replicas, fits=plan.fits, gib=round(plan.peak.nbytes / GIB, 1),
        seconds=round(plan.seconds, 1), tokens_per_s=round(plan.tokens / plan.seconds),
        mfu=round(plan.flops / sum(d.seconds for d in training) / peak, 3),
        stages={d.name: round(d.seconds, 1) for d in plan.durations},
    )  # fmt: skip


def planned(model: str, gpus: int, replicas: int) -> tuple[Config, Plan]:
    """The batch grows with the GPUs; everything else is the published 7B run's."""
    prompts = PROMPTS_PER_GPU * gpus
    mini_batch = prompts * SAMPLES // STEPS_PER_BATCH
    config = Config.model_validate(
        {
            "model": {"blocks": ["checkpoint"], "replicas": replicas, "tokens_per_micro_batch": BUDGET},
            "rollout": {"prompts": prompts, "samples": SAMPLES, "engine": ENGINES[model]},
            "vllm": {"servers": "http://servers:8000"},
            "policy": {"mini_batch": mini_batch},
            "prm": {"mini_batch": mini_batch},
        }
    )
    cluster = Cluster(processes=gpus, memory=DEVICE_GIB * GIB, cuda=True, per_node=PER_NODE)
    roles: tuple[Role, ...] = ("policy", "prm", "reference")
    architectures = dict.fromkeys(roles, architecture(model))
    return config, make_plan(config, cluster, rates_of(DEVICES[DEVICE], f"an {DEVICE}"), architectures)


def architecture(model: str) -> Qwen2Config:
    hidden, intermediate, layers, heads, kv_heads = SHAPES[model]
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip


def _powers(n: int) -> list[int]:
    """8, 16, … n: numbers of shards, at least a node's."""
    return [size for size in GPUS if size <= n]


def tables(report: dict) -> str:
    """The report as Markdown."""
    lines = ["# Scaling", "", f"## Measured on {report['environment']['hardware']}", ""]
    if report["measured"]:
        lines += ["| processes | s/step | tokens/s | |", "|---|---|---|---|"]
        lines += [_measured_row(Measured(**row)) for row in report["measured"]]
        lines += [
            "",
            "A tiny model in one run of three steps, the last of them: that it runs, not how fast a model is.",
        ]
    else:
        lines += ["Nothing."]
    lines += ["", "## Predicted by the plan's model: not measured", ""]
    lines += ["| model | GPUs | shards × replicas | GiB a GPU | s/step | tokens/s | a GPU | MFU of training | time |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_predicted_row(Predicted(**row)) for row in report["predicted"]]
    lines += ["", "Assumed:", "", *(f"- {line}" for line in report["assumptions"])]
    return "\n".join(lines) + "\n"


def _measured_row(row: Measured) -> str:
    if row.seconds is None or row.tokens_per_s is None:
        return f"| {row.processes} | – | – | {row.status} |"
    return f"| {row.processes} | {row.seconds:.2f} | {row.tokens_per_s:.0f} | {row.status} |"


def _predicted_row(row: Predicted) -> str:
    place = f"| {row.model} | {row.gpus} | {row.gpus // row.replicas} × {row.replicas} | {row.gib:.1f} |"
    if not row.fits:
        return f"{place} does not fit | | | | |"
    longest = max(row.stages, key=lambda name: row.stages[name])
    share = f"{longest} {row.stages[longest] / row.seconds:.0%}"
    each = row.tokens_per_s / row.gpus
    return f"{place} {row.seconds:.0f} | {row.tokens_per_s:,} | {each:,.0f} | {row.mfu:.0%} | {share} |"


def assumptions() -> list[str]:
    """What the predictions rest on."""
    plans = [planned(model, GPUS[0], 1)[1] for model in ("32B", "7B")]
    lines = dict.fromkeys(line for plan in plans for line in plan.assumptions)
    return [
        f"{DEVICE} of {DEVICE_GIB} GiB, {PER_NODE} a node, each with a 400 Gbit/s network card",
        f"the batch grows with the GPUs: {PROMPTS_PER_GPU} prompts × {SAMPLES} responses each; {STEPS_PER_BATCH} "
        f"optimizer steps a batch, blocks checkpointed, {BUDGET} tokens a micro-batch; policy, PRM and reference of "
        f"the same shape; 7B samples by the embedded engine, 32B and 72B by vLLM servers, not counted as GPUs",
        "weights are sharded over a node or more, in as many replicas as come within 2% of the shortest step that fits",
        *lines,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="what is measured here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measured = list(measure(Path(work), options.processes)) if options.processes else []
    report = {"environment": describe(torch.device("cpu")), "measured": [asdict(row) for row in measured]}
    kept = options.out / "scaling.json"
    if not options.processes and kept.exists():
        before = json.loads(kept.read_text())
        report = {name: before[name] for name in report}
    report |= {"predicted": [asdict(row) for row in predict()], "assumptions": assumptions()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "scaling.md").write_text(tables(report))


if __name__ == "__main__":
    main()
