"""What devices can do: from their makers' datasheets by name, or else measured by a short product of matrices."""

import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Of one GPU: dense bf16 FLOP/s, that is without sparsity, and bytes/s, one way for links."""

    flops: float
    flops_fp32: float
    """In float32, without TF32."""
    bandwidth: float
    """Of its memory."""
    link: float
    """To the other GPUs of its node, each way."""


DEVICES: dict[str, Device] = {
    # NVIDIA's datasheets of the SXM parts (L40S: PCIe gen 4); NVLink's totals are halved.
    "B200": Device(flops=2250e12, flops_fp32=75e12, bandwidth=8.0e12, link=900e9),
    "H200": Device(flops=989e12, flops_fp32=67e12, bandwidth=4.8e12, link=450e9),
    "H100 PCIe": Device(flops=756e12, flops_fp32=51e12, bandwidth=2.0e12, link=32e9),
    "H100": Device(flops=989e12, flops_fp32=67e12, bandwidth=3.35e12, link=450e9),
    "A100": Device(flops=312e12, flops_fp32=19.5e12, bandwidth=2.039e12, link=300e9),
    "L40S": Device(flops=362e12, flops_fp32=91.6e12, bandwidth=0.864e12, link=32e9),
}
"""By what the device's name contains; the first that it does counts."""


def named(name: str) -> Device | None:
    """The device whose name this is, "NVIDIA H100 80GB HBM3"; None if it is in no table."""
    return next((device for key, device in DEVICES.items() if all(word in name for word in key.split())), None)


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
