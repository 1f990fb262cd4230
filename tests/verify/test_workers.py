"""Workers: a result, a crash and a deadline are about the task that a worker was given and no other."""

import multiprocessing
import os
import sys
import time

import pytest

from prime_train.verify.workers import Died, Killed, Stopped, Task, Workers


def act(argument: str) -> object:
    """A worker's function: what the argument says."""
    if argument == "die":
        os._exit(3)
    if argument == "leave":
        sys.exit(0)
    if argument == "hang":
        time.sleep(60)
    if argument == "orphan":  # a child that keeps the worker's pipe open
        if os.fork() == 0:
            time.sleep(2)
        os._exit(4)
    if argument == "close":
        os.closerange(3, 256)
        time.sleep(60)
    return argument


@pytest.fixture
def stop():
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def workers():
    workers = Workers(2, act, multiprocessing.get_context("forkserver"))
    yield workers
    workers.stop()


def run(workers, stop, arguments):
    # Only what never ends is ended: a slow machine must not look like a hanging task.
    tasks = [Task(i, argument, 1.0 if argument == "hang" else 60.0) for i, argument in enumerate(arguments)]
    return dict(workers.run(tasks, stop[0]))


def test_a_death_is_laid_to_the_task_that_died_however_late_it_is_seen(workers, stop):
    """Who looks is slow: the worker has answered, taken the next task and died before anything is read."""
    arguments = ["a", "die", "b", "leave", "c", "die", "orphan", "close", "d"] * 2
    tasks = (Task(i, argument, 30.0) for i, argument in enumerate(arguments))
    found = {}
    for key, result in workers.run(tasks, stop[0]):
        time.sleep(0.05)
        found[key] = result
    for at, argument in enumerate(arguments):
        expected = {"die": Died(3), "leave": Died(0), "orphan": Died(4)}.get(argument, argument)
        assert isinstance(found[at], Died) if argument == "close" else found[at] == expected, at


def test_a_deadline_ends_its_task_alone(workers, stop):
    found = run(workers, stop, ["a", "hang", "b", "c"])
    assert isinstance(found.pop(1), Killed)
    assert found == {0: "a", 2: "b", 3: "c"}


def test_a_worker_that_ended_between_two_runs_costs_nothing(workers, stop):
    assert run(workers, stop, ["a", "b"]) == {0: "a", 1: "b"}
    for worker in filter(lambda worker: worker.ready, workers._workers):
        worker.process.kill()
        worker.process.join()
    assert run(workers, stop, ["c", "d"]) == {0: "c", 1: "d"}


def test_who_is_gone_stops_a_run_at_once(workers, stop):
    stop[1].close()
    start = time.monotonic()
    with pytest.raises(Stopped):
        run(workers, stop, ["hang", "hang"])
    assert time.monotonic() - start < 20


def test_a_process_that_cannot_start_is_an_error_and_no_loop(stop):
    workers = Workers(1, os.getpid, multiprocessing.get_context("forkserver"))
    workers._workers[0].process.kill()
    with pytest.raises(RuntimeError, match="before it had anything to do"):
        run(workers, stop, ["a"])
    workers.stop()
