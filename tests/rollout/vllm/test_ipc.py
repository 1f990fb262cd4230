"""Weights through one buffer that trainer and server share; the GPU's memory is a file (tests/support/standin)."""

import asyncio
from contextlib import contextmanager

import pytest
import torch

from prime_train.models.snapshot import Weights
from prime_train.rollout.vllm import ipc
from prime_train.rollout.vllm.engine import VLLMEngine
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.ipc import IpcTransport
from tests.rollout.vllm.test_nccl import SEND, SETTLE, TAKE_UP, as_bytes, moved
from tests.support.fake_transfer import Receiver
from tests.support.fake_vllm import EOS, fake_vllm, faulty_proxy
from tests.support.standin import file_buffers
from tests.support.tiny import model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _files(monkeypatch, tmp_path):
    file_buffers(monkeypatch, tmp_path)
    monkeypatch.setattr(ipc, "BUFFER_BYTES", 1500)


@contextmanager
def engine_over(*urls, net=None, keep=False):
    transport = IpcTransport(CPU, keep=keep)
    with VLLMEngine(net or model(), transport, eos=[EOS], deadline=1.5, urls=urls) as engine:
        yield engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_server_gets_the_weights_bit_for_bit_a_buffer_at_a_time(dtype):
    net = model()
    net.compute_dtype = dtype
    with fake_vllm() as (a, one), fake_vllm() as (b, other), engine_over(a, b, net=net) as engine:
        for step in range(2):
            engine.refresh(step)
            assert one.receiver.received == other.receiver.received == [as_bytes(net)]
            pieces = one.receiver.pieces
            assert [name for piece in pieces for name in piece] == [info.name for info in Weights.of(net).manifest]
            largest = max(info.nbytes for info in Weights.of(net).manifest)
            sizes = [sum(len(one.receiver.received[0][name]) for name in piece) for piece in pieces]
            assert max(sizes) <= max(1500, largest)
            assert len(pieces) > 2
            moved(net)


def test_the_routes_are_asked_in_order_and_once_but_for_the_pieces():
    with fake_vllm() as (url, fake), engine_over(url) as engine:
        engine.refresh(0)
        start, update, finish = SEND
        pieces = [update] * len(fake.receiver.pieces)
        begin = ["/get_world_size", "/init_weight_transfer_engine"]
        assert fake.asked == [*begin, *SETTLE, start, *pieces, finish, *TAKE_UP]
        fake.asked.clear()
        engine.refresh(1)
        assert fake.asked == [*begin, start, *pieces, finish, *TAKE_UP]


def test_a_server_with_more_than_one_worker_is_refused_by_name():
    with (
        fake_vllm(Receiver(workers=2)) as (url, _),
        engine_over(url) as engine,
        pytest.raises(ServerError, match=rf"{url} has 2 workers; vllm.transport ipc reaches one"),
    ):
        engine.refresh(0)


@pytest.mark.parametrize(
    ("path", "fault"), [(path, "500") for path in ("/init_weight_transfer_engine", *SEND)]
    + [(SEND[1], "hang"), (SEND[2], "cut")],
)  # fmt: skip
def test_a_fault_of_a_route_is_an_error_with_the_servers_name(path, fault):
    with fake_vllm() as (target, _), faulty_proxy(target) as (url, faults), engine_over(url) as engine:
        if path in SEND:
            engine.refresh(0)
        faults.at(path, fault)
        with pytest.raises(ServerError, match=f"POST {url}{path}: "):
            engine.refresh(1)


@pytest.mark.parametrize(("path", "fault"), [("/finish_weight_update", "cut"), ("/update_weights", "cut")])
def test_a_server_that_a_run_left_in_the_middle_of_an_update_takes_the_next_runs(path, fault):
    with fake_vllm() as (target, fake), faulty_proxy(target) as (url, faults):
        with engine_over(url) as engine:
            engine.refresh(0)
            faults.at(path, fault)
            with pytest.raises(ServerError, match=path):
                engine.refresh(1)
        assert fake.receiver.updating
        with engine_over(url, net=moved(model())) as engine:
            engine.refresh(0)
            assert fake.receiver.received == [as_bytes(engine.policy)]


def test_after_an_update_that_a_server_failed_the_next_one_is_whole():
    with fake_vllm() as (url, fake), engine_over(url) as engine:
        fake.receiver.half_done = True
        engine.refresh(0)
        assert fake.receiver.received == [as_bytes(engine.policy)]


def test_a_server_that_cannot_end_an_update_has_to_be_restarted():
    with fake_vllm() as (target, fake), faulty_proxy(target) as (url, faults), engine_over(url) as engine:
        fake.receiver.updating = True
        faults.at("/finish_weight_update", "500")
        with pytest.raises(ServerError, match=rf"POST {url}/finish_weight_update: 500: out of luck; .*: restart {url}"):
            engine.refresh(0)


@pytest.mark.parametrize("keep", [True, False])
def test_kept_weights_can_be_loaded_again_others_are_gone(keep):
    net = model()
    with fake_vllm() as (url, fake), engine_over(url, net=net, keep=keep) as engine:
        engine.refresh(0)
        want = as_bytes(net)
        moved(net)
        fake.receiver.received = []
        again = engine._on_all(engine._load)
        if keep:
            asyncio.run(again)
            assert fake.receiver.received == [want]
        else:
            with pytest.raises(ValueError, match=r"got TensorInfo\(name='nothing'"):
                asyncio.run(again)
