"""Arguments of any strides: columns of larger tensors, expanded ones, transposed ones."""

from typing import Any

import pytest
import torch

from prime_kernels import implicit_reward, linear_logprob, linear_ppo_loss, linear_prm_loss, prm_loss
from tests.support.oracle import BF16, F32, RUNS, make_inputs

N, D, V = 21, 16, 37


def spread(t: torch.Tensor) -> torch.Tensor:
    """t with other numbers between its own."""
    wide = torch.full((*t.shape, 2), 7, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_numbers_between_those_of_an_argument_are_not_read(device, backend):
    x = make_inputs(N, D, V, BF16 if backend == "fused" else F32, device, bias=True)
    rows = [x.dlogp - 4, x.dlogp, x.dentropy.abs()]
    bounds, outcomes = torch.tensor([0, 5, 6, N]), torch.tensor([1.0, 0.0, 0.3], device=device)
    found = []
    for change in (torch.clone, spread):
        leaves = [change(t.detach()).requires_grad_() for t in (x.hidden, x.weight, x.bias)]
        hidden, weight, bias = leaves
        head = {"bias": bias, "backend": backend, "temperature": change(rows[2] + 0.5)}
        targets = change(x.targets)
        out = linear_logprob(hidden, weight, targets, entropy=True, **head)
        ppo = linear_ppo_loss(hidden, weight, targets, *map(change, rows), entropy_coef=0.1, **head)
        prm = linear_prm_loss(hidden, weight, targets, change(rows[0]), change(bounds), change(outcomes), **head)
        loss = (out.logp * rows[1]).sum() + (out.entropy * change(rows[2])).sum() + ppo.loss + prm.loss
        loss.backward()
        given: dict[str, Any] = {"backend": "torch" if backend == "torch" else "triton"}
        of_given = prm_loss(change(rows[1]), change(rows[0]), change(bounds), change(outcomes), **given)
        given |= {"cu_seqlens": change(bounds), "granularity": "whole", "mask": change(rows[2])}
        whole = implicit_reward(change(rows[1]), change(rows[0]), **given)
        found.append([*out, ppo.loss, *prm, *of_given, whole, *(t.grad for t in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype is BF16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_one_number_may_stand_for_all(device, backend):
    x = make_inputs(N, D, V, BF16 if backend == "fused" else F32, device)
    zero = torch.zeros(1, dtype=x.hidden.dtype, device=device)
    one = torch.ones(1, device=device)
    out = linear_logprob(x.hidden, x.weight, x.targets, bias=zero.expand(V), temperature=one.expand(N), backend=backend)
    torch.testing.assert_close(out.logp, linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp)
