"""The engine over servers that answer by the book, and what it does when they do not; no vLLM needed."""

import asyncio
import json
import math
import re
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest

from prime_train.rollout.vllm import client
from prime_train.rollout.vllm.engine import CONCURRENCY, VLLMEngine
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.transport import FileTransport
from prime_train.run.interrupt import Interrupted
from tests.support.fake_vllm import EOS, GENERATE, FakeVLLM, fake_vllm, faulty_proxy, serving
from tests.support.tiny import model

PROMPTS = [[7, 8, 9], [10], [11, 12]]
DEADLINE = 3.0


@contextmanager
def engine_over(tmp_path, *urls, deadline=DEADLINE, net=None):
    with VLLMEngine(
        net or model(), FileTransport(tmp_path), eos=[EOS], deadline=deadline, urls=urls
    ) as engine:  # fmt: skip
        yield engine


@pytest.fixture
def behind_proxy(tmp_path):
    """An engine that was refreshed, the fake behind it, and the faults between them."""
    with fake_vllm() as (target, fake), faulty_proxy(target) as (url, faults), engine_over(tmp_path, url) as engine:
        engine.refresh(0)
        yield engine, fake, faults, url


def sample(engine, prompts=PROMPTS, n=2, progress=lambda tokens: None):
    return engine.sample(
        prompts, n=n, temperature=1.0, max_tokens=8, seeds=list(range(len(prompts))), progress=progress
    )


def tokens_of(found):
    return [[response.tokens for response in group] for group in found]


WANT = [[(*prompt, EOS)] * 2 for prompt in PROMPTS]


def test_each_prompt_gets_its_own_n_responses_in_order(behind_proxy):
    engine, *_ = behind_proxy
    found = sample(engine)
    assert tokens_of(found) == WANT
    assert all(response.finished for group in found for response in group)
    assert found[0][0].logp == (-0.5,) * 4


def test_no_proxy_of_the_environment_stands_between(behind_proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert tokens_of(sample(behind_proxy[0])) == WANT


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        *((path, fault) for path in (GENERATE, "/weight_info") for fault in ("500", "truncated", "cut", "hang")),
        *(("/collective_rpc", fault) for fault in ("500", "truncated", "cut")),
    ],
)
def test_a_passing_fault_is_survived(behind_proxy, fault, path):
    engine, _, faults, _ = behind_proxy
    faults.at(path, fault, *([] if fault == "hang" else [fault]))
    engine.refresh(1)
    assert tokens_of(sample(engine)) == WANT
    assert set(faults.happened) == {fault}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "500: out of luck"),
        ("truncated", "what is no JSON object"),
        ("cut", "Error: "),
        ("hang", "no answer within 1.5 s"),
    ],
)
def test_a_lasting_fault_is_given_up_in_time_with_the_url_and_the_last_error(behind_proxy, fault, message):
    engine, _, faults, url = behind_proxy
    faults.at(GENERATE, f"always {fault}")
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"given up after 3 s; the last error: ") as error:
        sample(engine)
    assert url in str(error.value)
    assert message in str(error.value)
    assert DEADLINE / 2 < time.monotonic() - began < 2 * DEADLINE


