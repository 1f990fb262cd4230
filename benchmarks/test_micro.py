"""Ops on given log-probs, timed by pytest-benchmark.

    pytest benchmarks --benchmark-autosave                 on a GPU the kernels, elsewhere torch
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

Each is a handful of numbers a token, so what counts is launches and passes over memory.
"""

from collections.abc import Callable

import pytest
import torch

from prime_kernels import implicit_reward, ppo_clip_loss, prm_loss
from prime_train.algorithm.advantages import leave_one_out

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEQUENCES = 64


@pytest.fixture(params=[16384, 131072], ids="T={}".format)
def rows(request) -> dict[str, torch.Tensor]:
    """Log-probs of two policies, advantages, weights and boundaries of T packed tokens."""
    T = request.param
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(T, generator=generator)
    new = old + 0.1 * torch.randn(T, generator=generator)
    packed = {"new": new, "old": old, "advantages": torch.randn(T, generator=generator), "weight": torch.ones(T) / T}
    packed["outcomes"] = torch.rand(SEQUENCES, generator=generator).round()
    on_device = {name: t.to(DEVICE) for name, t in packed.items()}
    return on_device | {"cu_seqlens": torch.arange(0, T + 1, T // SEQUENCES)}


def forward_and_backward(leaf: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    leaf = leaf.clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(loss(leaf), leaf)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def test_ppo_clip_loss(benchmark, rows):
    fixed = rows["old"], rows["advantages"], rows["weight"]
    benchmark(forward_and_backward(rows["new"], lambda logp: ppo_clip_loss(logp, *fixed).loss))


def test_prm_loss(benchmark, rows):
    fixed = rows["old"], rows["cu_seqlens"], rows["outcomes"]
    benchmark(forward_and_backward(rows["new"], lambda logp: prm_loss(logp, *fixed).loss))


@pytest.mark.parametrize("granularity", ["token", "whole"])
def test_implicit_reward(benchmark, rows, granularity):
    cuts = None if granularity == "token" else rows["cu_seqlens"]
    benchmark(
        forward_and_backward(
            rows["new"],
            lambda logp: implicit_reward(logp, rows["old"], cu_seqlens=cuts, granularity=granularity).sum(),
        )
    )


def test_leave_one_out_advantages(benchmark, rows):
    rewards = rows["new"].view(SEQUENCES, -1)
    group = torch.arange(SEQUENCES, device=DEVICE) // 8
    benchmark(lambda: leave_one_out(rewards, torch.ones_like(rewards, dtype=torch.bool), group))
