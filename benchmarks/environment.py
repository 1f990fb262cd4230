"""What a run ran on: hardware, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.pages import ROOT
from benchmarks.providers.wheels import FOLDER

PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy", "trl", "verl", "fla-core")


def describe(device: torch.device) -> dict[str, str]:
    """Everything that a reader of the numbers must know, as text."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["processors"] = str(properties.multi_processor_count)
        found["cuda"] = str(torch.version.cuda)
    return found | {name: version for name in PACKAGES if (version := installed_version(name))}


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    name = named.group(1) if named else platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def installed_version(name: str) -> str | None:
    """Of the package in the environment, or else in the folder of wheels."""
    found = importlib.metadata.Distribution.discover(name=name, path=[*sys.path, str(FOLDER)])
    return next((distribution.version for distribution in found), None)


def commit() -> str:
    """The commit of the tree, marked where files differ from it; "unknown" where git does not say."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head} with changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
