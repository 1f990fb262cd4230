"""Everything that matters on one GPU, inside a time box, most important first.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--section main ...]
    python -m benchmarks.gpu --out DIR --dry      every section at tiny sizes on a CPU, kernels interpreted

Each section is a process of its own with a limit, so that one that crashes or hangs loses only itself. DIR gets
results.json, up to three plots and log.txt; results.json is there, and whole, after every section. Needs no network:
peers come from the environment or from `.peers/` (`make peers`).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from benchmarks.pages import ROOT

RESERVE = 15.0  # seconds for the report
LEAST = 5.0  # seconds for which nothing is worth starting
GRACE = 0.85  # of its limit is what a section is told, the rest is for the row it is in


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--section", action="append", help="only this section (repeatable)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, to see that everything runs")
    parser.add_argument("--fault", action="append", default=[], metavar="SECTION=crash|hang", help="for the tests")
    parser.add_argument("--inside", nargs=3, metavar=("SECTION", "SECONDS", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the package is imported
    if args.inside:
        name, seconds, file = args.inside
        fail(dict(f.split("=") for f in args.fault).get(name))
        from benchmarks.sections import run_section

        run_section(name, dry=args.dry, seconds=float(seconds), out=Path(file))
        return
    conduct(args.out, minutes=args.minutes, only=args.section, dry=args.dry, faults=args.fault)


def fail(fault: str | None) -> None:
    """What the tests make a section do."""
    if fault == "crash":
        os.abort()
    if fault == "hang":
        time.sleep(3600)


def conduct(out: Path, *, minutes: float, only: list[str] | None, dry: bool, faults: list[str]) -> None:
    """Run the sections one after the other, and report after each."""
    from benchmarks.records import Report, Section, merged
    from benchmarks.report import text, write
    from benchmarks.sections import SECTIONS, findings, rows_begun

    unknown = set(only or ()) - set(SECTIONS)
    if unknown:
        sys.exit(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    parts = {name: part for name, part in SECTIONS.items() if not only or name in only}
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + minutes * 60 - RESERVE
    report = Report(kind="dry" if dry else "gpu", environment={})
    with (out / "log.txt").open("w") as log, tempfile.TemporaryDirectory() as work:
        for i, (name, part) in enumerate(parts.items()):
            begun = time.monotonic()
            shares = sum(later.share for later in list(parts.values())[i:])
            limit = (end - begun) * part.share / shares
            if limit < LEAST:
                report.sections.append(Section(name=name, status="not reached, time is up", seconds=0.0))
                continue
            print(f"{name} (at most {limit:.0f} s) …", flush=True)
            log.write(f"\n===== {name}\n")
            log.flush()
            found = Path(work) / f"{name}.jsonl"
            flags = ["--dry"] * dry + [word for fault in faults for word in ("--fault", fault)]
            status, rows = "", -1
            # A section that dies on a row goes on after it, in a new process; one that dies without a row does not.
            while died(status) and rows_begun(found) > rows and (left := begun + limit - time.monotonic()) > LEAST:
                rows = rows_begun(found)
                inside = ["--inside", name, f"{GRACE * left:.1f}", str(found), "--out", str(out)]
                status = run_limited([sys.executable, "-m", "benchmarks.gpu", *inside, *flags], left, log)
            report, summary = merged(report, findings(found), status)
            seconds = time.monotonic() - begun
            report.sections.append(Section(name=name, status=status, seconds=seconds, summary=summary))
            print(f"{name}: {status}, {seconds:.0f} s. {summary}", flush=True)
            report.save(out / "results.json")
        log.write("\n===== report\n" + text(report) + "\n")
    write(report, out)
    print("\n" + text(report, brief=True))


def died(status: str) -> bool:
    """Whether a section ended by itself and badly; also before its first attempt."""
    return status == "" or status.startswith(("crashed", "failed"))


def run_limited(command: list[str], limit: float, log: TextIO) -> str:
    """Run a command in a process group of its own, which is ended `limit` seconds later; says how it ended."""
    running = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = running.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        return f"stopped at its limit of {limit:.0f} s"
    if code == 0:
        return "ok"
    return f"crashed with {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


if __name__ == "__main__":
    main()
