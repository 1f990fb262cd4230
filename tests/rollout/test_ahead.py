"""Batches in turn with training, or one ahead of it."""

import os
import signal
import time

import pytest

from prime_train import cli, prime
from prime_train.rollout.ahead import Ahead
from prime_train.rollout.vllm.client import Server
from prime_train.run.checkpoints import progress_at
from prime_train.run.directory import read_records
from prime_train.run.interrupt import Interrupted
from tests.support.fake_vllm import GENERATE, FakeVLLM, serving
from tests.support.runs import config_file, figures
from tests.support.tiny import saved_model


def nothing():
    pass


def batches(made, ahead, last=9, check=nothing):
    def collect(step, check):
        made.append(step)
        return f"batch {step}"

    return Ahead(collect, check, ahead=ahead, last=last)


def test_in_turn_a_batch_is_made_when_it_is_taken():
    made = []
    with batches(made, 0) as found:
        found.begin(1)
        assert made == []
        assert found.take(1) == ("batch 1", 0)
        assert made == [1]


def test_one_ahead_the_next_batch_is_made_meanwhile_and_its_weights_are_a_step_older():
    made = []
    with batches(made, 1) as found:
        assert found.take(1) == ("batch 1", 0)
        found.begin(2)
        found.settle()
        assert made == [1, 2]
        assert found.take(2) == ("batch 2", 1)
        assert found.take(3) == ("batch 3", 0)  # nothing was begun: made now, from the weights as they are


def test_nothing_is_begun_beyond_the_last_step():
    made = []
    with batches(made, 1, last=2) as found:
        found.begin(3)
        found.settle()
    assert made == []


def test_what_went_wrong_is_told_by_take_and_not_before():
    def failing(step, check):
        raise ZeroDivisionError

    with Ahead(failing, nothing, ahead=1, last=9) as found:
        found.begin(2)
        found.settle()
        with pytest.raises(ZeroDivisionError):
            found.take(2)


def test_leaving_stops_a_batch_that_nobody_takes():
    ended = []

    def endless(step, check):
        try:
            while True:
                check()
                time.sleep(0.01)
        except Interrupted:
            ended.append(step)
            raise

    with Ahead(endless, nothing, ahead=1, last=9) as found:
        found.begin(2)
    assert ended == [2]


# -- whole runs, on a server without a model: it answers with random characters --


class Gibberish(FakeVLLM):
    """Responses of other lengths each time, so that some outcomes are right."""

    def generate(self, body):
        with self.lock:
            self.running += 1
        answer = super().generate(body | {"token_ids": body["token_ids"][:2]})
        for choice in answer["choices"]:
            keep = 1 + (choice["index"] + self.running) % 3
            choice["token_ids"] = choice["token_ids"][-keep:]
            choice["logprobs"]["content"] = choice["logprobs"]["content"][-keep:]
        return answer


@pytest.fixture
def run(tmp_path):
    """A run's directory, and what runs it with some words."""
    fake, start = Gibberish(), saved_model(tmp_path / "model")
    with serving(fake.respond) as url:

        def go(*words):
            path = config_file(tmp_path, start, vllm={"servers": url}, run={"patience": 20.0})
            return cli.main(["run", path, "--rollout.engine", "vllm", *words])

        yield tmp_path, go, fake


def test_a_run_one_ahead_records_its_lag_and_samples_each_batch_from_the_weights_before(run, monkeypatch):
    directory, go, fake = run
    assert go("--rollout.ahead", "1", "--run.steps", "4") == 0
    records = figures(directory)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["rollout/lag"] for record in records[1:]] == [0, 1, 1, 1]
    assert fake.version.endswith("/4")


def test_a_run_in_turn_has_no_lag(run):
    directory, go, _ = run
    assert go("--run.steps", "2") == 0
    assert [record["rollout/lag"] for record in figures(directory)[1:]] == [0, 0]


def test_a_checkpoint_leaves_out_the_prompts_of_the_batch_that_is_ahead(run):
    directory, go, _ = run
    assert go("--rollout.ahead", "1", "--run.steps", "3", "--run.keep_checkpoints", "9") == 0
    found = [progress_at(path).position for path in sorted((directory / "run" / "checkpoints").iterdir())]
    assert found == [2, 4, 6]


def test_weights_do_not_change_under_a_batch_that_is_being_sampled(run, monkeypatch):
    _, go, fake = run
    fake.delay = 0.2
    overlapped = []
    attempt = Server.attempt

    async def watching(self, method, path, *body, **limit):
        if path == "/collective_rpc":
            overlapped.append(bool(sampling))
        if path == GENERATE:
            sampling.append(1)
        try:
            return await attempt(self, method, path, *body, **limit)
        finally:
            if path == GENERATE:
                sampling.pop()

    sampling = []
    monkeypatch.setattr(Server, "attempt", watching)
    assert go("--rollout.ahead", "1", "--run.steps", "3") == 0
    assert len(overlapped) == 4
    assert not any(overlapped)


def test_ctrl_c_with_a_batch_ahead_saves_and_goes_on(run, monkeypatch):
    directory, go, fake = run
    update = prime.policy.update

    def ctrl_c(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prime.policy, "update", ctrl_c)
        assert go("--rollout.ahead", "1", "--run.steps", "3") == 130
    assert [record["step"] for record in read_records(directory / "run" / "metrics.jsonl")] == [0, 1]
    fake.version = "default"  # the server was started anew meanwhile: on resume the first thing is a refresh
    assert go("--rollout.ahead", "1", "--run.steps", "3") == 0
    assert [record["step"] for record in read_records(directory / "run" / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_server_that_fails_for_good_ends_the_run_with_its_url_and_the_run_can_go_on(run):
    directory, go, fake = run
    generate, calls = fake.generate, []

    def failing(body):
        calls.append(1)
        if len(calls) > 20:
            raise KeyError("anything")
        return generate(body)

    fake.generate = failing
    assert go("--run.steps", "6") == 1
    done = read_records(directory / "run" / "metrics.jsonl")[-1]["step"]
    assert 1 <= done < 6
    fake.generate = generate
    assert go("--run.steps", "6") == 0
    assert [record["step"] for record in read_records(directory / "run" / "metrics.jsonl")] == list(range(7))
