"""Learning curves of one run, or of several over each other."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..run.directory import read_records

CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("held-out accuracy", {"eval/sampled": "sampled", "eval/greedy": "greedy"}),
    ("training accuracy", {"accuracy/before_filter": "before filter", "accuracy/after_filter": "after filter"}),
    ("PRM accuracy before each update", {"prm/pairwise_accuracy": "pairwise", "prm/sign_accuracy": "sign"}),
    ("PRM loss", {"prm/loss": "loss"}),
    ("mean log-ratio a token", {"reward/right": "right", "reward/wrong": "wrong", "reward/rare_wrong": "rare, wrong"}),
    ("process share of the advantage", {"advantage/process_share": "share"}),
    ("response length, tokens", {"response/length": "length"}),
    ("policy entropy, nats", {"policy/entropy": "entropy"}),
    ("KL of an update, nats", {"policy/kl": "KL"}),
    ("clipped tokens", {"policy/clip_fraction": "share"}),
    ("time a step, s", {f"time/{stage}": stage for stage in ("rollout", "score", "prm", "policy")}),
    ("peak memory, GiB", {"memory/peak_gib": "peak"}),
)
"""Title, and the figures that it shows with their labels: solid, dashed, dotted, dash-dotted."""
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
COLUMNS = 3


def draw(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draws the curves of run directories, a colour each, into `out` or the first one's report.png.

    Raises:
        ValueError: a directory has no metrics.
    """
    records = {run: read_records(run / "metrics.jsonl") for run in runs}
    for run, found in records.items():
        if not found:
            raise ValueError(f"{run} has no metrics.jsonl, or an empty one")
    shown = [
        (title, names) for title, names in CURVES if any(n in r for f in records.values() for r in f for n in names)
    ]
    rows = -(-len(shown) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.6 * COLUMNS, 2.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes.flat, shown, strict=False):
        _draw_one(axis, title, names, records)
    if len(runs) > 1:
        handles = [plt.Line2D([], [], color=f"C{i}", label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(runs))
    out = out or runs[0] / "report.png"
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def _draw_one(axis: Axes, title: str, names: dict[str, str], records: dict[Path, list[dict]]) -> None:
    present = [name for name in names if any(name in r for found in records.values() for r in found)]
    for i, found in enumerate(records.values()):
        for name, style in zip(present, STYLES, strict=False):
            points = [(record["step"], record[name]) for record in found if name in record]
            if points:
                axis.plot(
                    *zip(*points, strict=True), style, color=f"C{i}", marker="o" if len(points) < 12 else None, ms=3
                )
    if len(present) > 1:
        axis.legend(
            handles=[
                plt.Line2D([], [], color="0.3", linestyle=style, label=names[name])
                for name, style in zip(present, STYLES, strict=False)
            ],
            fontsize=8,
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.grid(alpha=0.3)


def main(words: Sequence[str]) -> int:
    """`prime-train report RUN [RUN …] [--out FILE.png]`."""
    parser = argparse.ArgumentParser(prog="prime-train report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, help="picture; report.png in the first run's directory by default")
    options = parser.parse_args(words)
    try:
        print(draw(options.runs, options.out))
    except ValueError as error:
        parser.exit(1, f"prime-train report: {error}\n")
    return 0
