"""Whether servers, and this process, can do what a configuration asks of them; nothing is changed in either."""

import contextlib
import os
import re
from typing import Any

import httpx2
import torch

from ...config.keys import Config
from ...plan.memory import longest, longest_within, server_option
from ...plan.models import policy_architecture
from ...plan.records import Unplannable
from ...run.setup import device_of
from .libnccl import Library

OLDEST = (0, 32)
"""The first vLLM whose routes are these."""
ANSWER_S = 5.0
SLOW_ANSWER_S = 60.0
"""For what a server knows of itself, which it looks up when it is first asked."""
LOGPROBS = "processed_logprobs"
EXPANDABLE = "expandable_segments:True"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
"""Names of what is said to PyTorch's allocator."""


def served_version(url: str, config: Config) -> str:
    """The version of the server that runs at the URL, if it answers on every route that rollouts and refreshes need and
    was started for this run, as far as it tells.

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
        told = http.get("/server_info", params={"config_format": "json"}, timeout=SLOW_ANSWER_S)
    info = told.json() if told.status_code == 200 else {}
    model = _part(info, "vllm_config", "model_config")
    _refuse_other_log_probs(model)
    _refuse_shorter(model, config)
    _refuse_other_transports(info, config.vllm.transport)
    _refuse_other_libraries(info, config.vllm.transport)
    return found


def refuse_old(found: str) -> None:
    if _numbers(found) < OLDEST:
        raise ValueError(f"{found}; at least {'.'.join(map(str, OLDEST))} is needed")


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _part(info: Any, *names: str) -> dict[str, Any]:
    """Of what a server tells of itself; nothing where another version of vLLM tells it elsewhere."""
    for name in names:
        info = info.get(name) if isinstance(info, dict) else None
    return info if isinstance(info, dict) else {}


def _refuse_other_log_probs(model: dict[str, Any]) -> None:
    if (mode := model.get("logprobs_mode", LOGPROBS)) != LOGPROBS:
        raise ValueError(
            f"log-probs are {mode}, not of what is sampled from; start it with --logprobs-mode {LOGPROBS}"
        )  # fmt: skip


def _refuse_shorter(model: dict[str, Any], config: Config) -> None:
    """One that would end responses early, unless the model itself takes no more."""
    has, needs = model.get("max_model_len"), longest(config)
    if not isinstance(has, int) or has >= needs:
        return
    with contextlib.suppress(Unplannable):
        needs = longest_within(config, policy_architecture(config).get_text_config())
    if has < needs:
        raise ValueError(
            f"a prompt and its response may have {has} tokens, not {needs} (data.max_prompt_tokens and "
            f"rollout.max_tokens); start it with --max-model-len {needs}"
        )


def _refuse_other_transports(info: Any, transport: str) -> None:
    vllm_config = _part(info, "vllm_config")
    if transport == "file" or "weight_transfer_config" not in vllm_config:
        return
    backend = _part(vllm_config, "weight_transfer_config").get("backend")
    if backend != transport:
        raise ValueError(
            f"weights are transferred by {backend or 'files alone'}; "
            f'start it with --weight-transfer-config \'{{"backend": "{transport}"}}\''
        )
    if transport == "ipc" and not _part(info, "vllm_env").get("VLLM_ALLOW_INSECURE_SERIALIZATION", True):
        raise ValueError("handles are not taken; start it with VLLM_ALLOW_INSECURE_SERIALIZATION=1 in its environment")


def _refuse_other_libraries(info: Any, transport: str) -> None:
    """A handle of CUDA IPC means something to the same torch alone, and NCCL talks to its own version alone."""
    system, nccl_elsewhere = _part(info, "system_env"), _part(info, "vllm_env").get("VLLM_NCCL_SO_PATH")
    theirs = str(system.get("torch_version") or torch.__version__)
    if transport == "ipc" and _numbers(theirs) != _numbers(torch.__version__):
        raise ValueError(f"ipc wants the trainer's torch, {torch.__version__}, and this server has {theirs}")
    named = re.search(r"nvidia-nccl-cu\d+==(\d+\.\d+\.\d+)", str(system.get("pip_packages")))
    if transport == "nccl" and named and not nccl_elsewhere and named[1] != (ours := _nccl_version() or named[1]):
        raise ValueError(f"nccl wants the trainer's NCCL, {ours}, and this server has {named[1]}")


def _nccl_version() -> str | None:
    try:
        return Library().version
    except OSError:
        return None  # which `transport_problems` names


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
        elif not section.urls and not _on_other_gpus(config):
            found.append(
                "nccl wants a GPU for every process, and the server would start on the trainer's; name others behind "
                "the Python in vllm.servers, as in --device-ids 1"
            )
    if section.transport == "ipc" and not section.local:
        found.append("ipc reaches servers on the trainer's own GPU, and vllm.servers are elsewhere; use nccl or file")
    if section.transport == "ipc" and any(EXPANDABLE in os.environ.get(name, "") for name in ALLOCATOR):
        found.append(
            f"ipc cannot hand over expandable segments in a container; leave {EXPANDABLE} out of {ALLOCATOR[0]}"
        )
    return found


def _on_other_gpus(config: Config) -> bool:
    """Whether the options of a server of the run's own name GPUs, and none that a process of the trainer has."""
    named = server_option(config, "--device-ids")
    own = {str(i) for i in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))}
    return named is not None and own.isdisjoint(named.split(","))


def server_problems(config: Config) -> list[str]:
    """Running servers that were not started as they must be. For one that does not answer yet the run will wait."""
    found = []
    for url in config.vllm.urls:
        try:
            served_version(url, config)
        except httpx2.TransportError:
            continue
        except (ValueError, LookupError, httpx2.HTTPError) as error:
            found.append(f"{url}: {error}")
    return found
