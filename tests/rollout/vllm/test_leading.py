"""vLLM for a run over several processes: one asks, all have the answers, and nobody waits for ever."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
import torch

from prime_train.models.distributed import joined
from prime_train.models.snapshot import Weights
from prime_train.rollout.vllm import engine, leading
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.leading import LeadingEngine
from prime_train.rollout.vllm.transport import FileTransport
from prime_train.run.checkpoints import progress_at
from prime_train.run.directory import read_records
from tests.rollout.test_ahead import Gibberish
from tests.support.fake_vllm import GENERATE, FakeVLLM, serving
from tests.support.processes import run_ranks, started_ranks
from tests.support.runs import config_file, run
from tests.support.tiny import model, saved_model


@pytest.fixture
def server() -> Iterator[tuple[str, FakeVLLM]]:
    fake = Gibberish()
    with serving(fake.respond) as url:
        yield url, fake


def words(directory: Path, url: str, *more: str, patience: float = 30.0) -> list[str]:
    start = saved_model(directory / "model")
    path = config_file(directory, start, vllm={"servers": url}, run={"patience": patience})
    return ["run", path, "--rollout.engine", "vllm", *more]


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_process_asks_the_servers_and_all_train_on_the_answers(tmp_path, server, ahead):
    url, fake = server
    steps = words(tmp_path, url, "--run.steps", "3", "--rollout.ahead", str(ahead), "--eval.every", "0")
    assert run_ranks(2, run, steps, deadline=100.0) == [0, 0]
    assert fake.version.endswith("/3")
    assert len(fake.loaded) == 4  # before the first step, and after each
    prompts = 1 + 3 * 2 + 2 * 2 * 3  # of a look at the server, the steps, and two evaluations, greedy and sampled
    assert fake.asked.count(GENERATE) == prompts
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record.get("rollout/lag") for record in records] == [None, 0, ahead, ahead]
    assert progress_at(tmp_path / "run" / "checkpoints" / "step-000003").position == 6


def run_with_few_requests_at_a_time(words: list[str]) -> int:
    engine.CONCURRENCY = 4
    return run(words)


@pytest.mark.slow
def test_sampling_may_last_longer_than_processes_are_waited_for(tmp_path, server):
    url, fake = server
    fake.delay, patience = 0.5, 6.0
    steps = words(
        tmp_path, url, "--run.steps", "1", "--rollout.prompts", "64", "--rollout.samples", "2", "--eval.prompts", "1",
        "--filter.max_prompts", "1", "--policy.mini_batch", "128", "--prm.mini_batch", "128", patience=patience,
    )  # fmt: skip
    assert run_ranks(2, run_with_few_requests_at_a_time, steps, deadline=120.0) == [0, 0]
    assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["time/rollout"] > patience


def test_a_server_that_fails_ends_all_processes_and_is_named(tmp_path, server):
    url, fake = server
    fake.delay = 60.0
    with started_ranks(2, run, words(tmp_path, url, patience=4.0)) as ranks:
        ended = [rank.wait(60.0) for rank in ranks]
    for end in ended:
        assert (end.code, end.result) == (0, 1), end
        assert url in end.output


def run_without_shared_memory(words: list[str]) -> int:
    def full(transport: FileTransport, weights: Weights) -> None:
        next(iter(weights.tensors))
        raise OSError(28, "No space left on device")

    FileTransport.publish = full  # type: ignore[assignment]
    return run(words)


def test_weights_that_cannot_be_published_end_all_processes_at_once(tmp_path, server):
    url, _ = server
    with started_ranks(2, run_without_shared_memory, words(tmp_path, url, patience=60.0)) as ranks:
        ended = [rank.wait(30.0) for rank in ranks]
    for end in ended:
        assert end.code == 1
        assert "No space left on device" in end.error


class Slow:
    """An engine of the process that leads, whose work takes longer than processes wait for each other."""

    def __init__(self, waiting: Callable[[], None], seconds: float, events: Path) -> None:
        self.waiting, self.seconds, self.events = waiting, seconds, events

    def wait(self) -> None:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self.waiting()
            time.sleep(0.02)

    def __enter__(self) -> Self:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refresh(self, version: int) -> None:
        self.waiting()  # before servers take memory
        noted(self.events, "taken")
        self.wait()

    def rest(self) -> None:
        self.wait()
        raise ServerError("no rest")

    def sample(self, prompts: list[list[int]], *, progress: Callable[[int], None], **_: object) -> list[str]:
        progress(7)
        self.wait()
        return ["sampled"] * len(prompts)


def noted(events: Path, what: str) -> None:
    with events.open("a") as file:
        file.write(f"{what}\n")


def led(events: Path) -> list[object]:
    def release() -> None:
        time.sleep(0.3)
        noted(events, "released")

    leading.release_memory = release
    found: list[object] = []
    with (
        joined(torch.device("cpu"), replicas=1, patience=2.0, sharded=False) as world,
        LeadingEngine(lambda waiting: Slow(waiting, 3.0, events), model(), world) as engine,  # type: ignore[arg-type, return-value]
    ):
        engine.refresh(1)
        options = {"n": 1, "temperature": 1.0, "max_tokens": 4, "seeds": [0]}
        found.extend(engine.sample([[6], [7]], progress=found.append, **options))  # type: ignore[arg-type]
        try:
            engine.rest()
        except ServerError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_whatever_servers_take_longer_for_than_processes_wait_is_waited_for_by_all(tmp_path):
    leader, other = run_ranks(2, led, tmp_path / "events")
    assert leader == [7, "sampled", "sampled", "no rest"]
    assert other[-3:] == ["sampled", "sampled", "no rest"]
    assert len(other) > 5  # signs of life, at each of which the other process may stop the sampling
    assert set(other[:-3]) == {0}
    # Before a server is started, and before one takes memory in a refresh.
    assert (tmp_path / "events").read_text().split() == ["released", "released", "taken"]
