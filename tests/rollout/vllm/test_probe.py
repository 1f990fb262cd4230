"""What servers tell of themselves, and what of it a run cannot do with."""

import json

import pytest
import torch

from prime_train.config.keys import Config
from prime_train.rollout.vllm import probe
from prime_train.rollout.vllm.probe import served_version, transport_problems
from tests.support.fake_vllm import fake_vllm, serving


def config(transport="file", servers="http://127.0.0.1:9", prompt=100, response=28):
    return Config.model_validate(
        {
            "run": {"device": "cuda"}, "model": {"policy": "sft"}, "sft": {"base": "tiny:32x1x1"},
            "data": {"max_prompt_tokens": prompt}, "rollout": {"engine": "vllm", "max_tokens": response},
            "vllm": {"servers": servers, "transport": transport},
        }
    )  # fmt: skip


def refused(told, *asked, **asking):
    """Why a server that tells this of itself is refused; None where it is not."""
    body = json.dumps({"version": "0.32.0", **told}).encode()
    with serving(lambda *_: (200, body)) as url:
        try:
            assert served_version(url, config(*asked, **asking)) == "0.32.0"
        except ValueError as error:
            return str(error)


def model(**known):
    return {"vllm_config": {"model_config": known}}


# -- what every server is asked --


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_other_log_probs_than_of_what_is_sampled_from_are_refused(mode):
    assert f"log-probs are {mode}, not of" in (said := refused(model(logprobs_mode=mode)))
    assert said.endswith("start it with --logprobs-mode processed_logprobs")
    assert refused(model(logprobs_mode="processed_logprobs")) is None


def test_a_server_for_shorter_sequences_than_the_run_may_have_is_refused():
    said = refused(model(max_model_len=127))
    assert "127 tokens, not 128 (data.max_prompt_tokens and rollout.max_tokens)" in said
    assert said.endswith("start it with --max-model-len 128")
    assert refused(model(max_model_len=128)) is None


def test_a_server_need_not_take_longer_sequences_than_the_model():
    assert refused(model(max_model_len=1024), prompt=1024) is None
    assert refused(model(max_model_len=1023), prompt=1024).endswith("start it with --max-model-len 1024")


def test_a_model_that_nobody_knows_has_no_limit():
    asked = config(prompt=1024).model_copy(update={"model": Config().model.model_copy(update={"policy": "/nowhere"})})
    body = json.dumps({"version": "0.32.0", **model(max_model_len=1024)}).encode()
    with serving(lambda *_: (200, body)) as url, pytest.raises(ValueError, match="--max-model-len 1052"):
        served_version(url, asked)


@pytest.mark.parametrize(
    "told", [{}, {"vllm_config": "a text"}, model(), model(max_model_len=None), {"vllm_config": None}]
)
@pytest.mark.parametrize("transport", ["file", "nccl", "ipc"])
def test_what_a_server_does_not_tell_is_not_held_against_it(told, transport):
    assert refused(told, transport) is None


def test_a_server_without_the_route_is_not_refused():
    with fake_vllm() as (_, fake):

        def answer(method, path, body):
            return (404, b"") if path.startswith("/server_info") else fake.respond(method, path, body)

        with serving(answer) as url:
            assert served_version(url, config()) == "0.32.0"


# -- versions that must agree --


def test_ipc_wants_the_trainers_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    for theirs, said in (
        ("2.13.1+cu126", None),
        ("2.14.0+cu130", "ipc wants the trainer's torch, 2.13.0+cu130, and this server has 2.14.0+cu130"),
    ):
        assert refused({"system_env": {"torch_version": theirs}}, "ipc") == said
        assert refused({"system_env": {"torch_version": theirs}}, "nccl") is None


def test_nccl_wants_the_trainers_nccl(monkeypatch):
    told = {"system_env": {"pip_packages": "numpy==2.3.5\nnvidia-nccl-cu13==2.29.7\ntorch==2.13.0"}}
    monkeypatch.setattr(probe, "_nccl_version", lambda: "2.28.9")
    assert refused(told, "nccl") == "nccl wants the trainer's NCCL, 2.28.9, and this server has 2.29.7"
    assert refused(told, "ipc") is None
    assert refused({**told, "vllm_env": {"VLLM_NCCL_SO_PATH": "/elsewhere/libnccl.so"}}, "nccl") is None
    for ours in ("2.29.7", None):
        monkeypatch.setattr(probe, "_nccl_version", lambda ours=ours: ours)
        assert refused(told, "nccl") is None


# -- what this process can do --


@pytest.mark.parametrize(
    ("options", "trainers", "alone"),
    [
        ("", 1, False),
        ("--device-ids 0", 1, False),
        ("--device-ids 1", 1, True),
        ("--device-ids=1,2 --tensor-parallel-size 2", 1, True),
        ("--device-ids '2,1'", 2, False),
        ("--tensor-parallel-size 2 --device_ids 3,2", 2, True),
        ("--device-ids GPU-8932f937", 2, True),
    ],
)
def test_over_nccl_a_server_of_the_runs_own_must_have_gpus_of_its_own(monkeypatch, options, trainers, alone):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(trainers))
    found = [
        problem for problem in transport_problems(config("nccl", f"python {options}")) if "--device-ids" in problem
    ]
    assert len(found) == (not alone)
    assert not any("--device-ids" in problem for problem in transport_problems(config("nccl")))


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_cannot_be_handed_over(monkeypatch, name):
    assert transport_problems(config("ipc")) == []
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    [problem] = transport_problems(config("ipc"))
    assert "leave expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF" in problem
    assert not any("expandable" in problem for problem in transport_problems(config("file")))
