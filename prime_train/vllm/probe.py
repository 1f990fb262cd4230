"""Whether servers, and this process, can do what a configuration asks of them; nothing is changed in either."""

import re

import httpx2

from ..config import Config
from ..setup import device_of
from .libnccl import Library

OLDEST = (0, 32)
"""The first vLLM whose routes are these."""
ANSWER_S = 5.0
SLOW_ANSWER_S = 60.0
"""For what a server knows of itself, which it looks up when it is first asked."""


def served_version(url: str, transport: str) -> str:
    """The version of the server that runs at the URL, if it answers on every route that rollouts and refreshes need.

    Raises:
        ValueError, LookupError: it cannot be used; with how it should have been started, where that helps.
        httpx2.HTTPError: it cannot be reached.
    """
    with httpx2.Client(base_url=url, timeout=ANSWER_S, trust_env=False) as http:
        found = str(http.get("/version").raise_for_status().json()["version"])
        refuse_old(found)
        if http.get("/weight_info").status_code != 200:
            raise ValueError("weights cannot be refreshed; start it with VLLM_SERVER_DEV_MODE=1 in its environment")
        # A request without a body is refused as such where the route is open, and as not permitted where it is not.
        if http.post("/inference/v1/generate", json={}).status_code in (403, 404):
            raise ValueError("token ids are not taken; start it with --enable-scale-out")
        if transport != "file":
            _refuse_other_transports(http, transport)
    return found


def refuse_old(found: str) -> None:
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise ValueError(f"{found}; at least {'.'.join(map(str, OLDEST))} is needed")


def _refuse_other_transports(http: httpx2.Client, transport: str) -> None:
    answer = http.get("/server_info", params={"config_format": "json"}, timeout=SLOW_ANSWER_S).raise_for_status().json()
    backend = (answer["vllm_config"].get("weight_transfer_config") or {}).get("backend")
    if backend != transport:
        raise ValueError(
            f"weights are transferred by {backend or 'files alone'}; "
            f'start it with --weight-transfer-config \'{{"backend": "{transport}"}}\''
        )
    if transport == "ipc" and not answer["vllm_env"].get("VLLM_ALLOW_INSECURE_SERIALIZATION"):
        raise ValueError("handles are not taken; start it with VLLM_ALLOW_INSECURE_SERIALIZATION=1 in its environment")


def transport_problems(config: Config) -> list[str]:
    """Why this process cannot send weights by `vllm.transport`."""
    section = config.vllm
    found = []
    if section.transport != "file" and device_of(config).type != "cuda":
        found.append(f"{section.transport} needs the policy on a CUDA GPU; use file")
    if section.transport == "nccl":
        try:
            Library()
        except OSError as error:
            found.append(f"nccl needs the libnccl that PyTorch for CUDA comes with: {error}")
        if section.sleeps:
            found.append("nccl wants a GPU for every process, and this server shares the trainer's; use ipc or file")
    if section.transport == "ipc" and not section.local:
        found.append("ipc reaches servers on the trainer's own GPU, and vllm.servers are elsewhere; use nccl or file")
    return found


def server_problems(config: Config) -> list[str]:
    """Running servers that were not started as they must be. For one that does not answer yet the run will wait."""
    found = []
    for url in config.vllm.urls:
        try:
            served_version(url, config.vllm.transport)
        except httpx2.TransportError:
            continue
        except (ValueError, LookupError, httpx2.HTTPError) as error:
            found.append(f"{url}: {error}")
    return found
