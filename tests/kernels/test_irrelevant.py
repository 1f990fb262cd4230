"""What does not count leaves no trace: ignored tokens, weights and advantages of 0, targets that are banned."""

import pytest
import torch

from prime_kernels import (
    linear_logprob,
    linear_ppo_loss,
    linear_prm_loss,
    linear_token_loss,
    ppo_clip_loss,
    prm_loss,
    reference,
)  # fmt: skip
from tests.support.oracle import BF16, F32, F64, RUNS, dtypes_of, make_inputs

N, D, V = 40, 16, 1030
DEAD = torch.arange(N) % 5 == 3


def leaves(x, frozen=()):
    tensors = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias}
    return {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in tensors.items()}


def losses(name, x, head, keep, **options):
    """A scalar in which tokens outside `keep` do not count, by weight, mask, upstream gradient or target."""
    args, bias = (head["hidden"], head["weight"], x.targets), head["bias"]
    share, one = keep.float() / 7, torch.ones_like(x.dlogp)
    ignored = (*args[:2], x.targets.masked_fill(~keep, -100))
    bounds, y = torch.tensor([0, 11, N]), torch.tensor([1.0, 0.0], device=keep.device)
    if name == "logprob, ignored":
        out = linear_logprob(*ignored, bias=bias, entropy=True, **options)
        return (out.logp * x.dlogp + out.entropy * x.dentropy).sum()
    if name == "logprob, upstream 0":
        out = linear_logprob(*args, bias=bias, entropy=True, **options)
        return torch.where(keep, out.logp * x.dlogp + out.entropy * x.dentropy, 0).sum()
    if name == "logprob alone, upstream 0":
        return torch.where(keep, linear_logprob(*args, bias=bias, **options).logp * x.dlogp, 0).sum()
    if name == "token, ignored":
        return linear_token_loss(
            *ignored, lambda lp, h, a: -a * lp - h, (share,), bias=bias, entropy=True, **options
        ).loss
    if name == "token, weight 0":
        fn = lambda lp, h, a: torch.where(a == 0, 0, -a * lp)  # noqa: E731
        return linear_token_loss(*args, fn, (share,), bias=bias, **options).loss
    if name == "ppo, weight 0":
        return linear_ppo_loss(*args, -7 * one, x.dlogp, share, entropy_coef=0.01, bias=bias, **options).loss
    if name == "prm, mask 0":
        return linear_prm_loss(*args, -7 * one, bounds, y, mask=keep.float(), bias=bias, **options).loss
    return linear_prm_loss(*ignored, -7 * one, bounds, y, bias=bias, **options).loss


NAMES = [
    "logprob, ignored", "logprob, upstream 0", "logprob alone, upstream 0", "token, ignored", "token, weight 0",
    "ppo, weight 0", "prm, mask 0", "prm, ignored",
]  # fmt: skip


