"""What this machine can do: from its maker's datasheet by name, or else measured by a short product of matrices."""

import os
import time
from functools import cache
from pathlib import Path

import torch

from prime_kernels.devices import named


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one device of this kind could reach: dense bf16 from the table for a GPU in it, whatever the dtype;
    otherwise the best of a few products in `dtype` (a tenth of a second, once)."""
    known = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.flops if known else measured_flops(device, dtype)


@cache
def measured_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """The best rate of a few products of square matrices, FLOP/s, with as many threads as torch has."""
    n = size or (4096 if device.type == "cuda" else 512)
    a = torch.zeros(n, n, device=device, dtype=dtype)
    best, spent = float("inf"), 0.0
    for _ in range(50):
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        best, spent = min(best, seconds), spent + seconds
        if spent > 0.1:
            break
    return 2 * n**3 / best


def memory_bytes(device: torch.device) -> int:
    """Of a GPU, or of the host: its RAM, or what a container may take of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total
