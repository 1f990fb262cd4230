"""Weights by broadcast to servers that are told by HTTP; NCCL is tests/support/standin/nccl.c."""

import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager

import httpx2
import pytest
import torch

from prime_train.models.snapshot import Weights
from prime_train.rollout.vllm import nccl
from prime_train.rollout.vllm.engine import VLLMEngine
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.guard import descendants
from prime_train.rollout.vllm.libnccl import Communicator, Library
from prime_train.rollout.vllm.nccl import NcclTransport
from prime_train.rollout.vllm.server import ServerProcess
from tests.rollout.vllm.test_client import sample
from tests.support.fake_transfer import Receiver, digest
from tests.support.fake_vllm import EOS, FakeVLLM, fake_vllm, faulty_proxy, serving
from tests.support.paths import ROOT
from tests.support.standin import standin_nccl
from tests.support.tiny import model

CPU = torch.device("cpu")
SEND = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
SETTLE = [SEND[0], SEND[2]]
JOIN = ["/get_world_size", *SETTLE, "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"]
TAKE_UP = ["/reset_prefix_cache", "/update_weight_version", "/weight_info"]


@pytest.fixture(scope="module")
def standin():
    with standin_nccl() as found:
        yield found


@pytest.fixture
def library(standin, monkeypatch):
    # Some broadcasts of several tensors each, and one that passes the limit by a lot.
    monkeypatch.setattr(nccl, "PACKED_BYTES", 1500)
    monkeypatch.setattr(nccl, "MARGIN_S", 0.5)
    return standin[0]


def engine_over(library, *urls, net=None, deadline=5.0):
    transport = NcclTransport(CPU, keep=False, library=library)
    return VLLMEngine(net or model(), transport, eos=[EOS], deadline=deadline, urls=urls)


@contextmanager
def servers(library, *workers):
    """URLs and fakes with so many workers each."""
    with ExitStack() as stack:
        found = [stack.enter_context(fake_vllm(Receiver(library, count))) for count in workers]
        yield [url for url, _ in found], [fake for _, fake in found]


def as_bytes(net):
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in
            Weights.of(net).tensors}  # fmt: skip


