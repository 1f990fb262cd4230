"""What GPUs can do: by name, and what follows for one pass or two."""

import pytest
import torch

from prime_kernels import devices, linear_logprob
from prime_kernels.plan import plan_one_pass

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("NVIDIA H100 80GB HBM3", 266), ("NVIDIA H100 PCIe", 340), ("NVIDIA H200", 184), ("NVIDIA GH200 480GB", 184),
        ("NVIDIA RTX A1000 Laptop GPU", 184),
        ("NVIDIA A100-SXM4-80GB", 138), ("NVIDIA B200", 253), ("NVIDIA L40S", 377), ("NVIDIA GeForce RTX 5090", 184),
    ],
)  # fmt: skip
def test_flop_per_byte_is_the_devices_own(name, want, monkeypatch):
    devices.flop_per_byte.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert devices.flop_per_byte(torch.device("cuda", 0)) == want
    devices.flop_per_byte.cache_clear()


def test_a_cpu_has_a_figure_of_its_own():
    assert devices.flop_per_byte(torch.device("cpu")) == devices.CPU_FLOP_PER_BYTE < 10


def test_every_device_of_the_table_has_one():
    assert devices.FLOP_PER_BYTE.keys() == devices.DEVICES.keys()
    for name, device in devices.DEVICES.items():
        # As achieved: within 15% of the datasheets' ratio.
        assert devices.FLOP_PER_BYTE[name] == pytest.approx(device.flops / device.bandwidth, rel=0.15)


def test_the_device_decides_where_one_pass_pays():
    # 800 tokens a chunk: more than an H200's 736, fewer than an H100's 1064.
    settings = {"workspace": 402 * MIB, "bytes_per_logit": 4, "copies": False, "need_dw": True}
    found = {
        name: plan_one_pass(8192, 4096, 131072, flop_per_byte=f, **settings)
        for name, f in devices.FLOP_PER_BYTE.items()
    }
    assert {name: plan.passes for name, plan in found.items() if name in ("H100", "H200", "A100")} == {
        "H100": 2, "H200": 1, "A100": 1,
    }  # fmt: skip


def test_a_gpu_that_is_not_there_has_no_kernels(monkeypatch):
    """As fake tensors are on, for a plan of memory that is made on another machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.device_arch(torch.device("cuda", 0)) == 0


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"])
def test_a_name_that_only_looks_like_one_of_the_table_is_none(name):
    assert devices.named(name) is None


@pytest.mark.parametrize("backend", ["triton", "chunked", "fused"])
def test_kernels_are_refused_on_amd(monkeypatch, backend):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    hidden, targets = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"backend='{backend}' needs an NVIDIA GPU"):
        linear_logprob(hidden, hidden, targets, backend=backend)
    assert linear_logprob(hidden, hidden, targets).logp.shape == (2,)
