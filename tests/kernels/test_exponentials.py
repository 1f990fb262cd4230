"""The one pass that keeps exponentials instead of logits: rows far from their offsets, and rows that do not count."""

import pytest
import torch

from prime_kernels import linear_logprob, linear_token_loss, reference
from prime_kernels.plan import one_pass_strategy
from tests.support.oracle import BF16, F16, F32, F64, RUNS

FUSED = [run for run in RUNS if run.values[1] == "fused"]
# Two whole tiles of the interpreter's and a rest, nine of a GPU's.
N, D, V = 12, 16, 2100


def head(device, dtype=BF16, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return hidden.to(device, dtype), weight.to(device, dtype), torch.randint(V, (N,), generator=g).to(device)


def loss_of(logp, _):
    return -logp


def of(op, hidden, weight, targets, **options):
    """Log-probs and gradients of −Σ log p, in fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    if op is linear_token_loss:
        out = op(*leaves, targets, loss_of, backend="fused", **options)
        out.loss.backward()
    else:
        out = op(*leaves, targets, **options)
        (-out.logp).sum().backward()
    return [out.logp.detach().double(), *(t.grad.double() for t in leaves)]


def assert_rows_exact(hidden, weight, targets, **options):
    """Every log-prob and every row of dX against fp64, to a few roundings of 16 bits; dW as a whole."""
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = of(reference.linear_logprob, hidden.double(), weight.double(), targets, **doubles)
    got = of(linear_token_loss, hidden, weight, targets, **options)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    eps = torch.finfo(BF16).eps
    assert ((got[1] - want[1]).norm(dim=1) <= 2 * eps * want[1].norm(dim=1) + 1e-30).all()
    assert (got[2] - want[2]).norm() <= 2 * eps * want[2].norm()
    return got


@pytest.mark.parametrize("place", [3, 2090])
@pytest.mark.parametrize("lead", [10.0, 60.0, 400.0])
@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_a_column_far_above_the_target_keeps_every_rows_gradient(device, backend, lead, place):
    hidden, weight, targets = head(device)
    hidden[:, 0], weight[:, 0] = 1, 0
    weight[place, 0] = lead
    hidden[::2, 0] = 0  # every other row knows nothing of it
    assert_rows_exact(hidden, weight, targets)


@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_columns_far_above_the_target_in_several_tiles_share_one_offset(device, backend):
    hidden, weight, targets = head(device)
    hidden[:, 0], weight[:, 0] = 1, 0
    weight[5, 0], weight[1500, 0], weight[2099, 0] = 90, 92, 89.5
    assert_rows_exact(hidden, weight, targets)


@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_a_target_that_leads_by_30_nats_keeps_its_gradient(device, backend):
    hidden, weight, _ = head(device)
    hidden[:, 0], weight[:, 0] = 1, 0
    weight[7] = 0
    weight[7, 0] = 34
    targets = torch.full((N,), 7, device=device)
    got = assert_rows_exact(hidden, weight, targets)
    assert (got[0] < 0).all()


@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_low_temperatures_keep_every_rows_gradient(device, backend):
    hidden, weight, targets = head(device)
    assert_rows_exact(hidden, weight, targets, temperature=torch.logspace(-1.3, 1, N, device=device))


@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_banned_columns_and_banned_targets_are_as_in_two_passes(device, backend):
    hidden, weight, targets = head(device)
    bias = torch.zeros(V, dtype=BF16, device=device)
    bias[targets[3]] = bias[1024:2048] = -torch.inf
    targets[4] = 5
    got = of(linear_token_loss, hidden, weight, targets, bias=bias)
    logp = linear_logprob(hidden, weight, targets, bias=bias, backend="chunked").logp
    torch.testing.assert_close(got[0].float(), logp)
    assert got[0][3] == -torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("device", "backend"), FUSED)
def test_a_row_that_does_not_count_leaves_no_trace_and_one_that_does_is_no_number(device, backend, value):
    hidden, weight, targets = head(device)
    clean = of(linear_token_loss, hidden[1:], weight, targets[1:])
    hidden[0] = value
    got = of(linear_token_loss, hidden, weight, targets)
    assert not got[0][0].isfinite()
    assert not got[1][0].isfinite().any()
    assert torch.equal(got[1][1:], clean[1])
    targets[0] = -100
    got = of(linear_token_loss, hidden, weight, targets)
    assert (got[1][0] == 0).all()
    assert torch.equal(got[1][1:], clean[1])
    torch.testing.assert_close(got[2], clean[2], rtol=2**-7, atol=0)


def test_what_exponentials_in_16_bits_cannot_tell_is_kept_as_logits():
    kinds = {"dtype": BF16, "softcap": None, "entropy_gradient": False}
    assert one_pass_strategy("fused", **kinds) == "fused"
    for other in ({"dtype": F16}, {"dtype": F32}, {"softcap": 30.0}, {"entropy_gradient": True}):
        assert one_pass_strategy("fused", **{**kinds, **other}) == "chunked"
    assert one_pass_strategy("torch", **{**kinds, "dtype": F64}) == "torch"
