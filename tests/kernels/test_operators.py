"""Operators: graphs for any number of tokens, tensors without numbers, derivatives that are refused."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from prime_kernels import (
    implicit_reward,
    linear_logprob,
    linear_ppo_loss,
    linear_prm_loss,
    linear_token_loss,
    ppo_clip_loss,
    prm_loss,
)  # fmt: skip
from tests.support.oracle import F32

D, V = 8, 13


def rows(h):
    return [h[:, i].detach() for i in range(3)]


# Scalars made of hidden [N, D], weight [V, D], targets [N], boundaries [S + 1] and outcomes [S] by every op.
OPS: dict[str, Callable[..., torch.Tensor]] = {
    "logprob": lambda h, w, t, cu, y: linear_logprob(h, w, t, temperature=0.8).logp.sum(),
    "entropy": lambda h, w, t, cu, y: linear_logprob(h, w, t, softcap=20.0, entropy=True).entropy.sum(),  # type: ignore[union-attr]
    "temperatures": lambda h, w, t, cu, y: linear_logprob(h, w, t, temperature=h[:, 0].detach().exp()).logp.sum(),
    "frozen": lambda h, w, t, cu, y: linear_logprob(h, w.detach(), t).logp.sum(),
    "token": lambda h, w, t, cu, y: linear_token_loss(h * 2, w, t, lambda logp, _: -logp).loss * 3,
    "ppo": lambda h, w, t, cu, y: linear_ppo_loss(h, w, t, *rows(h), entropy_coef=0.01).loss,
    "prm": lambda h, w, t, cu, y: linear_prm_loss(h, w, t, rows(h)[0], cu, y).loss,
    "dpo": lambda h, w, t, cu, y: linear_prm_loss(h, w, t, rows(h)[0], cu, y, kind="dpo", group_ids=y > 2).loss,
    "given ppo": lambda h, w, t, cu, y: ppo_clip_loss((h @ w.T)[:, 0], *rows(h)).loss,
    "given prm": lambda h, w, t, cu, y: prm_loss((h @ w.T)[:, 0], rows(h)[0], cu, y).loss,
    "reward": lambda h, w, t, cu, y: implicit_reward((h @ w.T)[:, 0], rows(h)[0]).square().sum(),
    "whole": lambda h, w, t, cu, y: implicit_reward(
        (h @ w.T)[:, 0], rows(h)[0], cu_seqlens=cu, granularity="whole", mask=rows(h)[1]
    ).square().sum(),
}  # fmt: skip


def arguments(N: int, S: int = 1, device: str = "cpu"):
    g = torch.Generator().manual_seed(N)
    hidden = torch.randn(N, D, generator=g).to(device).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(device).requires_grad_()
    bounds = torch.tensor([*range(S), N])
    outcomes = torch.arange(S).remainder(2).float().to(device)
    return hidden, weight, torch.randint(V, (N,), generator=g).to(device), bounds, outcomes


def gradients(loss, hidden, weight):
    found = torch.autograd.grad(loss, (hidden, weight), allow_unused=True)
    return [t for t in found if t is not None]


@pytest.mark.parametrize("name", OPS)
def test_eleven_numbers_of_tokens_compile_to_two_graphs_at_the_most(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    # A token loss calls Python: it runs between a graph before it and one after it.
    compiled = torch.compile(OPS[name], backend=counter, fullgraph=name != "token", dynamic=True)
    for N in range(5, 16):
        args = arguments(N, S=2 + N % 2)
        got = compiled(*args)
        torch.testing.assert_close(got, OPS[name](*args))
        for a, b in zip(gradients(got, *args[:2]), gradients(OPS[name](*args), *args[:2]), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", [name for name in OPS if name != "token"])
def test_a_number_of_tokens_that_is_marked_dynamic_stays_one(name):
    torch._dynamo.reset()
    compiled = torch.compile(OPS[name], backend="aot_eager", fullgraph=True)
    for N in (7, 12):
        args = arguments(N)
        for t in (args[0], args[2]):
            torch._dynamo.mark_dynamic(t, 0)
        compiled(*args)


def test_export_keeps_the_number_of_tokens_open():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(V, D))

        def forward(self, hidden, targets):
            return linear_logprob(hidden, self.weight, targets, entropy=True).logp

    head, N = Head(), torch.export.Dim("N", min=2, max=4096)
    hidden, _, targets, *_ = arguments(6)
    program = torch.export.export(head, (hidden, targets), dynamic_shapes=({0: N}, {0: N}))
    hidden, _, targets, *_ = arguments(31)
    torch.testing.assert_close(program.module()(hidden, targets), head(hidden, targets))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_numbers_pass_forward_and_backward(name, kind):
    if kind == "meta":
        args = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in arguments(6)]
        args[3] = arguments(6)[3]  # boundaries are on the host as ever
        found = gradients(OPS[name](*args), *args[:2])
    else:
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode() as mode:
            args = [mode.from_tensor(t) for t in arguments(6)]
            found = gradients(OPS[name](*args), *args[:2])
    assert found
    assert all(t.shape in ((6, D), (V, D)) for t in found)


TWICE = ("reward", "whole")


@pytest.mark.parametrize("name", [name for name in OPS if name not in TWICE])
@pytest.mark.parametrize("kind", ["alone", "beside another term", "by backward"])
def test_a_second_derivative_is_refused_where_there_is_none(name, kind):
    hidden, weight, targets, bounds, outcomes = arguments(7, S=2)
    # Log-probs that are given depend on hidden through a product, which has a derivative of its own.
    loss = OPS[name](hidden, weight, targets, bounds, outcomes) ** 2
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    penalty = gradient.square().sum()
    if kind == "beside another term":
        penalty = penalty + hidden.square().sum()
    with pytest.raises(RuntimeError, match=r"has no second derivative: .* use prime_kernels.reference"):
        penalty.backward() if kind == "by backward" else torch.autograd.grad(penalty, hidden)


@pytest.mark.parametrize("name", [name for name in OPS if name not in TWICE])
def test_a_second_derivative_is_refused_with_the_loss_as_it_is(name):
    # Without a factor on the loss nothing that comes from above wants a gradient.
    args = arguments(7, S=2)
    (gradient,) = torch.autograd.grad(OPS[name](*args), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(gradient.square().sum() + args[0].sum(), args[0])


def test_rewards_have_every_derivative():
    logp, ref = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    for options in ({}, {"cu_seqlens": torch.tensor([0, 3, 7]), "granularity": "whole"}):
        assert torch.autograd.gradgradcheck(lambda t, o=options: implicit_reward(t, ref, **o).pow(3), (logp,))


@pytest.mark.parametrize("name", OPS)
def test_a_forward_mode_derivative_is_refused_not_dropped(name):
    hidden, weight, targets, bounds, outcomes = (t.detach() for t in arguments(6))
    with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative, and \w+ carries a tangent"):
        torch.func.jvp(
            lambda h: OPS[name](h, weight, targets, bounds, outcomes), (hidden,), (torch.ones_like(hidden),)
        )  # fmt: skip


def test_so_is_that_of_a_temperature_or_a_mask():
    hidden, weight, targets, *_ = (t.detach() for t in arguments(6))
    tau = torch.ones(6)
    with pytest.raises(NotImplementedError, match="and temperature carries a tangent"):
        torch.func.jvp(lambda t: linear_logprob(hidden, weight, targets, temperature=t).logp, (tau,), (tau,))
    with pytest.raises(NotImplementedError, match="and mask carries a tangent"):
        torch.func.jvp(lambda m: implicit_reward(tau, -tau, mask=m), (tau,), (tau,))


@pytest.mark.parametrize("name", OPS)
def test_derivatives_of_function_transforms_are_refused(name):
    hidden, weight, targets, bounds, outcomes = (t.detach() for t in arguments(6))
    with pytest.raises(NotImplementedError, match=r"has no derivative of torch.func, which \w+ is under"):
        torch.func.grad(lambda h: OPS[name](h, weight, targets, bounds, outcomes))(hidden)


def test_results_of_any_shape_are_no_views():
    hidden, weight, targets, *_ = arguments(6)
    hidden, targets = hidden.view(2, 3, D), targets.view(2, 3)
    one = torch.ones(2, 3)
    out = linear_logprob(hidden, weight, targets, entropy=True)
    ppo = linear_ppo_loss(hidden, weight, targets, one, one, one)
    token = linear_token_loss(hidden, weight, targets, lambda logp, entropy: -logp, entropy=True)
    for t in (*out, linear_logprob(hidden, weight.detach(), targets).logp, ppo.logp, ppo.entropy, *token[1:]):
        assert t.shape == (2, 3)
        assert t.dtype == F32
        assert not t._is_view()
