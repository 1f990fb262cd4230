"""The cases at sizes for two cores, for development: the same table, JSON and plots as on a GPU, and no claims.

    python -m benchmarks.cpu [--out DIR] [--op ppo] [--provider eager]

Triton kernels have no CPU to run on, which the table says of each; `benchmarks.gpu --dry` runs them interpreted.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.environment import describe
from benchmarks.harness import Bench, Effort, Row
from benchmarks.providers import providers_of
from benchmarks.records import Report
from benchmarks.report import text, write
from benchmarks.roofline import measure_ceilings

EFFORT = Effort(milliseconds=600, least=3, most=5)
DEVICE = torch.device("cpu")
MEMORY_PROVIDERS = ("ours-torch", "eager", "liger-grpo", "trl")


def measure(chosen: tuple[cases.Case, ...], names: tuple[str, ...] | None, effort: Effort | None) -> list[Row]:
    rows = []
    for case in chosen:
        bench = Bench(case, DEVICE)
        for provider in providers_of(case, names):
            row = bench.measure(provider, effort)
            print(f"{case} {provider.name}: {row.status}" + (f" {row.ms:.1f} ms" if row.ms else ""), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for results.json and the plots")
    parser.add_argument("--op", action="append", choices=list(cases.OPS), help="only this op (repeatable)")
    parser.add_argument("--provider", action="append", help="only this provider (repeatable)")
    args = parser.parse_args()

    def of(wanted: tuple[cases.Case, ...]) -> tuple[cases.Case, ...]:
        return tuple(case for case in wanted if args.op is None or case.op in args.op)

    def by(wanted: tuple[str, ...]) -> tuple[str, ...]:
        return wanted if args.provider is None else tuple(args.provider)

    main_cases, sweep = of(cases.CPU_MAIN), of(cases.CPU_TOKENS)
    report = Report(
        kind="cpu",
        environment=describe(DEVICE),
        ceilings=measure_ceilings((*main_cases, *sweep), DEVICE, copy_bytes=1 << 27, effort=EFFORT),
        rows=measure(main_cases, args.provider and by(()), EFFORT) + measure(sweep, by(cases.SWEEP_PROVIDERS), EFFORT),
        memory=measure(of(cases.CPU_MEMORY), by(MEMORY_PROVIDERS), None),
    )
    print("\n" + text(report))
    if args.out:
        write(report, args.out)


if __name__ == "__main__":
    main()
