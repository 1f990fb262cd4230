"""One-pass losses: gradients are rounded once, whatever comes from above, and never below what their dtype holds."""

import pytest
import torch

import prime_kernels
from benchmarks.harness import peak_memory
from prime_kernels import gemm, linear_ppo_loss, linear_prm_loss, linear_token_loss, reference, set_workspace
from prime_kernels import onepass as engine
from prime_kernels.workspace import MIB
from tests.support.oracle import BF16, F16, F32, F64, RUNS, RUNS_BY_DTYPE, make_inputs


def weighted(logp, entropy, share):
    return -share * logp


def gradients(op, x, share, upstream, **options):
    """Of hidden and weight in fp64, with a factor on the loss."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (x.hidden, x.weight))
    loss = op(hidden, weight, x.targets, weighted, (share.to(hidden.dtype if hidden.dtype is F64 else F32),), **options)
    (loss.loss * upstream).backward()
    return [t.grad.double() for t in (hidden, weight)]


def errors(found, exact):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def plain(hidden, weight, targets, loss_fn, inputs):
    """Plain torch as trainers write it: logits in the inputs' dtype, statistics in fp32."""
    logits = hidden @ weight.T
    logp = logits.to(torch.promote_types(logits.dtype, F32)).log_softmax(-1)
    return reference.TokenLoss(loss_fn(logp.gather(-1, targets[:, None])[:, 0], None, *inputs).sum(), logp, None)


# What a loss scaler multiplies by, and the weight that a token has in a large batch.
@pytest.mark.parametrize(("share", "upstream"), [(1 / 65536, 2.0**16), (1e-6, 2.0**16), (1e-7, 2.0**20), (1.0, 1.0)])
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_small_weights_under_a_loss_scale_keep_the_error_bound(device, backend, dtype, share, upstream):
    x = make_inputs(64, 32, 1030, dtype, device, scale=2.0)
    shares = torch.full((64,), share, device=device)
    exact = gradients(plain, x.to(F64), shares, upstream)
    got = gradients(linear_token_loss, x, shares, upstream, backend=backend)
    for ours, theirs in zip(errors(got, exact), errors(gradients(plain, x, shares, upstream), exact), strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 7.7, 1e-4])
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_gradients_are_rounded_once_whatever_comes_from_above(device, backend, dtype, upstream):
    x = make_inputs(40, 32, 700, dtype, device)
    shares = torch.rand(40, generator=torch.Generator().manual_seed(1)).to(device)
    exact = gradients(plain, x.to(F64), shares, upstream)
    # A second rounding would make the error √2 times as large. On a GPU there are some before: that of dZ, or in
    # "fused" those of the exponentials, of their sum, and of the rows that they meet.
    roundings = 1 if device == "cpu" or dtype == F32 else 4 if (backend, dtype) == ("fused", BF16) else 2
    for found, want in zip(gradients(linear_token_loss, x, shares, upstream, backend=backend), exact, strict=True):
        once = want.to(dtype).double()
        assert (found - want).norm() <= 1.05 * roundings**0.5 * (once - want).norm() + 1e-6 * want.norm()


def test_a_factor_from_above_is_exact_in_fp64():
    x = make_inputs(20, 16, 50, F64, "cpu")
    shares = torch.rand(20, dtype=F64)
    for found, want in zip(
        gradients(linear_token_loss, x, shares, 1 / 3), gradients(plain, x, shares, 1 / 3), strict=True
    ):
        assert (found - want).norm() <= 1e-14 * want.norm()


@pytest.fixture
def products_in_fp16(monkeypatch):
    """Products as a GPU makes them of fp16: dZ is rounded to it, sums are fp32."""
    monkeypatch.setattr(gemm, "needs_upcast", lambda t: False)
    monkeypatch.setattr(gemm, "mm", lambda a, b, out: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(gemm, "addmm", lambda acc, a, b: acc.add_(a.float() @ b.float()))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("share", "upstream"), [(1e-6, 2.0**16), (1e-8, 2.0**24), (3e4, 1e-4)])
