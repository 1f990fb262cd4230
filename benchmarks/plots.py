"""A run in pictures: time, error and memory of every provider side by side, and time against N where that was swept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import ALL_OPS, Case
from benchmarks.harness import Row
from benchmarks.records import NO_CLAIMS, Report

OURS, OTHERS = "C0", "0.7"


def draw(report: Report, out: Path) -> None:
    """speed.png, error.png, memory.png and tokens.png into `out`, those for which anything was measured."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    timed = [row for row in report.rows if row.ms is not None]
    if timed:
        main = [row for row in timed if _shape(row.case) == _shape(timed[0].case)]
        wanted: tuple[tuple[str, Callable[[Row], float | None], str, str], ...] = (
            ("speed", lambda row: row.ms, "{:.1f}", "ms; the line is the op's bare GEMMs"),
            ("error", lambda row: row.error, "{:.1e}", "error against fp64, ‖Δ‖/‖exact‖"),
            ("memory", lambda row: (row.peak_bytes or 0) / 2**30, "{:.2f}", "peak beyond the inputs, GiB"),
        )
        for name, value, form, label in wanted:
            _bars(report, main, value, form, label, out / f"{name}.png", log=name == "error", floor=name == "speed")
    paired = [row for row in timed if row.of_bare is not None]
    swept = _ops([row for row in paired if _points(paired, row) > 1])
    if swept:
        _tokens(report, paired, swept, out / "tokens.png")


def _shape(case: Case) -> tuple[int, int, int, str]:
    return case.N, case.D, case.V, case.dtype


def _points(rows: list[Row], of: Row) -> int:
    """At how many N a row's provider was timed, all else being equal."""
    same = [r for r in rows if (r.provider, r.case.op) == (of.provider, of.case.op)]
    return len({r.case.N for r in same if (r.case.D, r.case.V, r.case.dtype) == (of.case.D, of.case.V, of.case.dtype)})


def _title(report: Report) -> str:
    name = f"{report.environment['hardware']}, {report.environment['date']}"
    return name if report.kind == "gpu" else f"{name}\n{NO_CLAIMS}"


def _ops(rows: list[Row]) -> list[str]:
    """The three most important ops that were measured."""
    return [op for op in ALL_OPS if any(row.case.op == op for row in rows)][:3]


def _panels(count: int, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(5 * count, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def _save(figure: Any, report: Report, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.suptitle(_title(report), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(
    report: Report, rows: list[Row], value: Callable[[Row], float | None], form: str, label: str, path: Path,
    log: bool = False, floor: bool = False,
) -> None:  # fmt: skip
    """A panel for each op, the smallest on top; ours in colour. `floor` draws the time of the op's bare GEMMs."""
    from matplotlib.ticker import NullFormatter

    ops = _ops(rows)
    most = max(len([row for row in rows if row.case.op == op]) for op in ops)
    figure, axes = _panels(len(ops), 1.2 + 0.32 * most)
    for axis, op in zip(axes, ops, strict=True):
        found = [(v, row) for row in rows if row.case.op == op and (v := value(row))]
        found.sort(key=lambda pair: pair[0])
        places = range(len(found))
        colours = [OURS if row.provider.startswith("ours") else OTHERS for _, row in found]
        bars = axis.barh(places, [v for v, _ in found], color=colours)
        axis.bar_label(bars, [form.format(v) for v, _ in found], padding=3, fontsize="small")
        axis.set_yticks(places, [row.provider for _, row in found])
        axis.invert_yaxis()
        case = next(row.case for row in rows if row.case.op == op)
        axis.set(title=f"{case.spec.what}\nN={case.N}, D={case.D}, V={case.V}, {case.dtype}", xlabel=label)
        axis.title.set_fontsize("medium")
        axis.margins(x=0.18)
        if log and found:
            # Whole decades, since bars have no start on this axis.
            axis.set_xscale("log")
            least, largest = (math.log10(v) for v in (found[0][0], found[-1][0]))
            axis.set_xlim(10.0 ** math.floor(least), 10.0 ** math.ceil(largest + 0.3))
            axis.xaxis.set_minor_formatter(NullFormatter())
        bare = [row.ms * row.of_bare for _, row in found if row.ms and row.of_bare]
        if floor and bare:
            axis.axvline(sorted(bare)[len(bare) // 2], color="k", linewidth=1, linestyle=":")
    _save(figure, report, path)


def _tokens(report: Report, rows: list[Row], ops: list[str], path: Path) -> None:
    """The time of bare GEMMs over a provider's own, against N."""
    drawn = [row for row in rows if row.case.op in ops and _points(rows, row) > 1]
    colours = {who: f"C{i % 10}" for i, who in enumerate(dict.fromkeys(row.provider for row in drawn))}
    figure, axes = _panels(len(ops), 4)
    figure.set_figwidth(6.5 * len(ops))
    for axis, op in zip(axes, ops, strict=True):
        mine = [row for row in drawn if row.case.op == op]
        shape = mine[0].case.D, mine[0].case.V, mine[0].case.dtype
        for who in dict.fromkeys(row.provider for row in mine):
            points = {
                r.case.N: r.of_bare for r in mine if r.provider == who and (r.case.D, r.case.V, r.case.dtype) == shape
            }
            axis.plot(sorted(points), [points[n] for n in sorted(points)], marker="o", label=who, color=colours[who])
        axis.set(title=f"{op}, D={shape[0]}, V={shape[1]}, {shape[2]}", xlabel="tokens N", ylim=(0, None),
                 ylabel="time of bare GEMMs over its own")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, report, path)
