"""Arguments of any strides: columns of larger tensors, expanded ones, transposed ones."""

import math
from typing import Any

import pytest
import torch

from prime_kernels import implicit_reward, linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss, prm_loss
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
        if a.dtype is BF16:
            assert (a - b).norm() <= 1e-2 * b.norm()
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_one_number_may_stand_for_all(device, backend):
    x = make_inputs(N, D, V, BF16 if backend == "fused" else F32, device)
    zero = torch.zeros(1, dtype=x.hidden.dtype, device=device)
    one = torch.ones(1, device=device)
    out = linear_logprob(x.hidden, x.weight, x.targets, bias=zero.expand(V), temperature=one.expand(N), backend=backend)
    torch.testing.assert_close(out.logp, linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp)


@pytest.mark.parametrize("width", [58, 60, 62])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_padded_rows_of_a_width_that_no_dense_copy_could_align_run_chunked(width, dtype):
    g = torch.Generator().manual_seed(width)
    hidden, weight = (torch.randn(n, 64, generator=g).to(dtype)[:, :width].detach().requires_grad_() for n in (20, 70))
    targets = torch.arange(20)
    for op in (
        lambda backend: linear_logprob(hidden, weight, targets, backend=backend).logp.sum(),
        lambda backend: linear_ppo_loss(hidden, weight, targets, *torch.ones(3, 20), backend=backend).loss,
    ):
        fused, chunked = (torch.autograd.grad(op(backend), (hidden, weight)) for backend in ("fused", "chunked"))
        assert all(torch.equal(a, b) for a, b in zip(fused, chunked, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "chunked"])
def test_a_hidden_size_of_0_makes_every_token_as_likely(backend, dtype):
    hidden, weight = torch.zeros(3, 0, dtype=dtype).requires_grad_(), torch.zeros(5, 0, dtype=dtype).requires_grad_()
    out = linear_logprob(hidden, weight, torch.tensor([0, 1, 4]), entropy=True, backend=backend)
    out.logp.sum().backward()
    torch.testing.assert_close(out.logp, torch.full((3,), -math.log(5)))
    torch.testing.assert_close(out.entropy, torch.full((3,), math.log(5)))
    args, one = (hidden, weight, torch.tensor([0, 1, 4])), torch.ones(3)
    for found in (
        linear_ppo_loss(*args, -one, one, one, backend=backend).logp,
        linear_token_loss(*args, lambda logp, _: -logp, backend=backend).logp,
        linear_prm_loss(*args, 0 * one, torch.tensor([0, 3]), one[:1], beta=1.0, backend=backend).reward,
    ):
        torch.testing.assert_close(found, torch.full((3,), -math.log(5)))


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_tensor_that_is_the_negative_of_its_memory_is_read_as_what_it_is(device, backend):
    x = make_inputs(N, D, V, BF16, device, bias=True)
    tau = torch.rand(N, device=device) + 0.5

    def losses(negative):
        def of(t):
            return torch._neg_view(-t) if negative else t

        args, more = (of(x.hidden), of(x.weight), x.targets), {"bias": of(x.bias), "temperature": of(tau)}
        yield linear_token_loss(*args, lambda logp, _, a: -a * logp, (of(x.dlogp),), backend=backend, **more).loss
        rows = (of(x.dlogp), of(x.dlogp), of(x.dentropy))
        yield linear_ppo_loss(*args, *rows, backend=backend, **more).loss

    for ours, want in zip(losses(True), losses(False), strict=True):
        assert torch.equal(ours, want)


def test_the_default_device_is_none_of_the_ops_business():
    x = make_inputs(N, D, V, F32, "cpu")
    logp, ref = torch.randn(2, 5), torch.randn(2, 5)
    with torch.device("meta"):
        assert linear_logprob(x.hidden, x.weight, x.targets).logp.device.type == "cpu"
        assert linear_token_loss(x.hidden, x.weight, x.targets, lambda logp, _: -logp).loss.device.type == "cpu"
        assert implicit_reward(logp, ref, granularity="whole").device.type == "cpu"
