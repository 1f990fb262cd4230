"""Time, throughput, MFU and peak memory of a step by stage."""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from prime_train.models.distributed import World, joined
from prime_train.show.measures import Clock
from tests.support.processes import run_ranks
from tests.support.tiny import CPU

STAGES = """
import torch
from prime_train.show.measures import Clock
clock = Clock()
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
    clock = Clock()
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
    clock = Clock()
    clock.seconds = {"rollout": 10.0, "score": 1.0, "prm": 2.0, "policy": 4.0}
    figures = clock.figures(tokens=70, flops={"score": 1e9, "prm": 4e9, "policy": 4e9}, peak=4e9)
    assert figures["throughput/mfu_score"] == pytest.approx(0.25)
    assert figures["throughput/mfu_prm"] == pytest.approx(0.5)
    assert figures["throughput/mfu_policy"] == pytest.approx(0.25)
    assert figures["throughput/mfu"] == pytest.approx(9 / 7 / 4)
    assert figures["throughput/tokens_per_s"] == pytest.approx(70 / 17)
    assert figures["time/step"] == 17


def test_what_comes_after_the_figures_is_in_the_next_ones():
    clock = Clock()
    with clock("policy"):
        pass
    assert "time/checkpoint" not in clock.figures(tokens=1)
    with clock("checkpoint"):
        time.sleep(0.01)
    figures = clock.figures(tokens=1)
    assert figures["time/step"] == figures["time/checkpoint"] > 0.005
    assert figures["memory/checkpoint_gib"] > 0
    assert "time/policy" not in figures


def uneven():
    with joined(CPU, replicas=1, patience=30, sharded=False) as world:
        clock = Clock(world)
        clock.seconds = {"score": 1.0 + world.rank, "policy": 4.0 - world.rank}
        clock.peaks = {"score": 3.0 - world.rank, "policy": 0.5}
        return clock.figures(tokens=50, flops={"policy": 8.0}, peak=4.0)


def test_of_several_processes_the_slowest_and_the_fullest_count():
    for figures in run_ranks(2, uneven):
        assert (figures["time/score"], figures["time/policy"], figures["time/step"]) == (2.0, 4.0, 5.0)
        assert (figures["memory/score_gib"], figures["memory/peak_gib"]) == (3.0, 3.0)
        assert figures["throughput/mfu_policy"] == pytest.approx(0.5)


def test_a_stage_that_takes_nearly_the_patience_is_named_on_stderr_once_and_goes_on(capsys):
    clock = Clock(World(rank=1, size=2, timeout=timedelta(seconds=0.2)))
    clock.step = 3
    with clock("score"):
        pass
    with clock("policy"):
        time.sleep(0.5)
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "in stage 'policy' of step 3, process 1 of 2, for 0.18 s now; no process waits for another longer than 0.2 s"
    ]


def test_a_process_alone_waits_for_nobody_and_says_nothing(capsys):
    with Clock(World(timeout=timedelta(seconds=0.02)))("policy"):
        time.sleep(0.1)
    assert not capsys.readouterr().err


def test_what_a_stage_raises_is_told_with_its_name():
    clock = Clock(World(rank=1, size=2))
    clock.step = 3
    with pytest.raises(ValueError, match="7") as raised, clock("policy"):
        raise ValueError(7)
    assert raised.value.__notes__ == ["in stage 'policy' of step 3, process 1 of 2"]


def test_stages_that_did_not_run_have_no_mfu():
    clock = Clock()
    with clock("rollout"):
        pass
    figures = clock.figures(tokens=0, flops={"policy": 1e9}, peak=1e9)
    assert not any("mfu" in name for name in figures)
    assert not any("mfu" in name for name in clock.figures(tokens=0))
