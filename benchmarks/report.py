"""What came out, for readers: tables, and the numbers of the Markdown pages.

python -m benchmarks.report RESULTS.json               the tables of a run
python -m benchmarks.report RESULTS.json --roofline    both floors of each case, and how far each time is from them
python -m benchmarks.report --keep DIR                 copy a run's JSON and plots to benchmarks/results/HARDWARE-DATE
python -m benchmarks.report --pages                    write the pages' numbers from benchmarks/results
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import plots
from benchmarks.cases import GPU_MAIN, OPS
from benchmarks.harness import Row
from benchmarks.pages import ROOT, Block, picture, write_blocks
from benchmarks.records import NO_CLAIMS, Report
from benchmarks.roofline import floors
from benchmarks.step_figures import Figure, figures_table

RESULTS = ROOT / "benchmarks" / "results"
NO_GPU_RUN = "No run on a GPU is kept yet, so no speed and no memory on a GPU is stated here."
GIB = 1 << 30


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is text, the others numbers or text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _gib(nbytes: int | None) -> str:
    if nbytes is None:
        return "–"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"


def rows_table(report: Report, *, brief: bool = False) -> str:
    """A block for each case, or for those of the first one's shape: time, that of bare GEMMs over it, memory, error."""
    blocks = []
    for case in dict.fromkeys(row.case for row in report.rows):
        first = report.rows[0].case
        if brief and (case.N, case.D, case.V) != (first.N, first.D, first.V):
            continue
        rows = [row for row in report.rows if row.case == case]
        best = min((row.ms for row in rows if row.ms is not None), default=None)
        lines = [("provider", "ms", "±", "× best", "of bare", "peak", "scratch", "error")]
        for row in rows:
            if row.status == "skipped":
                continue
            ratio = row.ms / best if row.ms is not None and best else None
            numbers = (
                _number(row.ms, "{:.2f}"), _number(row.spread, "{:.0%}"), _number(ratio, "{:.2f}"),
                _number(row.of_bare, "{:.1%}"), _gib(row.peak_bytes), _gib(row.scratch_bytes),
                _number(row.error, "{:.1e}"),
            )  # fmt: skip
            lines.append((row.provider, *numbers) if row.status == "ok" else (row.provider, row.status, *("",) * 6))
        blocks.append(f"{case}\n{table(lines)}")
    return "\n\n".join(blocks)


def reasons_table(rows: Iterable[Row]) -> str:
    """Why a provider has no time, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            found.setdefault((row.provider, row.status, row.reason), []).append(row.case.op)
    if not found:
        return ""
    lines = [("provider", "ops", "status", "reason")]
    lines += [(who, " ".join(dict.fromkeys(ops)), status, why) for (who, status, why), ops in found.items()]
    return "Not measured\n" + table(lines)


def roofline_table(report: Report) -> str:
    """Both floors of each case, and the distance of each time to the larger."""
    lines = [("case", "compute ms", "memory ms", "provider", "ms", "× floor")]
    for row in report.rows:
        found = floors(row.case, report.ceilings)
        if row.ms is None or found is None:
            continue
        numbers = f"{found.compute_ms:.2f}", f"{found.memory_ms:.2f}", row.provider, f"{row.ms:.2f}"
        lines.append((str(row.case), *numbers, f"{row.ms / found.ms:.2f}"))
    return table(lines)


def ceilings_table(report: Report) -> str:
    if report.ceilings is None:
        return ""
    rates = [("copy", f"{report.ceilings.copy_bytes_per_s / 1e9:.0f} GB/s")]
    rates += [(name, f"{rate / 1e12:.3g} TFLOP/s") for name, rate in report.ceilings.gemm_flops_per_s.items()]
    return "Ceilings measured in this run\n" + table(rates)


def memory_table(rows: list[Row]) -> str:
    head = ("case", "provider", "peak", "scratch", "status")
    lines = [
        (str(r.case), r.provider, _gib(r.peak_bytes), _gib(r.scratch_bytes), r.reason if r.status != "ok" else "")
        for r in rows
        if r.status != "skipped"
    ]
    return "Peak memory beyond the inputs\n" + table([head, *lines]) if lines else ""


def scratch_table(report: Report) -> str:
    lines = [("op", "backend", "dtype", "shape", "forward", "backward", "bound", "")]
    for s in report.scratch:
        sizes = _gib(s["forward"]), _gib(s["backward"]), _gib(s["bound"])
        held = max(s["forward"], s["backward"]) <= s["bound"]
        shape = f"{s['N']} × {s['D']} × {s['V']}"
        lines.append((s["op"], s["backend"], s["dtype"], shape, *sizes, "held" if held else "EXCEEDED"))
    return "Scratch memory against its bound\n" + table(lines) if report.scratch else ""


def settings_table(report: Report) -> str:
    lines = [(s["kernel"], s["settings"], _number(s["ms"], "{:.3f}"), s["status"]) for s in report.settings]
    return "Settings of strategy 'fused'\n" + table([("kernel", "settings", "ms", "status"), *lines]) if lines else ""


def step_table(report: Report) -> str:
    figures = [Figure(**entry) for entry in report.stages.get("figures", ())]
    return f"PRIME step of {report.stages['workload']['model']}\n{figures_table(figures)}" if figures else ""


def sections_table(report: Report) -> str:
    lines = [(s.name, s.status, f"{s.seconds:.0f}", s.summary) for s in report.sections]
    return "Sections\n" + table([("section", "status", "seconds", "summary"), *lines]) if lines else ""


def text(report: Report, *, brief: bool = False) -> str:
    """The report for a terminal; `brief` is the first shape alone, the rest is in the log."""
    at_length = [ceilings_table(report), memory_table(report.memory), scratch_table(report), settings_table(report)]
    parts = [
        ", ".join(f"{name} {value}" for name, value in report.environment.items()),
        NO_CLAIMS if report.kind != "gpu" else "",
        *([] if brief else at_length),
        rows_table(report, brief=brief),
        reasons_table(report.rows),
        "For prime_kernels/plan.py\n" + "\n".join(report.best) if report.best else "",
        step_table(report),
        sections_table(report),
    ]
    return "\n\n".join(part for part in parts if part)


def write(report: Report, out: Path) -> None:
    """results.json and the plots into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    report.save(out / "results.json")
    try:
        plots.draw(report, out)
    except Exception as error:  # numbers that took minutes on a GPU are not lost to a picture of them
        print(f"no plots: {type(error).__name__}: {error}")