def moved(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    return net


# -- what arrives --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_of_every_server_gets_the_weights_bit_for_bit(library, dtype):
    net = model()
    net.compute_dtype = dtype
    with servers(library, 1, 3, 2) as (urls, fakes), engine_over(library, *urls, net=net) as engine:
        for step in range(3):
            engine.refresh(step)
            assert all(received == as_bytes(net) for fake in fakes for received in fake.receiver.received)
            assert len(fakes[0].receiver.pieces) > 3
            assert max(map(len, fakes[0].receiver.pieces)) > 1
            moved(net)


def test_ranks_follow_the_servers_order_after_the_trainers(library):
    with servers(library, 2, 1, 3) as (urls, fakes), engine_over(library, *urls) as engine:
        engine.refresh(0)
        assert [fake.receiver.init["rank_offset"] for fake in fakes] == [1, 3, 4]
        assert {fake.receiver.init["world_size"] for fake in fakes} == {7}
        assert len({fake.receiver.init["nccl_unique_id_b64"] for fake in fakes}) == 1


def test_a_group_is_made_once_and_used_for_every_refresh(library):
    with servers(library, 1, 1) as (urls, fakes), engine_over(library, *urls) as engine:
        engine.refresh(0)
        assert all(fake.asked == [*JOIN, *SEND, *TAKE_UP] for fake in fakes)
        for fake in fakes:
            fake.asked.clear()
        engine.refresh(1)
        assert all(fake.asked == ["/weight_info", *SEND, *TAKE_UP] for fake in fakes)
        assert all(fake.version.endswith("/1") for fake in fakes)


def test_a_server_that_was_started_anew_makes_a_new_group_of_all(library):
    old, new, other = (FakeVLLM(Receiver(library)) for _ in range(3))
    standing = [old]
    with (
        serving(lambda *asked: standing[0].respond(*asked)) as a,
        serving(other.respond) as b,
        engine_over(library, a, b) as engine,
    ):
        engine.refresh(0)
        first = other.receiver.init["nccl_unique_id_b64"]
        standing[0] = new
        engine.refresh(1)
        assert new.receiver.received[0] == other.receiver.received[0] == as_bytes(engine.policy)
        assert first != other.receiver.init["nccl_unique_id_b64"] == new.receiver.init["nccl_unique_id_b64"]


def test_the_group_is_left_at_the_end_by_everybody(library, standin):
    with servers(library, 2) as (urls, fakes), engine_over(library, *urls) as engine:
        engine.refresh(0)
        [folder] = [path for path in standin[1].iterdir() if path.is_dir() and not list(path.glob("gone-*"))]
        engine.__exit__(None, None, None)
        assert fakes[0].receiver.members == []
        assert len(list(folder.glob("gone-*"))) == 3


def test_an_own_server_that_died_is_given_the_same_weights_again_though_the_policy_has_moved_on(library, tmp_path):
    fake = [sys.executable, str(ROOT / "tests" / "support" / "fake_vllm.py")]
    process = ServerProcess(
        fake, log=tmp_path / "server.log", deadline=20.0, environment={"VLLM_NCCL_SO_PATH": library}
    )  # fmt: skip
    net = model()
    transport = NcclTransport(CPU, keep=True, library=library)
    with VLLMEngine(net, transport, eos=[EOS], deadline=20.0, process=process) as engine:
        engine.refresh(0)
        want = as_bytes(net)
        moved(net)
        os.kill(max(descendants(process._guard.pid)), signal.SIGKILL)
        [[response]] = sample(engine, [[7, 8]], n=1)
        assert response.tokens == (7, 8, EOS)
        assert held_by(process) == digest(want)


def held_by(process):
    return httpx2.get(f"{process.url}/digest", trust_env=False).json()["digest"]


# -- what goes wrong --


@pytest.mark.parametrize(
    ("path", "fault"), [(path, fault) for path in (JOIN[-1], *SEND) for fault in ("500", "cut")]
    + [(JOIN[-1], "hang"), (SEND[1], "hang")],
)  # fmt: skip
def test_a_fault_of_a_route_is_an_error_with_the_servers_name_in_time(library, path, fault):
    with (
        servers(library, 1, 1) as (urls, _),
        faulty_proxy(urls[1]) as (proxied, faults),
        engine_over(library, urls[0], proxied, deadline=1.5) as engine,
    ):
        if path in SEND:
            engine.refresh(0)
        faults.at(path, fault)
        began = time.monotonic()
        with pytest.raises(ServerError, match=path) as error:
            engine.refresh(1)
        # Where all wait for one, it is named among them.
        assert (proxied if fault == "hang" else f"POST {proxied}{path}: ") in str(error.value)
        assert ("servers that were receiving" in str(error.value)) == (path == SEND[1])
        assert time.monotonic() - began < 6
        assert len(faults.happened) == 1


@pytest.mark.parametrize("left", ["updating", "half_done"])
def test_a_server_that_a_trainer_left_in_the_middle_of_an_update_is_taken_over(library, left):
    with servers(library, 1, 2) as (urls, fakes), engine_over(library, *urls) as engine:
        setattr(fakes[1].receiver, left, True)
        engine.refresh(0)
        assert all(fake.receiver.received[0] == as_bytes(engine.policy) for fake in fakes)


def test_after_a_fault_the_same_engine_makes_a_new_group(library):
    with (
        servers(library, 1, 1) as (urls, fakes),
        faulty_proxy(urls[1]) as (proxied, faults),
        engine_over(library, urls[0], proxied) as engine,
    ):
        faults.at(SEND[1], "500")
        with pytest.raises(ServerError):
            engine.refresh(0)
        engine.refresh(1)
        assert all(fake.receiver.received[0] == as_bytes(engine.policy) for fake in fakes)


class Slow(Communicator):
    """Broadcasts end some looks after they began, or never."""

    looks: float = 5
    events: list[str]

    def broadcast(self, buffer):
        self.events.append("broadcast")
        super().broadcast(buffer)

    def sent(self):
        left = self.looks

        def look():
            nonlocal left
            left -= 1
            if left == 0:
                self.events.append("sent")
            return left <= 0

        return look

    def abort(self):
        self.events.append("abort")
        super().abort()


@pytest.fixture
def events(monkeypatch):
    """What happens on the GPU, in order: "gathered" for each tensor, and what becomes of broadcasts."""
    found = []
    whole = Weights.of

    def noted(net):
        weights = whole(net)
        tensors = (found.append("gathered") or pair for pair in weights.tensors)
        return Weights(manifest=weights.manifest, tensors=tensors, files={})

    monkeypatch.setattr(Weights, "of", noted)
    monkeypatch.setattr(Slow, "events", found, raising=False)
    monkeypatch.setattr(nccl, "Communicator", Slow)
    return found


def test_nothing_is_gathered_while_a_broadcast_is_under_way(library, events):
    with servers(library, 1) as (urls, _), engine_over(library, *urls) as engine:
        engine.refresh(0)
        assert events.count("broadcast") > 3
        assert all(events[i + 1] == "sent" for i, event in enumerate(events) if event == "broadcast")


def test_a_broadcast_that_never_ends_is_given_up_in_time_and_the_group_left_before_anything_else(
    library, events, monkeypatch
):
    with servers(library, 1) as (urls, _), engine_over(library, *urls, deadline=0.5) as engine:
        engine.refresh(0)
        events.clear()
        monkeypatch.setattr(Slow, "looks", float("inf"))
        with pytest.raises(ServerError, match=rf"{urls[0]}{SEND[1]}: no answer within 0.5 s; .*restart them"):
            engine.refresh(1)
        assert events[events.index("broadcast") + 1] == "abort"


def test_a_group_that_never_is_complete_is_given_up_with_the_servers_names(library):
    def joining_nothing(method, path, body):
        return 200, b'{"world_size": 1}'

    with (
        serving(joining_nothing) as url,
        engine_over(library, url, deadline=0.5) as engine,
        pytest.raises(ServerError, match=rf"an NCCL group with {url} was not complete after 1 s"),
    ):
        engine.refresh(0)


def test_what_nccl_says_is_an_error_with_the_servers_names(library, standin):
    with servers(library, 1) as (urls, _), engine_over(library, *urls) as engine:
        engine.refresh(0)
        newest = max((path for path in standin[1].iterdir() if path.is_dir()), key=lambda path: path.stat().st_ctime_ns)
        (newest / "fail-0-0").touch()
        with pytest.raises(
            ServerError, match=rf"a broadcast with {urls[0]} failed: NCCL 2.28.9: remote process exited"
        ):
            engine.refresh(1)


def test_after_a_failure_every_tensor_has_been_gone_through_for_others_gather_them_too(library, monkeypatch):
    whole, seen = Weights.of(model()), []

    def noted(pair):
        seen.append(pair[0])
        return pair

    weights = Weights(manifest=whole.manifest, tensors=map(noted, whole.tensors), files={})
    monkeypatch.setattr(Weights, "of", lambda net: weights)
    with (
        servers(library, 1) as (urls, _),
        faulty_proxy(urls[0]) as (url, faults),
        engine_over(library, url) as engine,
    ):
        faults.at("/update_weights", "500")
        with pytest.raises(ServerError):
            engine.refresh(0)
    assert seen == [info.name for info in whole.manifest]


def test_no_library_is_an_error_that_names_it():
    with pytest.raises(OSError, match="libnowhere"):
        NcclTransport(CPU, keep=False, library="libnowhere.so")


def test_an_old_or_another_library_is_an_error_that_names_what_is_missing():
    with pytest.raises(OSError, match=r"libc.so.6 has no nccl"):
        Library("libc.so.6")