class Loading(FakeVLLM):
    """Takes its time to load, one request after the other, and does not stop when nobody listens any more."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.one_at_a_time = seconds, threading.Lock()

    def answer(self, path, body):
        if path == "/collective_rpc":
            with self.one_at_a_time:
                time.sleep(self.seconds)
        return super().answer(path, body)


def test_a_load_may_take_nearly_all_of_the_deadline_and_is_asked_for_once(tmp_path):
    fake = Loading(0.8 * DEADLINE)
    with serving(fake.respond) as url, engine_over(tmp_path, url) as engine:
        engine.refresh(0)
    assert fake.asked.count("/collective_rpc") == 1


def test_a_load_that_takes_longer_is_given_up_with_the_url(tmp_path):
    fake = Loading(0.8)
    wanted = "given up after 0.4 s.*/collective_rpc: no answer within 0.4 s"
    with (
        serving(fake.respond) as url,
        engine_over(tmp_path, url, deadline=0.4) as engine,
        pytest.raises(ServerError, match=wanted),
    ):
        engine.refresh(0)


def test_what_fails_for_many_prompts_alike_is_said_once(behind_proxy, monkeypatch, caplog):
    monkeypatch.setattr(client, "QUIET_S", 0.2)
    engine, _, faults, url = behind_proxy
    faults.at(GENERATE, "always 500")
    with pytest.raises(ServerError):
        sample(engine, PROMPTS * 5)
    [said] = [record.getMessage() for record in caplog.records]
    assert re.match(f"asking again for up to 3 s: POST {url}{GENERATE}: 500: out of luck", said)


class GatheringLate:
    """A transport that gathers the weights in the middle of loading them."""

    def __init__(self, events):
        self.events = events

    def publish(self, weights):
        self.weights = weights

    async def load(self, servers, version):
        await asyncio.sleep(0.6)
        for _ in self.weights.tensors:
            pass
        self.events.append("gathered")
        await asyncio.sleep(0.6)

    async def close(self, servers):
        pass


def test_whoever_gathers_along_hears_of_waiting_once_all_is_gathered():
    events = []
    with fake_vllm() as (url, fake):
        fake.delay = 0.6
        waiting = lambda: events.append("waits")  # noqa: E731
        with VLLMEngine(
            model(), GatheringLate(events), eos=[EOS], deadline=DEADLINE, urls=[url], waiting=waiting
        ) as engine:  # fmt: skip
            engine.refresh(0)
            assert events[0] == "gathered"
            assert events.count("waits") >= 2
            events.clear()
            sample(engine)
            assert events.count("waits") >= 2


def test_nobody_there_is_said_with_the_url(tmp_path):
    wanted = r"given up after 0.5 s; .*http://127.0.0.1:9/collective_rpc"
    nobody = engine_over(tmp_path, "http://127.0.0.1:9", deadline=0.5)
    with nobody as engine, pytest.raises(ServerError, match=wanted):
        engine.refresh(0)


def test_what_the_server_refuses_is_not_asked_again(tmp_path):
    asked = []

    def refusing(method, path, body):
        asked.append(path)
        return 403, b"not with this token"

    wanted = "POST .*/collective_rpc: 403: not with this token"
    with serving(refusing) as url, engine_over(tmp_path, url) as engine, pytest.raises(ServerError, match=wanted):
        engine.refresh(0)
    assert asked == ["/collective_rpc"]


# -- length --


def test_a_response_that_the_server_cut_off_early_is_an_error_that_names_the_option(behind_proxy):
    engine, fake, _, url = behind_proxy
    fake.model_config["max_model_len"] = 5
    fake.asked.clear()
    wanted = rf"{url}: a response to 3 tokens was cut off after 2 of 8: the server's --max-model-len is too small"
    with pytest.raises(ServerError, match=wanted):
        sample(engine, [[7, 8, 9]])
    assert fake.asked == [GENERATE]


def test_a_response_cut_off_where_the_model_ends_or_at_max_tokens_is_a_truncated_one(behind_proxy):
    engine, fake, _, _ = behind_proxy
    fake.model_config["max_model_len"] = engine.policy.transformer.config.max_position_embeddings = 5
    [group] = sample(engine, [[7, 8, 9]])
    assert [(response.tokens, response.finished) for response in group] == [((7, 8), False)] * 2
    fake.model_config["max_model_len"] = 3
    [[response]] = engine.sample([[7]], n=1, temperature=1.0, max_tokens=2, seeds=[0])
    assert (response.tokens, response.finished) == ((7, EOS), True)
    fake.model_config["max_model_len"] = 4
    [[response]] = engine.sample([[7, 8]], n=1, temperature=1.0, max_tokens=2, seeds=[0])
    assert (response.tokens, response.finished) == ((7, 8), False)


# -- versions --


def test_a_refresh_loads_the_new_weights_then_forgets_the_cache_then_names_the_version(behind_proxy):
    engine, fake, _, _ = behind_proxy
    fake.asked.clear()
    engine.refresh(5)
    assert fake.asked == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info"]
    assert fake.version.endswith("/5")
    assert len(set(fake.loaded)) == 2


def test_a_version_that_is_read_back_wrong_is_refused(behind_proxy):
    engine, _, faults, url = behind_proxy
    faults.at("/weight_info", "stale")
    with pytest.raises(ServerError, match=f"{url} says that it serves weights stale after it was given .*/1"):
        engine.refresh(1)


def test_rollouts_of_another_version_are_refused(behind_proxy):
    engine, fake, faults, url = behind_proxy
    faults.at(GENERATE, "stale")
    with pytest.raises(ServerError, match=f"{url}: a response from weights stale was refused"):
        sample(engine)
    fake.version = "default"  # as after a restart that nobody told of
    with pytest.raises(ServerError, match="a response from weights default was refused"):
        sample(engine)


def test_another_runs_weights_of_the_same_step_are_another_version(tmp_path):
    with fake_vllm() as (url, _), engine_over(tmp_path, url) as one, engine_over(tmp_path, url) as other:
        one.refresh(3)
        other.refresh(3)
        with pytest.raises(ServerError, match="was refused"):
            sample(one)


def test_sampling_before_a_refresh_is_refused(tmp_path):
    with engine_over(tmp_path, "http://127.0.0.1:9") as engine, pytest.raises(ServerError, match="must be refreshed"):
        sample(engine)


# -- several servers, many requests --


def test_two_servers_share_the_load_and_both_are_refreshed(tmp_path):
    with fake_vllm() as (a, first), fake_vllm() as (b, second), engine_over(tmp_path, a, b) as engine:
        first.delay = second.delay = 0.02
        engine.refresh(1)
        found = sample(engine, [[7]] * 20, n=1)
    assert tokens_of(found) == [[(7, EOS)]] * 20
    assert first.version == second.version
    shares = [fake.asked.count(GENERATE) for fake in (first, second)]
    assert sum(shares) == 20
    assert min(shares) >= 7


def test_what_fails_at_one_server_is_asked_of_another(tmp_path):
    with fake_vllm() as (a, healthy), fake_vllm() as (b, _), faulty_proxy(b) as (broken, faults):
        faults.at(GENERATE, "always 500")
        with engine_over(tmp_path, broken, a) as engine:
            engine.refresh(1)
            assert tokens_of(sample(engine)) == WANT
    assert healthy.asked.count(GENERATE) == 3


def test_requests_at_a_time_are_bounded(tmp_path):
    with fake_vllm() as (url, fake), engine_over(tmp_path, url, deadline=20) as engine:
        fake.delay = 0.05
        engine.refresh(0)
        sample(engine, [[7]] * (CONCURRENCY + 30), n=1)
    assert 1 < fake.most_running <= CONCURRENCY


def test_what_progress_raises_stops_the_sampling_soon(behind_proxy):
    engine, fake, _, _ = behind_proxy
    fake.delay = 1.0
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()

    def check(tokens):
        if stop.is_set():
            raise Interrupted

    began = time.monotonic()
    with pytest.raises(Interrupted):
        sample(engine, [[7]] * 500, progress=check)
    assert time.monotonic() - began < 2


def test_progress_is_told_every_token(behind_proxy):
    told = []
    sample(behind_proxy[0], progress=told.append)
    assert sum(told) == 2 * sum(len(prompt) + 1 for prompt in PROMPTS)


# -- what is asked for, what is made of the answers --


def test_requests_leave_nothing_to_the_servers_defaults(tmp_path):
    bodies = []

    def recording(method, path, body):
        bodies.append(body)
        return fake_answer(method, path, body)

    with fake_vllm() as (target, _), serving(recording) as url, engine_over(tmp_path, url) as engine:
        fake_answer = forwarding(target)
        engine.refresh(0)
        sample(engine)
    asked = [json.loads(body)["sampling_params"] for body in bodies if b"token_ids" in body]
    for params in asked:
        assert params["stop_token_ids"] == [EOS]
        assert params["ignore_eos"] is True
        assert (params["top_p"], params["top_k"], params["min_p"], params["repetition_penalty"]) == (1, 0, 0, 1)
        assert (params["presence_penalty"], params["frequency_penalty"], params["logprobs"]) == (0, 0, 0)
    assert len({params["seed"] for params in asked}) == len(PROMPTS)


def forwarding(target):
    def answer(method, path, body):
        request = urllib.request.Request(target + path, data=body or None, method=method)
        with urllib.request.urlopen(request) as found:
            return 200, found.read()

    return answer


def test_an_unknown_log_prob_is_nan(behind_proxy):
    engine, fake, _, _ = behind_proxy
    generate = fake.generate

    def without(body):
        answer = generate(body)
        for choice in answer["choices"]:
            choice["logprobs"]["content"][0]["logprob"] = None
        return answer

    fake.generate = without
    [[response, _], *_] = sample(engine)
    assert math.isnan(response.logp[0])
    assert response.logp[1] == -0.5