def gradients(name, x, keep, frozen=(), **options):
    head = leaves(x, frozen)
    losses(name, x, head, keep, **options).backward()
    return {name: t.grad for name, t in head.items() if name not in frozen}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight", "bias")], ids=["all", "hidden-frozen", "head-frozen"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_hidden_states_that_do_not_count_leave_the_same_bits(device, backend, name, frozen, value):
    dtype = BF16 if backend == "fused" else F32
    x = make_inputs(N, D, V, dtype, device, bias=True)
    keep = ~DEAD.to(device)
    clean = gradients(name, x, keep, frozen, backend=backend)
    x.hidden[DEAD] = value
    dirty = gradients(name, x, keep, frozen, backend=backend)
    assert clean
    for which in clean:
        assert torch.equal(clean[which], dirty[which]), which
    if "hidden" not in frozen:
        assert dirty["hidden"][DEAD].eq(0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("workspace", [None, 400_000])
def test_so_they_do_in_several_blocks_of_tokens_and_slices_of_the_vocabulary(dtype, workspace):
    from prime_kernels import set_workspace

    x = make_inputs(400, 64, V, dtype, "cpu", bias=True)
    keep = torch.arange(400) % 7 != 2
    set_workspace(workspace)
    try:
        for name in ("logprob, upstream 0", "ppo, weight 0"):
            x.hidden[~keep] = 1
            clean = gradients(name, x, keep)
            x.hidden[~keep] = torch.nan
            assert all(torch.equal(t, gradients(name, x, keep)[which]) for which, t in clean.items())
    finally:
        set_workspace(None)


@pytest.mark.parametrize("name", ["logprob", "token", "ppo", "prm"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_hidden_state_that_counts_is_never_a_plausible_number(device, backend, name):
    x = make_inputs(N, D, V, BF16, device, bias=True)
    x.hidden[DEAD] = torch.nan
    keep = torch.ones(N, dtype=torch.bool, device=device)
    name = {"logprob": NAMES[1], "token": NAMES[4], "ppo": NAMES[5], "prm": NAMES[6]}[name]
    head = leaves(x)
    loss = losses(name, x, head, keep, backend=backend)
    loss.backward()
    assert loss.isnan()
    assert head["weight"].grad.isnan().any()
    assert head["hidden"].grad[DEAD].isnan().any()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_entropy_of_a_banned_target_is_that_of_the_others(device, backend):
    for dtype in dtypes_of(backend):
        x = make_inputs(N, D, V, dtype, device, bias=True)
        x.bias[x.targets[:9]] = -torch.inf
        out = linear_logprob(x.hidden, x.weight, x.targets, bias=x.bias, entropy=True, backend=backend)
        exact = x.to(F64)
        want = reference.linear_logprob(exact.hidden, exact.weight, x.targets, bias=exact.bias, entropy=True)
        assert out.logp[:9].eq(-torch.inf).all()
        torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [1, 2, 5])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_rows_with_few_columns_that_are_not_banned(device, backend, left):
    dtype = BF16 if backend == "fused" else F32
    x = make_inputs(N, D, V, dtype, device, bias=True)
    x.bias[left:] = -torch.inf
    targets = torch.arange(N, device=device) % (left + 3)  # some of them are banned
    out = linear_logprob(x.hidden, x.weight, targets, bias=x.bias, entropy=True, backend=backend)
    exact = x.to(F64)
    want = reference.linear_logprob(exact.hidden, exact.weight, targets, bias=exact.bias, entropy=True)
    torch.testing.assert_close(out.logp.double(), want.logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_banned_target_of_weight_0_leaves_every_gradient_finite(device, backend):
    dtype = BF16 if backend == "fused" else F32
    x = make_inputs(N, D, V, dtype, device, bias=True)
    keep = ~DEAD.to(device)
    x.targets.masked_fill_(~keep, 0)
    x.targets.masked_fill_(keep & (x.targets == 0), 1)
    x.bias[0] = -torch.inf
    head = leaves(x)
    rows = [torch.full((N,), -5.0, device=device), x.dlogp, keep / 9]
    out = linear_ppo_loss(
        head["hidden"], head["weight"], x.targets, *rows, bias=head["bias"], entropy_coef=0.01, backend=backend
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(t.grad.isfinite().all() for t in head.values())


BEYOND = torch.tensor([-100.0, -200.0, -1000.0])  # old log-probs; e^(−1 − old) is infinite in fp32


@pytest.mark.parametrize(("device", "backend"), [RUNS[0], RUNS[1], RUNS[4]])
@pytest.mark.parametrize("options", [{}, {"dual_clip": 3.0}, {"clip_low": 0.9}, {"entropy_coef": 0.1}], ids=str)
def test_an_advantage_or_importance_of_0_is_0_however_large_the_ratio(device, backend, options):
    logp = torch.full((3,), -1.0, device=device, requires_grad=True)
    old, one, zero = BEYOND.to(device), torch.ones(3, device=device), torch.zeros(3, device=device)
    options = {"backend": "torch" if backend == "torch" else "triton", "entropy": zero, **options}
    for advantages, importance in ((zero, None), (-zero, None), (zero, one), (-one, zero), (one, zero)):
        out = ppo_clip_loss(logp, old, advantages, one, importance=importance, **options)
        (gradient,) = torch.autograd.grad(out.loss, logp)
        assert out.loss == 0
        assert gradient.eq(0).all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_groups_of_equal_rewards_train_nothing_and_break_nothing(device, backend):
    dtype = BF16 if backend == "fused" else F32
    x = make_inputs(N, D, V, dtype, device, bias=True)
    head = leaves(x)
    advantages = x.dlogp.masked_fill(DEAD.to(device), 0)
    old = torch.where(DEAD.to(device), -500.0, -5.0)
    out = linear_ppo_loss(
        head["hidden"], head["weight"], x.targets, old, advantages, torch.ones_like(old), bias=head["bias"],
        backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(t.grad.isfinite().all() for t in head.values())
    assert head["hidden"].grad[DEAD].eq(0).all()


@pytest.mark.parametrize(("device", "backend"), [RUNS[0], RUNS[1], RUNS[4]])
@pytest.mark.parametrize("which", ["old_logp", "advantages", "importance", "ref_logp"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_input_that_is_no_number_makes_the_loss_nan_even_beside_a_0(device, backend, which, value):
    logp = torch.full((3,), -1.0, device=device, requires_grad=True)
    one = torch.ones(3, device=device)
    rows = {"old_logp": -one, "advantages": 0 * one, "importance": 0 * one, "ref_logp": -one}
    rows[which] = torch.tensor([1.0, value, 1.0], device=device)
    out = ppo_clip_loss(
        logp, token_weight=one, kl_coef=0.1, backend="torch" if backend == "torch" else "triton", **rows
    )
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.isnan()
    assert gradient[1].isnan()


def test_a_reference_without_a_coefficient_is_not_looked_at():
    logp, one = torch.full((2,), -1.0), torch.ones(2)
    out = ppo_clip_loss(logp, logp, one, one, ref_logp=torch.full((2,), torch.nan))
    assert out.loss == -2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_masked_tokens_gradient_is_0_beside_a_token_that_is_nan(backend):
    logp = torch.randn(8)
    logp[3] = torch.nan
    logp.requires_grad_()
    mask = torch.ones(8)
    mask[5] = 0
    prm_loss(logp, torch.zeros(8), torch.tensor([0, 8]), torch.ones(1), mask=mask, backend=backend).loss.backward()
    assert logp.grad[5] == 0
    assert logp.grad[0].isnan()
