"""What a configuration makes of servers: where weights travel, and how one of the run's own is started."""

import json
from pathlib import Path

from prime_train.config.keys import Config
from prime_train.rollout.vllm.build import server_process, weights_directory
from tests.support.tiny import model


def configured(directory, servers, transport="file"):
    return Config.model_validate(
        {
            "run": {"dir": directory},
            "rollout": {"engine": "vllm"},
            "vllm": {"servers": servers, "transport": transport},
        }
    )


def test_weights_travel_in_shared_memory_or_to_other_machines_in_the_runs_directory(tmp_path):
    here, elsewhere = (configured(tmp_path, f"http://localhost:1 http://{host}:1") for host in ("[::1]", "b"))
    assert weights_directory(here) == Path("/dev/shm")
    assert weights_directory(elsewhere) == tmp_path / "vllm"


def test_a_server_of_the_runs_own_is_started_for_the_transport(tmp_path):
    def process(transport):
        return server_process(configured(tmp_path, "python", transport), model())

    files, nccl, ipc = (process(transport) for transport in ("file", "nccl", "ipc"))
    assert "--weight-transfer-config" not in files.command
    for name, found in (("nccl", nccl), ("ipc", ipc)):
        option = found.command[found.command.index("--weight-transfer-config") + 1]
        assert json.loads(option) == {"backend": name}
    assert [p.environment.get("VLLM_ALLOW_INSECURE_SERIALIZATION") for p in (files, nccl, ipc)] == [None, None, "1"]
