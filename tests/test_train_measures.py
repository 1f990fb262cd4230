"""Time, throughput, MFU and peak memory of a step by stage."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prime_train.measures import Clock

CPU = torch.device("cpu")


STAGES = """
import torch
from prime_train.measures import Clock
clock = Clock(torch.device("cpu"))
with clock("score"):
    held = torch.ones(64 << 20)
    del held
with clock("policy"):
    pass
figures = clock.figures(tokens=1)
print(figures["memory/score_gib"], figures["memory/policy_gib"], figures["memory/peak_gib"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory_is_a_stage_s_own():
    # In a process of its own: in this one, other tests may have had the allocator keep what is freed.
    done = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, text=True, check=True)
    score, policy, peak = map(float, done.stdout.split())
    assert score > policy + 0.2
    assert peak == score


def test_a_stage_that_comes_twice_keeps_its_larger_peak_and_both_times():
    clock = Clock(CPU)
    peaks = []
    for size in (32 << 20, 1):
        with clock("rollout"):
            held = torch.ones(size)
            time.sleep(0.01)
            del held
        peaks.append(clock.peaks["rollout"])
    assert peaks[1] >= peaks[0]
    assert clock.figures(tokens=1)["time/rollout"] > 0.02


def test_mfu_is_model_flops_over_time_and_peak():
    clock = Clock(CPU)
    clock.seconds = {"rollout": 10.0, "score": 1.0, "prm": 2.0, "policy": 4.0}
    figures = clock.figures(tokens=70, flops={"score": 1e9, "prm": 4e9, "policy": 4e9}, peak=4e9)
    assert figures["throughput/mfu_score"] == pytest.approx(0.25)
    assert figures["throughput/mfu_prm"] == pytest.approx(0.5)
    assert figures["throughput/mfu_policy"] == pytest.approx(0.25)
    assert figures["throughput/mfu"] == pytest.approx(9 / 7 / 4)
    assert figures["throughput/tokens_per_s"] == pytest.approx(70 / 17)
    assert figures["time/step"] == 17


def test_stages_that_did_not_run_have_no_mfu():
    clock = Clock(CPU)
    with clock("rollout"):
        pass
    figures = clock.figures(tokens=0, flops={"policy": 1e9}, peak=1e9)
    assert not any("mfu" in name for name in figures)
    assert not any("mfu" in name for name in clock.figures(tokens=0))
