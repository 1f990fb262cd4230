"""Peaks of devices."""

import torch

from prime_kernels.devices import DEVICES, named
from prime_train.plan.hardware import measured_flops, memory_bytes


def test_devices_are_found_by_name():
    assert named("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert named("NVIDIA H100 PCIe") is DEVICES["H100 PCIe"]
    assert named("NVIDIA GeForce RTX 3090") is None


def test_an_unknown_device_is_measured():
    rate = measured_flops(torch.device("cpu"), torch.float32, size=128)
    assert 1e7 < rate < 1e15


def test_memory_of_the_host_is_known():
    assert memory_bytes(torch.device("cpu")) > 2**28
