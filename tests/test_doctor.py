"""What the doctor says, one line each, and what makes an installation unusable."""

import json
import re
import sys
from collections import namedtuple

import pytest

from prime_train import cli, doctor
from prime_train.config.keys import Config
from prime_train.rollout.vllm.libnccl import Library
from tests.support.fake_vllm import fake_vllm, serving
from tests.support.tiny import saved_model

Usage = namedtuple("Usage", "total used free")
NAMES = ["torch", "triton", "GPU", "flash attention", "sandbox", "vLLM", "shared memory"]


@pytest.fixture(autouse=True)
def sandboxed(monkeypatch):
    monkeypatch.setattr(doctor, "Sandbox", lambda: None)


def findings(**sections):
    return {finding.name: finding for finding in doctor.examine(Config.model_validate(sections))}


def vllm(servers, transport="file"):
    return findings(rollout={"engine": "vllm"}, vllm={"servers": servers, "transport": transport})["vLLM"]


def test_one_line_each_and_the_exit_code_says_usable(capsys):
    assert cli.main(["doctor"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[8:23].strip() for line in lines] == NAMES
    assert last == "usable"


def test_what_the_configuration_needs_and_is_not_there_is_unusable(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["doctor", "quickstart"]) == 0
    assert cli.main(["doctor", "quickstart", "--run.device", "cuda"]) == 1
    assert "broken  GPU " in (out := capsys.readouterr().out)
    assert out.endswith("not usable\n")
    assert findings(model={"attention": "flash_attention_2"})["flash attention"].verdict == "broken"


def test_old_packages_are_unusable(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "2.10.1+cu128")
    found = findings()
    assert found["torch"] == doctor.Finding("torch", "broken", "2.10.1+cu128; at least 2.11 is needed")
    assert found["triton"].verdict == "broken"


def test_a_missing_sandbox_is_unusable_unless_the_user_wants_none(monkeypatch):
    def missing():
        raise doctor.SandboxUnavailable("no bubblewrap")

    monkeypatch.setattr(doctor, "Sandbox", missing)
    assert findings()["sandbox"] == doctor.Finding("sandbox", "broken", "no bubblewrap")
    assert findings(verify={"unsafe": True})["sandbox"].verdict == "note"


def test_a_server_that_answers_is_named_with_its_version():
    with fake_vllm() as (url, _):
        assert vllm(url) == doctor.Finding("vLLM", "ok", f"{url}: 0.32.0")


def test_every_server_has_a_line_of_its_own():
    with fake_vllm() as (url, _):
        config = Config.model_validate(
            {"rollout": {"engine": "vllm"}, "vllm": {"servers": f"{url} http://127.0.0.1:9"}}
        )
        assert [f.verdict for f in doctor.examine(config) if f.name == "vLLM"] == ["ok", "broken"]


@pytest.mark.parametrize(
    ("path", "status", "body", "said"),
    [
        ("/version", 200, b'{"version": "0.20.1"}', "0.20.1; at least 0.32 is needed"),
        ("/version", 200, b"{}", "KeyError"),
        ("/weight_info", 404, b"", "VLLM_SERVER_DEV_MODE=1"),
        ("/inference/v1/generate", 403, b"", "--enable-scale-out"),
    ],
)
def test_a_server_that_cannot_be_used_is_said_so_with_its_url_and_why(path, status, body, said):
    def answer(method, asked, _):
        return (status, body) if asked == path else (200, b'{"version": "0.32.0"}')

    with serving(answer) as url:
        found = vllm(url)
    assert found.verdict == "broken"
    assert found.text.startswith(f"{url}: ")
    assert said in found.text


@pytest.mark.parametrize(
    ("transport", "backend", "allowed", "said"),
    [
        ("nccl", None, True, """by files alone; start it with --weight-transfer-config '{"backend": "nccl"}'"""),
        ("ipc", "nccl", True, """by nccl; start it with --weight-transfer-config '{"backend": "ipc"}'"""),
        ("ipc", "ipc", False, "start it with VLLM_ALLOW_INSECURE_SERIALIZATION=1"),
        ("ipc", "ipc", True, "0.32.0"),
        ("nccl", "nccl", False, "0.32.0"),
    ],
)
def test_a_server_must_have_been_started_with_the_transport(transport, backend, allowed, said):
    config = {"weight_transfer_config": backend and {"backend": backend}}
    info = {"version": "0.32.0", "vllm_config": config, "vllm_env": {"VLLM_ALLOW_INSECURE_SERIALIZATION": allowed}}
    with serving(lambda *asked: (200, json.dumps(info).encode())) as url:
        found = vllm(url, transport)
    assert found.verdict == ("ok" if said == "0.32.0" else "broken")
    assert found.text.startswith(f"{url}: ")
    assert found.text.endswith(said) or said in found.text


@pytest.mark.parametrize(
    ("transport", "servers", "cuda", "said"),
    [
        ("file", "http://127.0.0.1:9", False, None),
        ("nccl", "http://127.0.0.1:9", False, "nccl needs the policy on a CUDA GPU; use file"),
        ("nccl", "http://gpu2:9", True, "nccl needs the libnccl that PyTorch for CUDA comes with: libnowhere"),
        ("nccl", "python --enable-sleep-mode", True, "this server shares the trainer's; use ipc or file"),
        ("ipc", "http://gpu2:9", True, "ipc reaches servers on the trainer's own GPU, and vllm.servers are elsewhere"),
        ("nccl", "python --gpu-memory-utilization 0.4", True, "the server would start on the trainer's; name others"),
        ("ipc", "python --enable-sleep-mode", True, None),
    ],
)
def test_a_transport_that_cannot_be_is_unusable(monkeypatch, transport, servers, cuda, said):
    monkeypatch.setattr(Library.__init__, "__defaults__", ("libnowhere.so",))
    config = Config.model_validate(
        {
            "run": {"device": "cuda" if cuda else "cpu"}, "rollout": {"engine": "vllm"},
            "vllm": {"servers": servers, "transport": transport},
        }
    )  # fmt: skip
    [found] = doctor._transport(config)
    assert found.verdict == ("broken" if said else "ok")
    assert (said or f"weights reach the servers by {transport}") in found.text


def test_a_python_without_vllm_is_unusable():
    assert vllm(sys.executable).text == f"{sys.executable}: ValueError: vLLM is not installed there"
    assert vllm("/nowhere/python").verdict == "broken"


def test_too_little_room_for_the_policy_is_unusable_where_weights_travel_by_file(monkeypatch, tmp_path):
    saved = saved_model(tmp_path / "model")

    def found(servers, transport="file", policy=saved):
        sections = {"model": {"policy": policy}, "run": {"dir": tmp_path / "run"}, "rollout": {"engine": "vllm"}}
        return list(findings(**sections, vllm={"servers": servers, "transport": transport}).values())[-1]

    here, elsewhere = "http://127.0.0.1:9", "http://another.machine:8000"
    assert [found(s).verdict for s in (here, elsewhere)] == ["ok", "ok"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**20, 2**20 - 2**10, 2**10))
    said = r"has 9.5e-07 GiB free, and one copy of the policy takes \S+ GiB"
    short = found(here)
    assert (short.name, short.verdict) == ("shared memory", "broken")
    assert re.fullmatch(rf"/dev/shm {said} \(in a container: --shm-size\)", short.text)
    short = found(elsewhere)
    assert (short.name, short.verdict) == ("run directory", "broken")
    assert re.fullmatch(f"{tmp_path}/run/vllm {said}", short.text)
    unknown = found(here, policy="nobody/nothing")
    assert unknown.verdict == "note"
    assert "no config.json of nobody/nothing can be had" in unknown.text
    assert found(here, "nccl").verdict == findings()["shared memory"].verdict == "note"
