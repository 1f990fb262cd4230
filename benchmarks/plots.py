"""A run in pictures: time, and that of bare GEMMs over it, against N, peak memory against V, error against time."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import ALL_OPS, Case
from benchmarks.harness import Row
from benchmarks.records import NO_CLAIMS, Report


def draw(report: Report, out: Path) -> None:
    """speed.png, memory.png and error.png into `out`; nothing where matplotlib is missing or nothing was measured."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    timed = [row for row in report.rows if row.ms is not None]
    if timed:
        _speed(report, timed, out / "speed.png")
        _error(report, timed, out / "error.png")
    peaks = [row for row in report.memory if row.peak_bytes]
    if peaks:
        _memory(report, peaks, out / "memory.png")


def _title(report: Report) -> str:
    name = f"{report.environment['hardware']}, {report.environment['date']}"
    return name if report.kind == "gpu" else f"{name}\n{NO_CLAIMS}"


def _lines(rows: list[Row], x: Callable[[Case], int], y: Callable[[Row], float | None]) -> dict[str, list[tuple]]:
    """Points (x, y) of each provider, in order."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        value = y(row)
        if value is not None:
            found.setdefault(row.provider, {}).setdefault(x(row.case), value)
    return {who: sorted(points.items()) for who, points in found.items()}


def _colours(rows: list[Row]) -> dict[str, str]:
    """One for each provider, the same in every panel."""
    return {who: f"C{i % 10}" for i, who in enumerate(dict.fromkeys(row.provider for row in rows))}


def _ops(rows: list[Row]) -> list[str]:
    """The three most important ops that were measured."""
    return [op for op in ALL_OPS if any(row.case.op == op for row in rows)][:3]


def _widest(rows: list[Row], shape: Callable[[Case], object]) -> list[Row]:
    """The rows of the shape that was measured at most points."""
    shapes = [shape(row.case) for row in rows]
    most = max(dict.fromkeys(shapes), key=lambda s: len({r.case for r in rows if shape(r.case) == s}))
    return [row for row in rows if shape(row.case) == most]


def _speed(report: Report, rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot as plt

    rows = _widest(rows, lambda case: (case.D, case.V, case.dtype))
    ops, colours = _ops(rows), _colours(rows)
    figure, axes = plt.subplots(2, len(ops), figsize=(5 * len(ops), 8), squeeze=False, layout="constrained")
    for column, op in enumerate(ops):
        mine = [row for row in rows if row.case.op == op]
        for who, points in _lines(mine, lambda case: case.N, lambda row: row.ms).items():
            axes[0, column].plot(*zip(*points, strict=True), marker="o", label=who, color=colours[who])
        shares = _lines(mine, lambda case: case.N, lambda row: row.of_bare)
        for who, points in shares.items():
            axes[1, column].plot(*zip(*points, strict=True), marker="o", label=who, color=colours[who])
        case = mine[0].case
        axes[0, column].set(title=f"{op}, D={case.D}, V={case.V}, {case.dtype}", ylabel="ms", yscale="log")
        axes[0, column].legend(fontsize="small")
        axes[1, column].set(xlabel="tokens N", ylabel="time of bare GEMMs over its own", ylim=(0, None))
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
    figure.suptitle(_title(report), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _memory(report: Report, rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot as plt

    rows = _widest(rows, lambda case: (case.N, case.D, case.dtype))
    ops, colours = _ops(rows), _colours(rows)
    figure, axes = plt.subplots(1, len(ops), figsize=(6 * len(ops), 4.5), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], ops, strict=True):
        mine = [row for row in rows if row.case.op == op]
        for who, points in _lines(mine, lambda case: case.V, lambda row: (row.peak_bytes or 0) / 2**30).items():
            axis.plot(*zip(*points, strict=True), marker="o", label=who, color=colours[who])
        case = mine[0].case
        axis.set(title=f"{op}, N={case.N}, D={case.D}, {case.dtype}", xlabel="vocabulary V", yscale="log",
                 ylabel="peak beyond inputs, GiB")  # fmt: skip
        axis.legend(fontsize="small")
    figure.suptitle(_title(report), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _error(report: Report, rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot as plt

    first = rows[0].case
    rows = [row for row in rows if (row.case.N, row.case.D, row.case.V, row.case.dtype) == (
        first.N, first.D, first.V, first.dtype)]  # fmt: skip
    ops, colours = _ops(rows), _colours(rows)
    figure, axes = plt.subplots(1, len(ops), figsize=(5 * len(ops), 4.5), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], ops, strict=True):
        for row in rows:
            if row.case.op == op and row.error and row.ms:
                axis.scatter(row.ms, row.error, color=colours[row.provider])
                axis.annotate(row.provider, (row.ms, row.error), fontsize="small")
        axis.set(title=f"{op}, N={first.N}, D={first.D}, V={first.V}", xlabel="ms", yscale="log",
                 ylabel="error against fp64, ‖Δ‖/‖exact‖")  # fmt: skip
    figure.suptitle(_title(report), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)