def test_dz_in_fp16_carries_a_power_of_two(products_in_fp16, monkeypatch, share, upstream, passes):
    x = make_inputs(96, 32, 2000, F16, "cpu", scale=3.0)
    shares = torch.full((96,), share)
    if passes == 2:
        monkeypatch.setattr(engine, "plan_one_pass", lambda *_, **__: engine.OnePass(rows=0, cols=2000, passes=2))
    exact = gradients(plain, x.to(F64), shares, upstream)
    assert max(errors(gradients(linear_token_loss, x, shares, upstream), exact)) <= 2 * torch.finfo(F16).eps


def test_the_power_of_two_follows_chunks_of_very_different_sizes(products_in_fp16, monkeypatch):
    x = make_inputs(96, 32, 2000, F16, "cpu", scale=3.0)
    shares = torch.cat([torch.full((24,), s) for s in (1e-6, 1e-2, 0.0, 3e-6)])
    # Chunks are 24 tokens.
    monkeypatch.setattr(engine, "plan_one_pass", lambda *_, **__: engine.OnePass(rows=24, cols=2000, passes=1))
    exact = gradients(plain, x.to(F64), shares, 1024.0)
    found = gradients(linear_token_loss, x, shares, 1024.0)
    assert max(errors(found, exact)) <= 2 * torch.finfo(F16).eps
    assert errors([found[0][:24]], [exact[0][:24]])[0] <= 2e-2  # in subnormal numbers of fp16, as plain torch's


@pytest.mark.parametrize(
    "shares",
    [(1e10, 1e-30, 1e10), (1e-30, 1e10, 1e-30), (1e10, 1e-10, 1e-30), (1e-35, 1e-5, 1e15), (1e15, 0.0, 1e-38)],
)
def test_derivatives_further_apart_than_fp16_reaches_are_right_or_0(products_in_fp16, monkeypatch, shares):
    x = make_inputs(72, 32, 2000, F16, "cpu", scale=3.0)
    monkeypatch.setattr(engine, "plan_one_pass", lambda *_, **__: engine.OnePass(rows=24, cols=2000, passes=1))
    each, upstream = torch.cat([torch.full((24,), s) for s in shares]), 1 / max(shares)
    exact = gradients(plain, x.to(F64), each, upstream)
    found = gradients(linear_token_loss, x, each, upstream)
    assert errors(found[1:], exact[1:])[0] <= 2 * torch.finfo(F16).eps
    for ours, right in zip(found[0].split(24), exact[0].split(24), strict=True):
        assert ((ours - right).abs() <= 2 * torch.finfo(F16).eps * right.abs().max() + 2.0**-24).all()


