"""Rollouts from a real vLLM on the CPU; `make vllm-cpu` builds what it needs."""

import json
import os
import signal
import time
from pathlib import Path

import httpx2
import pytest
import torch

from prime_train import cli
from prime_train.algorithm.scoring import token_logp
from prime_train.config.keys import Config
from prime_train.models.packing import pack_sequences
from prime_train.rollout.sampler import GREEDY, LocalEngine
from prime_train.rollout.vllm import ipc, nccl
from prime_train.rollout.vllm.engine import VLLMEngine
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.guard import descendants
from prime_train.rollout.vllm.ipc import ALLOW_PICKLES, IpcTransport
from prime_train.rollout.vllm.nccl import NcclTransport
from prime_train.rollout.vllm.probe import served_version
from prime_train.rollout.vllm.server import ServerProcess, command_line
from prime_train.rollout.vllm.transport import FileTransport
from prime_train.run.directory import read_records
from prime_train.run.interrupt import Interrupted
from tests.support.fake_vllm import GENERATE, faulty_proxy
from tests.support.paths import ROOT
from tests.support.standin import file_buffers, standin_nccl, vllm_environment
from tests.support.tiny import EOS, WIDE, model, prompts, saved_model

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-vllm; make vllm-cpu"),
]
# vLLM's attention on a CPU takes heads of 32 dimensions and more.
SHAPE = "64x3x2"
MAX_TOKENS = 40
TOLERANCE = 1e-3
READY_S = 240.0


def process(directory, *options, **environment):
    start = saved_model(directory / "model", 1, SHAPE)
    command = command_line(
        str(PYTHON), start, dtype="float32", max_model_len=256, options=["--enforce-eager", *options]
    )  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment
    return ServerProcess(command, log=directory / "server.log", deadline=READY_S, environment=environment)


def transferring(directory, backend, library, *options, **environment):
    """A server whose weight transfer runs on a CPU; see tests/support/standin."""
    plugin = directory / "plugin"
    plugin.mkdir()
    environment |= vllm_environment(plugin, library)
    return process(directory, "--weight-transfer-config", json.dumps({"backend": backend}), *options, **environment)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server that all tests share."""
    server = process(tmp_path_factory.mktemp("vllm"))
    server.start()
    yield server.url
    server.stop()


def engine_on(net, *urls, eos=(EOS,), deadline=60.0, sleeps=False):
    return VLLMEngine(net, FileTransport(Path("/dev/shm")), eos=eos, deadline=deadline, urls=urls, sleeps=sleeps)


def asking(transport, *, longest=256):
    """A run with sequences of so many tokens."""
    sections = {
        "vllm": {"transport": transport},
        "data": {"max_prompt_tokens": longest - MAX_TOKENS},
        "rollout": {"max_tokens": MAX_TOKENS},
    }
    return Config.model_validate(sections | {"model": {"policy": "sft"}, "sft": {"base": f"tiny:{SHAPE}"}})


def sample(engine, asked, *, n=1, temperature=1.0, max_tokens=MAX_TOKENS, seed=0, progress=lambda tokens: None):
    return engine.sample(
        asked,
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        seeds=[seed * 1000 + i for i in range(len(asked))],
        progress=progress,
    )


def gap(net, asked, found, temperature=1.0):
    """Largest difference of the sampler's log-probs from the trainer's."""
    pairs = [(prompt, r.tokens) for prompt, group in zip(asked, found, strict=True) for r in group]
    logp, _ = token_logp(net, pack_sequences(pairs), WIDE, temperature=temperature)
    return float((torch.tensor([x for group in found for r in group for x in r.logp]) - logp).abs().max())


def moved(net, seed=0, by=0.1):
    """The model with other weights, as after training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return net


# -- what is sampled --


