"""vLLM for a run over several processes: one asks, all have the answers, and nobody waits for ever."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prime_train.checkpoints import progress_at
from prime_train.rundir import read_records
from prime_train.snapshot import Weights
from prime_train.vllm.transport import FileTransport

from .fake_vllm import GENERATE, FakeVLLM, serving
from .processes import run_ranks, started_ranks
from .test_train_ahead import Gibberish
from .test_train_distributed import run
from .test_train_run import config_file
from .tiny import saved_model


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


@pytest.mark.slow
def test_sampling_may_last_longer_than_processes_are_waited_for(tmp_path, server):
    url, fake = server
    fake.delay, patience = 0.5, 3.0
    steps = words(
        tmp_path, url, "--run.steps", "1", "--rollout.prompts", "450", "--rollout.samples", "2", "--eval.prompts", "1",
        "--filter.max_prompts", "1", "--model.tokens_per_micro_batch", "32768", "--policy.mini_batch", "900",
        "--prm.mini_batch", "900", patience=patience,
    )  # fmt: skip
    with started_ranks(2, run, steps) as ranks:
        for rank in ranks:
            ended = rank.wait(120.0)
            assert (ended.code, ended.result) == (0, 0), ended
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
