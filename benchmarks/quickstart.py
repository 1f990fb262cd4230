"""PRIME against outcomes alone on the quickstart's task: several seeds of both, from the same SFT models.

`python -m benchmarks.quickstart --out DIR` runs what a user would run, one run after the other, and leaves
DIR/quickstart.json (accuracies and seconds of every run) and DIR/quickstart.png (their learning curves); --pages writes
the picture and the table of the Markdown pages from the newest kept ones.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pages import Block, picture, write_blocks
from benchmarks.report import RESULTS
from prime_train.run.directory import read_records

VARIANTS: dict[str, tuple[str, ...]] = {"PRIME": (), "outcome only": ("--advantage.process_coef", "0")}
CURVES = (("eval/sampled", "sampled"), ("eval/greedy", "greedy"))


def measure(work: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Runs every seed and variant; both variants of a seed start from the SFT model of its first one."""
    runs = []
    for seed in seeds:
        sft = None
        for variant, overrides in VARIANTS.items():
            directory = work / f"{variant.replace(' ', '-')}-{seed}"
            began = time.perf_counter()
            start = ("--model.policy", str(sft)) if sft else ()
            command = (
                sys.executable, "-m", "prime_train", "run", "quickstart", "--run.dir", str(directory),
                "--run.seed", str(seed), *start, *overrides,
            )  # fmt: skip
            subprocess.run(command, check=True)
            sft = sft or directory / "sft" / "model"
            records = read_records(directory / "metrics.jsonl")
            runs.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "with_sft": not start,
                    "seconds": round(time.perf_counter() - began, 1),
                    "evaluations": [
                        {"step": r["step"], **{name: r[name] for name, _ in CURVES}}
                        for r in records
                        if CURVES[0][0] in r
                    ],
                    "pairwise_accuracy": [r["prm/pairwise_accuracy"] for r in records if "prm/pairwise_accuracy" in r],
                }
            )
    return runs


def draw(runs: Sequence[dict[str, Any]], out: Path) -> None:
    """A thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, CURVES, strict=True):
        for colour, variant in enumerate(VARIANTS):
            curves = [[e[name] for e in run["evaluations"]] for run in runs if run["variant"] == variant]
            steps = [e["step"] for e in runs[0]["evaluations"]]
            for curve in curves:
                axis.plot(steps, curve, color=f"C{colour}", alpha=0.35, lw=1)
            mean = [sum(at) / len(at) for at in zip(*curves, strict=True)]
            axis.plot(steps, mean, color=f"C{colour}", lw=2, marker="o", ms=4, label=variant)
        axis.set_title(f"held-out accuracy, {title}")
        axis.set_xlabel("PRIME step; 0 is the SFT model")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def table_block(results: Path) -> str:
    """A table of accuracies before, halfway and after, mean and range over the seeds."""
    report = json.loads((results / "quickstart.json").read_text())
    seeds = sorted({run["seed"] for run in report["runs"]})
    lines = [
        f"Held-out accuracy, {len(seeds)} seeds: mean (lowest to highest).",
        "",
        "| | sampled | greedy |",
        "|---|---|---|",
        _row("SFT model", [run["evaluations"][0] for run in report["runs"] if run["with_sft"]]),
        *(
            _row(
                f"{variant}, {step} steps",
                [run["evaluations"][at] for run in report["runs"] if run["variant"] == variant],
            )
            for at, step in _halfway_and_last(report["runs"][0]["evaluations"])
            for variant in VARIANTS
        ),
    ]
    seconds = [run["seconds"] for run in report["runs"] if run["with_sft"]]
    lines += ["", f"SFT and PRIME took {min(seconds):.0f} to {max(seconds):.0f} s on {report['cpus']} CPU cores."]
    return "\n".join(lines)


def _halfway_and_last(evaluations: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Index and step of the middle evaluation and of the last."""
    return [(at, evaluations[at]["step"]) for at in (len(evaluations) // 2, len(evaluations) - 1)]


def _row(name: str, evaluations: Sequence[dict[str, float]]) -> str:
    cells = []
    for key, _ in CURVES:
        values = [100 * evaluation[key] for evaluation in evaluations]
        cells.append(f"{sum(values) / len(values):.0f}% ({min(values):.0f}–{max(values):.0f})")
    return f"| {name} | {' | '.join(cells)} |"


def page_blocks(results: Path = RESULTS) -> dict[str, Block]:
    """What `--pages` writes, from the newest folder of `results` that has a quickstart."""
    newest = max(results.glob("*/quickstart.json"), key=lambda path: path.parent.name[-10:]).parent
    return {
        "quickstart": lambda folder: table_block(newest),
        "quickstart-picture": lambda folder: picture(
            "held-out accuracy over PRIME steps", newest / "quickstart.png", folder
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="directory of the results; measures into it")
    parser.add_argument("--pages", action="store_true", help="rewrite the pages' blocks from the newest kept results")
    parser.add_argument("--work", type=Path, default=Path("runs/quickstart-seeds"), help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.out is not None:
        runs = measure(options.work, options.seeds)
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"cpus": os.cpu_count(), "runs": runs}
        (options.out / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(runs, options.out / "quickstart.png")
    if options.pages:
        try:
            write_blocks(page_blocks())
        except ValueError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
