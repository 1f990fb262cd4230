"""What a run found, as records and as JSON."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.harness import Row
from benchmarks.roofline import Ceilings, floors

NO_CLAIMS = "Development sizes on a CPU: no claims are made from these numbers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a GPU run, in a process of its own."""

    name: str
    status: str  # "ok", or what ended it
    seconds: float
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a run found."""

    kind: str  # "gpu", "cpu" or "dry"; claims come from "gpu" alone
    environment: dict[str, str]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)
    scratch: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)  # of the tile sweep
    best: list[str] = field(default_factory=list)  # the fastest of them, as plan.py writes it
    stages: dict[str, Any] = field(default_factory=dict)  # of a PRIME step: prime_step.json
    sections: list[Section] = field(default_factory=list)

    def save(self, path: Path) -> None:
        content = asdict(self)
        for row, written in zip(self.rows, content["rows"], strict=True):
            found = floors(row.case, self.ceilings)
            written["floor_ms"] = None if found is None else found.ms
            written |= {"flops": row.case.flops, "bytes": row.case.bytes, "gate": row.case.spec.gate}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        content = json.loads(path.read_text())
        content["ceilings"] = content["ceilings"] and Ceilings(**content["ceilings"])
        for name in ("rows", "memory"):
            content[name] = [row_from(entry) for entry in content[name]]
        content["sections"] = [Section(**entry) for entry in content["sections"]]
        return cls(**content)


def merged(report: Report, found: list[tuple[str, Any]], status: str = "ok") -> tuple[Report, str]:
    """The report with what a section handed over, and the section's summary of itself.

    A row that was begun and never came is one on which the section's process ended, as `status` says.
    """
    summary, rows = "", {"row": report.rows, "memory": report.memory}
    begun: dict[tuple[str, Case, str], None] = {}
    for kind, content in found:
        if kind == "summary":
            summary = content
        elif kind == "begin":
            begun[content["kind"], Case(**content["case"]), content["provider"]] = None
        elif kind in rows:
            row = row_from(content)
            rows[kind].append(row)
            begun.pop((kind, row.case, row.provider), None)
        elif kind == "ceilings":
            report = replace(report, ceilings=Ceilings(**content))
        elif kind in ("environment", "stages"):
            report = replace(report, **{kind: content})
        else:
            getattr(report, kind).append(content)
    for kind, case, provider in begun:
        reason = f"its process ended here ({status})" if status != "ok" else "its process ended here"
        rows[kind].append(Row(case=case, provider=provider, status="failed", reason=reason))
    return report, summary


def row_from(entry: dict[str, Any]) -> Row:
    """A row as JSON has it; derived numbers are dropped."""
    known = {name: value for name, value in entry.items() if name in Row.__dataclass_fields__}
    return Row(**{**known, "case": Case(**entry["case"])})
