"""The tests' own processes: ranks find each other, and what becomes of them is told."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from prime_train.models.distributed import joined
from tests.support.processes import ProcessFailed, run_alone, run_ranks, started_ranks

CPU = torch.device("cpu")


def summed(value):
    with joined(CPU, replicas=1, patience=20, sharded=False) as world:
        print("here is", world.rank)
        return world.rank, world.sum(torch.tensor([float(value + world.rank)])) if world.size > 1 else value


def failing(rank):
    if int(os.environ["RANK"]) == rank:
        raise ValueError(f"rank {rank} is out of sorts")
    dist.init_process_group("gloo")


def killed():
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def idle():
    time.sleep(1000)


def test_ranks_return_by_rank_what_they_computed_together():
    assert run_ranks(3, summed, 10) == [(rank, torch.tensor([33.0])) for rank in range(3)]
    assert run_ranks(1, summed, 10) == [(0, 10)]


def test_ranks_are_there_within_tenths_of_a_second():
    run_ranks(1, abs, -1)
    began = time.monotonic()
    assert run_ranks(2, abs, -1) == [1, 1]
    assert time.monotonic() - began < 3  # of a machine that does other things too


def test_the_error_of_a_rank_is_shown_and_ends_the_others():
    with pytest.raises(ProcessFailed, match="rank 1 is out of sorts"):
        run_ranks(2, failing, 1)


def test_a_rank_that_does_not_end_is_shown_and_killed():
    with pytest.raises(ProcessFailed, match="rank 0: still running"):
        run_ranks(1, idle, deadline=0.2)
    with started_ranks(1, idle) as [rank]:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(rank.pid, 0)


def test_a_process_that_is_killed_leaves_its_signal_and_its_last_words():
    ended = run_alone(killed)
    assert (ended.code, ended.output) == (-signal.SIGKILL, "last words\n")