def test_greedy_tokens_and_their_log_probs_are_the_embedded_engines(url):
    net, asked = model(3, SHAPE), prompts(24)
    local = LocalEngine(net, eos=[EOS, 9], cache_bytes=2**28)
    with engine_on(net, url, eos=[EOS, 9]) as engine:
        engine.refresh(0)
        found, want = (sample(e, asked, temperature=GREEDY) for e in (engine, local))
    assert [g[0].tokens for g in found] == [g[0].tokens for g in want]
    assert [g[0].finished for g in found] == [g[0].finished for g in want]
    assert {g[0].finished for g in want} == {True, False}
    assert gap(net, asked, found) < TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_are_the_trainers(url, temperature):
    net, asked = model(4, SHAPE), prompts(16)
    with engine_on(net, url) as engine:
        engine.refresh(0)
        found = sample(engine, asked, n=4, temperature=temperature)
    assert gap(net, asked, found, temperature) < TOLERANCE
    for group in found:
        assert len({response.tokens for response in group}) > 1
        for response in group:
            assert EOS not in response.tokens[:-1]
            assert response.finished == (response.tokens[-1] == EOS)
            assert response.finished or len(response.tokens) == MAX_TOKENS


def test_a_seed_repeats_itself_and_another_does_not(url):
    net, asked = model(4, SHAPE), prompts(4)
    with engine_on(net, url) as engine:
        engine.refresh(0)
        first, again, other = (sample(engine, asked, n=2, seed=seed) for seed in (3, 3, 4))
    tokens = [[[r.tokens for r in g] for g in found] for found in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


# -- refreshes --


def test_after_a_refresh_the_served_log_probs_are_the_new_weights(url):
    net, asked = model(5, SHAPE), prompts(8)
    with engine_on(net, url) as engine:
        engine.refresh(0)
        sample(engine, asked)  # fills the prefix cache with keys and values of the old weights
        moved(net)
        stale = sample(engine, asked, n=2)
        assert gap(net, asked, stale) > 100 * TOLERANCE
        engine.refresh(1)
        assert gap(net, asked, sample(engine, asked, n=2)) < TOLERANCE


def test_weights_that_somebody_else_loaded_are_refused(url):
    with engine_on(model(6, SHAPE), url) as mine, engine_on(model(7, SHAPE), url) as other:
        mine.refresh(0)
        other.refresh(0)
        with pytest.raises(ServerError, match=rf"{url}: a response from weights \w+/0 was refused"):
            sample(mine, prompts(2))


def test_two_urls_share_the_load(url):
    net, asked = model(6, SHAPE), prompts(24)
    with faulty_proxy(url) as (a, _), faulty_proxy(url) as (b, faults), engine_on(net, a, b) as engine:
        engine.refresh(0)
        faults.at(GENERATE, *["500"] * 5)
        assert gap(net, asked, sample(engine, asked)) < TOLERANCE
        assert len(faults.happened) == 5


def test_two_servers_share_the_load_and_one_serves_on_when_the_other_is_killed(url, tmp_path):
    net, asked = moved(model(6, SHAPE), seed=3), prompts(48)
    other = process(tmp_path)
    other.start()
    try:
        # A server's first request is slow, and one that is given up is asked of the other server.
        with engine_on(net, url, other.url, deadline=300.0) as engine:
            engine.refresh(4)
            versions = [httpx2.get(f"{at}/weight_info").json()["weight_version"] for at in (url, other.url)]
            assert versions[0] == versions[1] == engine._version
            before = [requests_finished(at) for at in (url, other.url)]
            assert gap(net, asked, sample(engine, asked)) < TOLERANCE
            done = [requests_finished(at) - was for at, was in zip((url, other.url), before, strict=True)]
            assert sum(done) == 48
            assert min(done) > 12

            killed = []

            def kill(tokens):
                if not killed:
                    killed.extend(pid for pid in descendants(other._guard.pid) if is_api_server(pid))
                    os.kill(killed[0], signal.SIGKILL)

            found = sample(engine, asked, n=2, progress=kill)
            assert killed
            assert gap(net, asked, found) < TOLERANCE
            assert requests_finished(url) > before[0] + done[0]
    finally:
        other.stop()


def requests_finished(url):
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total{"))


def test_a_server_that_slept_serves_the_next_weights(url):
    """On a CPU vLLM's routes, its scheduler and its requests' fate are real; memory is not freed, and weights stay."""
    net, asked = model(6, SHAPE), prompts(8)
    with engine_on(net, url, sleeps=True) as engine:
        for step in range(2):
            engine.refresh(step)
            assert httpx2.get(f"{url}/is_sleeping").json() == {"is_sleeping": False}
            assert gap(net, asked, sample(engine, asked)) < TOLERANCE
            engine.rest()
            assert httpx2.get(f"{url}/is_sleeping").json() == {"is_sleeping": True}
            with pytest.raises(ServerError, match="must be refreshed"):
                sample(engine, asked)
            moved(net)
        engine.refresh(2)
        assert gap(net, asked, sample(engine, asked)) < TOLERANCE


# -- vLLM's own weight transfer, with stand-ins for what only a GPU has: see tests/support/standin --


def test_weights_broadcast_to_two_workers_are_what_vllm_loads(tmp_path, monkeypatch):
    """Real: routes, joining by the unique id, ranks of tensor parallel workers, cutting into broadcasts, loading."""
    monkeypatch.setattr(nccl, "PACKED_BYTES", 20_000)
    net, asked = model(5, SHAPE), prompts(8)
    with standin_nccl() as (library, folder):
        # Threads that are bound to cores would leave the second worker none.
        server = transferring(
            tmp_path, "nccl", library, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="nobind"
        )  # fmt: skip
        transport = NcclTransport(torch.device("cpu"), keep=True, library=library)
        with VLLMEngine(net, transport, eos=(EOS,), deadline=READY_S, process=server) as engine:
            assert served_version(server.url, asking("nccl")) == "0.32.0"
            for step in range(2):
                engine.refresh(step)
                assert gap(net, asked, sample(engine, asked)) < TOLERANCE
                moved(net)
            assert gap(net, asked, sample(engine, asked)) > 100 * TOLERANCE
            [group] = [path for path in folder.iterdir() if path.is_dir()]
            assert len(list(group.glob("here-*"))) == 3
            assert len(list(group.glob("broadcast-*"))) > 4


def test_weights_in_a_shared_buffer_are_what_vllm_loads(tmp_path, monkeypatch):
    """Real: routes, the pickled handles and their permission, cutting into pieces, copying out of them, loading."""
    monkeypatch.setattr(ipc, "BUFFER_BYTES", 50_000)
    file_buffers(monkeypatch, tmp_path)
    net, asked = model(5, SHAPE), prompts(8)
    server = transferring(tmp_path, "ipc", "", **ALLOW_PICKLES)
    transport = IpcTransport(torch.device("cpu"), keep=True)
    with VLLMEngine(net, transport, eos=(EOS,), deadline=READY_S, process=server, sleeps=True) as engine:
        assert served_version(server.url, asking("ipc")) == "0.32.0"
        for step in range(2):
            engine.refresh(step)
            assert gap(net, asked, sample(engine, asked)) < TOLERANCE
            engine.rest()
            moved(net)
        engine.refresh(2)
        assert gap(net, asked, sample(engine, asked)) < TOLERANCE


# -- what goes wrong --


def test_what_a_server_was_not_started_for_is_told_by_itself(url):
    assert served_version(url, asking("file")) == "0.32.0"
    with pytest.raises(ValueError, match="weights are transferred by files alone; start it with --weight-transfer"):
        served_version(url, asking("nccl"))
    with pytest.raises(ValueError, match=r"not 257 .*; start it with --max-model-len 257"):
        served_version(url, asking("file", longest=257))
    # What the server says of a route that it was not started for reaches whoever runs the trainer.
    transport = IpcTransport(torch.device("cpu"), keep=False)
    with (
        VLLMEngine(model(6, SHAPE), transport, eos=(EOS,), deadline=60.0, urls=[url]) as engine,
        pytest.raises(ServerError, match=f"{url}/init_weight_transfer_engine: 500: .*Weight transfer not configured"),
    ):
        engine.refresh(0)


@pytest.mark.parametrize("fault", ["hang", "500", "cut", "truncated"])
def test_a_fault_between_trainer_and_server_is_survived(url, fault):
    net, asked = model(6, SHAPE), prompts(6)
    with faulty_proxy(url) as (proxied, faults), engine_on(net, proxied, deadline=18.0) as engine:
        # A server that hangs with the weights is given all of the deadline: loading takes long.
        faults.at("/weight_info" if fault == "hang" else "/collective_rpc", fault)
        engine.refresh(0)
        faults.at(GENERATE, fault, fault)
        assert gap(net, asked, sample(engine, asked)) < TOLERANCE
        assert faults.happened == [fault] * 3


def test_a_wrong_version_is_refused(url):
    with faulty_proxy(url) as (proxied, faults), engine_on(model(6, SHAPE), proxied) as engine:
        engine.refresh(0)
        faults.at(GENERATE, "stale")
        with pytest.raises(ServerError, match="from weights stale was refused"):
            sample(engine, prompts(2))
        faults.at("/weight_info", "stale")
        with pytest.raises(ServerError, match="says that it serves weights stale"):
            engine.refresh(1)


def test_a_stopped_rollout_frees_the_server_at_once(url):
    net, asked = model(6, SHAPE), prompts(64)

    def stop(tokens):
        raise Interrupted

    with engine_on(net, url, eos=()) as engine:
        engine.refresh(0)
        with pytest.raises(Interrupted):
            sample(engine, asked, n=8, max_tokens=200, progress=stop)
        began = time.monotonic()
        engine.refresh(1)
        assert time.monotonic() - began < 20


def test_a_server_killed_in_the_middle_of_a_rollout_is_started_anew_and_the_rollout_is_whole(tmp_path):
    net, asked = moved(model(8, SHAPE)), prompts(100)
    server = process(tmp_path)
    killed = []

    def kill(tokens):
        if not killed:
            [killed_pid] = [pid for pid in descendants(server._guard.pid) if is_api_server(pid)]
            killed.append(killed_pid)
            os.kill(killed_pid, signal.SIGKILL)

    with VLLMEngine(net, FileTransport(Path("/dev/shm")), eos=(), deadline=READY_S, process=server) as engine:
        engine.refresh(0)
        first = descendants(server._guard.pid)
        assert len(first) >= 2
        found = sample(engine, asked, n=2, progress=kill)
        assert killed
        assert [len(r.tokens) for g in found for r in g] == [MAX_TOKENS] * 200
        assert gap(net, asked, found) < TOLERANCE
        second = descendants(server._guard.pid)
        assert not set(first) & set(second)
    assert not [pid for pid in (*first, *second) if Path(f"/proc/{pid}").exists()]


def is_api_server(pid):
    """The process that was started, rather than one that it started."""
    return b"vllm.entrypoints" in Path(f"/proc/{pid}/cmdline").read_bytes()


# -- training --


def test_prime_on_vllm_improves_the_quickstarts_policy(url, tmp_path):
    words = [
        "--run.dir", str(tmp_path / "run"), "--sft.base", f"tiny:{SHAPE}", "--sft.steps", "600", "--run.steps", "5",
        "--eval.every", "0", "--eval.prompts", "200", "--data.max_prompt_tokens", "128", "--rollout.engine", "vllm",
        "--vllm.servers", url,
    ]  # fmt: skip
    assert cli.main(["run", "quickstart", *words]) == 0
    first, *steps = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    for record in steps:
        assert record["sampler/kl"] < 1e-4
        assert record["sampler/ratio_max"] == pytest.approx(1, abs=0.01)
        assert record["sampler/clipped"] == 0
    assert steps[-1]["eval/sampled"] > first["eval/sampled"] + 0.1

    # The same run goes on, now with a batch ahead. The weights that the server holds are refreshed before the first.
    assert cli.main(["run", "quickstart", *words, "--run.steps", "8", "--rollout.ahead", "1"]) == 0
    _, *steps = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["rollout/lag"] for record in steps] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert steps[5]["sampler/ratio_max"] == pytest.approx(1, abs=0.01)
    for record in steps[6:]:
        assert record["sampler/ratio_max"] > 1.01
        assert record["sampler/ratio_mean"] == pytest.approx(1, abs=0.1)
    assert steps[-1]["eval/sampled"] > first["eval/sampled"] + 0.1
