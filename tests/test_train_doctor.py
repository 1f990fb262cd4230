"""What the doctor says, one line each, and what makes an installation unusable."""

import sys

import pytest

from prime_train import cli, doctor
from prime_train.config import Config

from .fake_vllm import fake_vllm, serving

NAMES = ["torch", "triton", "GPU", "flash attention", "sandbox", "vLLM", "shared memory"]


@pytest.fixture(autouse=True)
def sandboxed(monkeypatch):
    monkeypatch.setattr(doctor, "Sandbox", lambda: None)


def findings(**sections):
    return {finding.name: finding for finding in doctor.examine(Config.model_validate(sections))}


def vllm(servers):
    return findings(rollout={"engine": "vllm"}, vllm={"servers": servers})["vLLM"]


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


def test_a_python_without_vllm_is_unusable():
    assert vllm(sys.executable).text == f"{sys.executable}: ValueError: vLLM is not installed there"
    assert vllm("/nowhere/python").verdict == "broken"


def test_too_little_shared_memory_is_unusable_for_vllm_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_GIB", 1e9)
    assert findings()["shared memory"].verdict == "note"
    sections = {"rollout": {"engine": "vllm"}, "vllm": {"servers": "http://127.0.0.1:9"}}
    assert findings(**sections)["shared memory"].verdict == "broken"
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "nowhere")
    assert findings(**sections)["shared memory"].verdict == "broken"
    sections["vllm"]["servers"] = "http://another.machine:8000"
    assert findings(**sections)["shared memory"].verdict == "note"
