"""The benchmarks run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_speed_times_every_provider_of_every_op(tmp_path):
    out = tmp_path / "speed.json"
    printed = run(
        "benchmarks.speed", "--device", "cpu", "--shape", "64", "16", "128", "--repeats", "2", "--json", str(out)
    )
    assert "failed" not in printed
    timings = json.loads(out.read_text())["timings"]
    found = {(t["op"], t["provider"]) for t in timings}
    assert {("gemm", "torch"), ("forward", "torch"), ("ppo", "two-pass")} <= found
    for op in ("logprob", "frozen", "token", "ppo", "prm"):
        assert {(op, "torch"), (op, "eager"), (op, "compiled")} <= found
    assert all(t["ms"] > 0 and t["flops"] > 0 and t["bytes"] > 0 for t in timings)