@pytest.mark.parametrize("tau", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("kind", ["loss", "entropy", "frozen"])
def test_a_token_with_a_tiny_temperature_costs_the_others_no_precision_in_fp16(products_in_fp16, kind, tau):
    x = make_inputs(32, 32, 2000, F16, "cpu", scale=3.0)
    x.targets[0] = (x.hidden[0].float() @ x.weight.float().T).argmax()  # which it then is sure of
    temperature = torch.ones(32)
    temperature[0] = tau

    def dx(op, hidden, weight):
        leaf = hidden.detach().requires_grad_()
        more = {"temperature": temperature.to(F64 if hidden.dtype is F64 else F32)}
        if kind == "frozen":
            loss = op.linear_logprob(leaf, weight, x.targets, **more).logp.sum()
        else:
            weight, fn = weight.detach().requires_grad_(), lambda logp, h: -logp if h is None else -logp - h
            loss = op.linear_token_loss(leaf, weight, x.targets, fn, entropy=kind == "entropy", **more).loss
        return torch.autograd.grad(loss, leaf)[0].double()[1:]

    exact = dx(reference, x.hidden.double(), x.weight.double())
    assert errors([dx(prime_kernels, x.hidden, x.weight)], [exact])[0] <= 2 * torch.finfo(F16).eps


def test_an_infinite_derivative_in_fp16_is_no_plausible_gradient(products_in_fp16):
    x = make_inputs(8, 16, 50, F16, "cpu")
    shares = torch.ones(8)
    shares[3] = torch.inf
    found = gradients(linear_token_loss, x, shares, 1.0)
    assert not found[0][3].isfinite().all()
    assert found[0][4].isfinite().all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_scratch_of_growing_chunks_is_made_once_for_the_largest(device, backend):
    # Sequences of 90 and 100 tokens are chunks of their own: the second is the larger one.
    T, D, V, bounds = 190, 16, 1000, torch.tensor([0, 90, 190])
    dtype = BF16 if backend == "fused" else F32
    hidden = torch.randn(T, D, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, device=device, dtype=dtype).requires_grad_()
    targets, ref = torch.randint(V, (T,), device=device), torch.randn(T, device=device)
    bytes_per_logit = 12 if backend == "torch" else 4
    workspace = 110 * V * bytes_per_logit
    set_workspace(workspace)
    try:
        scratch = peak_memory(
            lambda: linear_prm_loss(
                hidden, weight, targets, ref, bounds, torch.ones(2, device=device), backend=backend
            ),
            torch.device(device),
        ).scratch  # fmt: skip
    finally:
        set_workspace(None)
    assert 0 < scratch <= workspace


@pytest.mark.parametrize(("device", "backend"), [RUNS[0], RUNS[1], *RUNS[3:5]])
def test_a_sequence_longer_than_a_chunk_takes_two_passes_alone(device, backend, monkeypatch):
    # 60 tokens a chunk; the second of four sequences has 100.
    N, D, V, bounds = 180, 16, 300, torch.tensor([0, 40, 140, 160, 180])
    monkeypatch.setattr(engine, "plan_one_pass", lambda *_, **__: engine.OnePass(rows=60, cols=V, passes=1))
    counted = []
    mm = gemm.mm
    monkeypatch.setattr(gemm, "mm", lambda a, b, out: (counted.append(tuple(out.shape)), mm(a, b, out))[1])
    x = make_inputs(N, D, V, F32, device)
    outcomes, ref = torch.tensor([1.0, 0, 0.5, 1], device=device), x.dlogp - 5
    leaves = [t.detach().requires_grad_() for t in (x.hidden, x.weight)]
    out = linear_prm_loss(*leaves, x.targets, ref, bounds, outcomes, backend=backend)
    out.loss.backward()
    logits = sum(n for n, s in counted if s == V)
    assert logits == N + 100
    exact = [t.detach().double().requires_grad_() for t in (x.hidden, x.weight)]
    reference.linear_prm_loss(*exact, x.targets, ref.double(), bounds, outcomes.double()).loss.backward()
    for a, b in zip(leaves, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_stored_gradients_and_those_of_backward_are_all_that_is_held(dtype):
    # Until backward: the gradients in fp32. In it: those of a 16-bit dtype beside them.
    N, D, V = 300, 64, 3000
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    one = torch.ones(N)
    set_workspace(16 * MIB)
    try:
        out = []
        forward = peak_memory(
            lambda: out.append(linear_ppo_loss(hidden, weight, torch.zeros(N, dtype=torch.int64), -5 * one, one, one)),
            torch.device("cpu"),
        )  # fmt: skip
        kept = forward.peak - forward.scratch
        backward = peak_memory(lambda: torch.autograd.grad(out[0].loss * 3, (hidden, weight)), torch.device("cpu"))
    finally:
        set_workspace(None)
    assert 4 * (N + V) * D <= kept <= 4 * (N + V) * D + 64 * N
    assert backward.peak <= (N + V) * D * (2 if dtype is BF16 else 0) + 64 * N
