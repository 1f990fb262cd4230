"""What GPUs can do, from their makers' datasheets, by name."""

import re
from dataclasses import dataclass
from functools import cache

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

FLOP_PER_BYTE = {"B200": 253, "H200": 184, "H100 PCIe": 340, "H100": 266, "A100": 138, "L40S": 377}
"""What each multiplies while it moves a byte, as achieved: an H200 790 TFLOP/s at 4.3 TB/s, an H100 790 at 2.97; of the
others nine tenths of their datasheets' ratio."""

# Of a GPU in no table, an H200's. Two CPU cores do about 100 GFLOP/s and 15 GB/s.
GPU_FLOP_PER_BYTE, CPU_FLOP_PER_BYTE = FLOP_PER_BYTE["H200"], 7


def _key(name: str) -> str | None:
    words = re.findall(r"\w+", name)
    if "MIG" in words:  # a part of one
        return None
    # A GH200 has an H200's GPU, a GB200 B200s.
    return next((key for key in DEVICES if all(any(w.endswith(k) for w in words) for k in key.split())), None)


def named(name: str) -> Device | None:
    """The device whose name this is, "NVIDIA H100 80GB HBM3"; None if it is in no table."""
    key = _key(name)
    return None if key is None else DEVICES[key]


@cache
def flop_per_byte(device: torch.device) -> int:
    """What the processor multiplies while it moves a byte."""
    if device.type != "cuda":
        return CPU_FLOP_PER_BYTE
    key = _key(torch.cuda.get_device_name(device))
    return GPU_FLOP_PER_BYTE if key is None else FLOP_PER_BYTE[key]


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, which share the tiles of a product; 1 for a CPU, and for a GPU that is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_arch(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90); 0 for a CPU, and for a GPU that torch only imagines."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():  # AMD counts otherwise
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
