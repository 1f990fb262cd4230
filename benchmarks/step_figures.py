"""What a PRIME step was predicted to take and what it took, figure by figure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from prime_train.plan.records import Plan

WHOLE = "step"
"""Name of all stages together."""
UNITS = {"s": "{:.3g}", "tokens/s": "{:,.0f}", "MFU": "{:.2%}", "GiB": "{:.3g}"}
"""What is compared, and how it is written."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a stage, or of the whole step."""

    stage: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def compared(plan: Plan, flops: Mapping[str, float], peak: float, steps: Sequence[Mapping[str, float]]) -> list[Figure]:
    """Seconds, tokens/s, MFU and peak memory; of each the median over the steps.

    Args:
        flops: model FLOPs that the plan's batch takes, by stage: `flops.stage_flops`.
        peak: FLOP/s of which MFU is a share.
        steps: records of metrics.jsonl.
    """
    return [
        Figure(stage=stage, unit=unit, predicted=predicted, measured=median(step[name] for step in steps))
        for stage, unit, predicted, name in _pairs(plan, flops, peak)
    ]


def _pairs(plan: Plan, flops: Mapping[str, float], peak: float) -> Iterator[tuple[str, str, float, str]]:
    """Stage, unit, what the plan says of it, and the name of the metric that measures it."""
    seconds = {d.name: d.seconds for d in plan.durations}
    for stage, value in seconds.items():
        yield stage, "s", value, f"time/{stage}"
    yield WHOLE, "s", plan.seconds, "time/step"
    yield WHOLE, "tokens/s", plan.tokens / plan.seconds, "throughput/tokens_per_s"
    for stage, n in flops.items():
        yield stage, "MFU", n / seconds[stage] / peak, f"throughput/mfu_{stage}"
    training = sum(seconds[stage] for stage in flops)
    yield WHOLE, "MFU", sum(flops.values()) / training / peak, "throughput/mfu"
    for held in plan.stages:
        if held.name not in seconds:
            continue  # no stage of a step: evaluation
        yield held.name, "GiB", held.nbytes / GIB, f"memory/{held.name}_gib"
    yield WHOLE, "GiB", plan.peak.nbytes / GIB, "memory/peak_gib"


def figures_table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    lines = ["| stage | | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for figure in figures:
        form = UNITS[figure.unit]
        numbers = f"{form.format(figure.predicted)} | {form.format(figure.measured)} | {figure.ratio:.2f}"
        lines.append(f"| {figure.stage} | {figure.unit} | {numbers} |")
    return "\n".join(lines)