def newest_gpu_run(results: Path) -> tuple[Path, Report] | None:
    """The folder and the report of the newest kept run on a GPU."""
    kept = [(path.parent, Report.load(path)) for path in sorted(results.glob("*/results.json"))]
    runs = [(folder, report) for folder, report in kept if report.kind == "gpu" and report.rows]
    return max(runs, key=lambda run: run[1].environment["date"], default=None)


def main_rows(report: Report, op: str) -> list[Row]:
    """What was timed of `op` at the main shape, fastest first."""
    timed = [row for row in report.rows if row.case == replace(GPU_MAIN[0], op=op) and row.ms is not None]
    return sorted(timed, key=lambda row: row.ms or 0.0)


def numbers_block(results: Path) -> str:
    """The main case of the newest GPU run that was kept, or that there is none."""
    run = newest_gpu_run(results)
    if run is None:
        return NO_GPU_RUN
    report = run[1]
    env = report.environment
    case = GPU_MAIN[0]
    lines = [
        f"{env['hardware']}, torch {env['torch']}, triton {env['triton']}, commit {env['commit']}, {env['date']}. "
        f"N = {case.N}, D = {case.D}, V = {case.V}, {case.dtype}; median of runs; of bare is the time of the op's "
        "bare GEMMs, run in turn with it, over its own; error ‖Δ‖/‖exact‖ against fp64, the largest of result and "
        "gradients.",
        "", "| op | provider | ms | of bare | peak memory | error |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for op in OPS:
        for row in main_rows(report, op):
            numbers = (
                f"{row.ms:.1f}", _number(row.of_bare, "{:.0%}"), _gib(row.peak_bytes),
                _number(row.error, "{:.1e}"),
            )  # fmt: skip
            lines.append(f"| {op} | {row.provider} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def speed_block(results: Path, folder: Path) -> str:
    """The same in a picture and a line, for a page of `folder`: our fastest PPO loss beside the fastest other one."""
    run = newest_gpu_run(results)
    if run is None:
        return NO_GPU_RUN
    kept, report = run
    env, case = report.environment, GPU_MAIN[0]
    rows = main_rows(report, case.op)
    found = []
    for ours in (True, False):
        fastest = next((row for row in rows if row.provider.startswith("ours-") == ours), None)
        if fastest is not None:
            found.append(f"{fastest.provider} {fastest.ms:.1f} ms and {_gib(fastest.peak_bytes)}")
    line = (
        f"{case.spec.what} at N = {case.N}, D = {case.D}, V = {case.V} in {case.dtype} on {env['hardware']}, "
        f"{env['date']}: {', '.join(found) or 'not measured'}."
    )
    return f"{picture('time of each op by everybody, beside its bare GEMMs', kept / 'speed.png', folder)}\n\n{line}"


def page_blocks(results: Path = RESULTS) -> dict[str, Block]:
    """What `--pages` writes."""
    return {"numbers": lambda folder: numbers_block(results), "speed": lambda folder: speed_block(results, folder)}


def keep(run: Path) -> Path:
    """Copy a run to `benchmarks/results`, under its hardware and date."""
    report = Report.load(run / "results.json")
    if report.kind == "dry":
        raise ValueError(f"{run} is of a dry run, whose numbers mean nothing")
    slug = re.sub(r"[^a-z0-9]+", "-", report.environment["hardware"].split(",")[0].lower()).strip("-")
    target = RESULTS / f"{slug}-{report.environment['date']}"
    target.mkdir(parents=True, exist_ok=True)
    for path in [run / "results.json", *run.glob("*.png")]:
        shutil.copy(path, target / path.name)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", help="a run's results.json, to be printed")
    parser.add_argument("--roofline", action="store_true", help="print its times against their floors instead")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a run's folder, to be copied to benchmarks/results")
    parser.add_argument("--pages", action="store_true", help="rewrite the blocks `numbers` and `speed` of the pages")
    args = parser.parse_args()
    if args.results:
        report = Report.load(args.results)
        if args.roofline and report.ceilings is None:
            parser.error("no ceilings were measured in this run: there is nothing to hold its times against")
        print(roofline_table(report) if args.roofline else text(report))
    if args.keep:
        print(keep(args.keep))
    if args.pages:
        try:
            write_blocks(page_blocks())
        except ValueError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
