"""linear_token_loss: the field's policy losses as a few lines each, equal to autograd on full logits."""

import pytest
import torch

from prime_kernels import gemm, linear_token_loss, reference, set_workspace
from tests.support.oracle import BF16, F32, F64, RUNS, RUNS_BY_DTYPE, assert_loss_exact, make_inputs, run_loss


def reinforce(logp, entropy, A, w, old):
    return -w * A * logp


def grpo(logp, entropy, A, w, old):
    ratio = torch.exp(logp - old)
    return -w * torch.minimum(A * ratio, A * ratio.clamp(0.8, 1.2))


def dapo(logp, entropy, A, w, old):
    ratio = torch.exp(logp - old)
    return -w * torch.minimum(A * ratio, A * ratio.clamp(0.8, 1.28))


def cispo(logp, entropy, A, w, old):
    return -w * A * torch.exp(logp - old).clamp(max=1.28).detach() * logp


def dr_grpo(logp, entropy, A, w, old):
    # No standard deviation in A, one constant length in place of each sequence's own.
    return grpo(logp, entropy, A, torch.ones_like(w) / 1024, old)


def cross_entropy(logp, entropy, A, w, old):
    return -logp / 64


def with_entropy_bonus(logp, entropy, A, w, old):
    return reinforce(logp, entropy, A, w, old) - 0.01 * w * entropy


LOSSES = [reinforce, grpo, dapo, cispo, dr_grpo, cross_entropy, with_entropy_bonus]


def tokens(x, seed=3):
    """Advantages, weights (some 0) and old log-probs near the new ones."""
    g = torch.Generator().manual_seed(seed)
    N = len(x.targets)
    new = reference.linear_logprob(x.hidden.double().cpu(), x.weight.double().cpu(), x.targets.cpu()).logp
    A, kept, noise = torch.randn(N, generator=g), torch.rand(N, generator=g) > 0.2, torch.randn(N, generator=g)
    return tuple(t.float().to(x.hidden.device) for t in (A, kept / N, new + 0.3 * noise))


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_every_policy_loss_equals_autograd_on_full_logits(device, backend, dtype, loss_fn):
    x = make_inputs(33, 40, 301, dtype, device, scale=2.0)
    options = {"entropy": loss_fn is with_entropy_bonus}
    assert_loss_exact(linear_token_loss, reference.linear_token_loss, x, loss_fn, tokens(x), backend=backend, **options)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_head_options_and_ignored_tokens(device, backend):
    x = make_inputs(19, 40, 301, BF16, device, scale=4.0, bias=True)
    A = tokens(x)
    x.targets[::4] = -100
    options = {"temperature": torch.linspace(0.5, 2, 19, device=device), "softcap": 20.0}
    got = assert_loss_exact(linear_token_loss, reference.linear_token_loss, x, reinforce, A, backend=backend, **options)
    assert (got["dhidden"][::4] == 0).all()


@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_chunks_change_results_by_rounding_only(device, backend, dtype):
    x = make_inputs(60, 16, 301, dtype, device, bias=True)
    A = tokens(x)
    whole = run_loss(linear_token_loss, x, with_entropy_bonus, A, backend=backend, entropy=True)
    for workspace in (130_000, 48_000):  # several chunks in one pass: in the first plain torch, in the second kernels
        set_workspace(workspace)
        got = run_loss(linear_token_loss, x, with_entropy_bonus, A, backend=backend, entropy=True)
        for name, value in whole.items():
            rtol = 1e-5 if name in ("loss", "logp") or dtype is F32 else 2**-7
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=1e-5 * float(value.abs().max()) + 1e-12)


def test_upstream_gradient_scales_stored_gradients_and_backward_runs_once():
    x = make_inputs(9, 16, 37, F64, "cpu")
    A = tuple(t.double() for t in tokens(x))
    one = run_loss(linear_token_loss, x, reinforce, A)
    weight = x.weight.requires_grad_()
    out = linear_token_loss(x.hidden, weight, x.targets, reinforce, A)
    (out.loss * 3).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 3 * one["dweight"])
    with pytest.raises(RuntimeError, match="backward, which can run once"):
        out.loss.backward()


def test_no_gradients_are_computed_where_none_are_wanted():
    x = make_inputs(9, 16, 37, F32, "cpu")
    with torch.no_grad():
        out = linear_token_loss(x.hidden.requires_grad_(), x.weight, x.targets, reinforce, tokens(x))
    assert not out.loss.requires_grad
    want = reference.linear_token_loss(x.hidden, x.weight, x.targets, reinforce, tokens(x)).loss
    torch.testing.assert_close(out.loss, want.detach())


def test_a_frozen_weight_gets_no_gradient_and_hidden_the_same():
    x = make_inputs(9, 16, 37, F32, "cpu")
    both = run_loss(linear_token_loss, x, reinforce, tokens(x))
    hidden = x.hidden.requires_grad_()
    linear_token_loss(hidden, x.weight, x.targets, reinforce, tokens(x)).loss.backward()
    assert x.weight.grad is None
    torch.testing.assert_close(hidden.grad.double(), both["dhidden"])


def test_no_tokens_give_loss_zero_and_zero_gradients():
    got = run_loss(linear_token_loss, make_inputs(0, 16, 37, BF16, "cpu"), cross_entropy, (torch.zeros(0),) * 3)
    assert got["loss"] == 0
    assert (got["dweight"] == 0).all()


def test_bad_input_is_refused_by_name():
    x = make_inputs(9, 16, 37, F32, "cpu")
    args = x.hidden, x.weight, x.targets
    with pytest.raises(ValueError, match=r"inputs\[1\] must have the targets' shape \[9\], got \[8\]"):
        linear_token_loss(*args, reinforce, (torch.ones(9), torch.ones(8)))
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a tensor, got float"):
        linear_token_loss(*args, reinforce, (1.0,))
    with pytest.raises(ValueError, match=r"loss_fn must return a loss for each of 9 tokens, got \[\]"):
        linear_token_loss(*args, lambda logp, entropy: logp.mean())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loss_that_closes_over_a_parameter_is_refused_whether_or_not_the_head_trains(frozen):
    x = make_inputs(6, 8, 9, F32, "cpu")
    scale = torch.ones(1, requires_grad=True)
    hidden, weight = (t.detach().requires_grad_(not frozen) for t in (x.hidden, x.weight))
    with pytest.raises(ValueError, match=r"loss_fn must not use tensors that require a gradient .* of shape \[1\]"):
        linear_token_loss(hidden, weight, x.targets, lambda logp, _: -scale * logp)
    with torch.no_grad():  # where nobody expects one
        out = linear_token_loss(hidden, weight, x.targets, lambda logp, _: -scale * logp)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, -out.logp.sum())


def test_without_gradients_no_product_of_them_is_made(monkeypatch):
    x = make_inputs(6, 8, 9, F32, "cpu")
    made = []
    mm = gemm.mm
    monkeypatch.setattr(gemm, "mm", lambda a, b, out: (made.append(tuple(out.shape)), mm(a, b, out))[1])
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    with torch.no_grad():
        linear_token_loss(hidden, weight, x.targets, lambda logp, _: -logp)
    assert made == [(6, 9)]
