"""linear_logprob: exactness on every backend. Shapes say why they are there."""

from dataclasses import replace

import pytest
import torch

from prime_kernels import linear_logprob, reference, set_workspace
from prime_kernels.plan import plan_tiling
from tests.support.oracle import (
    BF16,
    F16,
    F32,
    F64,
    RUNS,
    RUNS_BY_DTYPE,
    assert_exact,
    assert_results_exact,
    make_inputs,
    run,
)

SHAPES = [
    pytest.param(64, 64, 256, id="aligned"),
    pytest.param(1, 40, 97, id="one-token"),
    pytest.param(17, 33, 1000, id="nothing-divides"),
    pytest.param(3, 8, 151936, id="real-vocabulary"),
    pytest.param(130, 16, 5, id="tiny-vocabulary"),
    pytest.param(5, 24, 1, id="vocabulary-of-one"),
]


@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_error_is_at_most_twice_plain_torchs(device, backend, dtype, N, D, V):
    assert_exact(linear_logprob, make_inputs(N, D, V, dtype, device, scale=2.0), backend=backend)


OPTIONS = [
    pytest.param({"bias": True}, id="bias"),
    pytest.param({"temperature": 0.7}, id="scalar-temperature"),
    pytest.param({"temperature": torch.logspace(-1, 1, 19)}, id="temperatures-0.1-to-10"),
    pytest.param({"softcap": 15.0}, id="softcap-15"),
    pytest.param({"softcap": 30.0, "bias": True, "temperature": torch.linspace(0.5, 2, 19)}, id="all"),
    pytest.param({"entropy": False}, id="no-entropy"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_every_option_keeps_the_error_bound(device, backend, dtype, options):
    # Logits of standard deviation 6 reach into the softcap's curve.
    assert_exact(linear_logprob, make_inputs(19, 48, 301, dtype, device, scale=6.0, **options), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "chunked"])
def test_over_forty_draws_the_error_with_a_bias_is_at_most_twice_plain_torchs(backend):
    ours, theirs = {}, {}
    for seed in range(40):
        x = make_inputs(19, 48, 301, F32, "cuda", scale=6.0, bias=True, seed=seed)
        exact, plain = run(reference.linear_logprob, x.to(F64)), run(reference.linear_logprob, x)
        got = run(linear_logprob, x, backend=backend)
        for name, want in exact.items():
            ours[name] = ours.get(name, 0) + (got[name] - want).square().sum()
            theirs[name] = theirs.get(name, 0) + (plain[name] - want).square().sum()
    for name in ours:
        assert ours[name].sqrt() <= 2 * theirs[name].sqrt(), name


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_target_on_the_last_column_is_found(device, backend):
    # 301 columns leave a ragged tile everywhere, 256 leave none.
    for V in (256, 301):
        x = make_inputs(9, 32, V, BF16, device)
        x.targets[:] = V - 1
        assert_exact(linear_logprob, x, backend=backend)


@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_logits_up_to_ten_thousand_keep_the_error_bound(device, backend, dtype):
    # In fp32 one ulp of such a logit is 1e-3; the maximum is subtracted before anything is rounded.
    x = make_inputs(16, 32, 300, dtype, device, scale=3000.0)
    assert reference.head_logits(x.hidden.double(), x.weight.double()).abs().max() > 1e4
    got = assert_exact(linear_logprob, x, backend=backend)
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_target_that_leads_by_40_nats_keeps_its_gradient(device, backend, dtype):
    # Logits are exact in every dtype: the target's is 40, the others' 0 and 1.
    N, V = 4, 259
    weight = torch.zeros(V, 8, dtype=dtype, device=device)
    weight[::2, 1] = 1
    weight[7, 0], weight[7, 1] = 40, 0
    hidden = torch.zeros(N, 8, dtype=dtype, device=device)
    hidden[:, :2] = 1
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.full((N,), 7, device=device)
    out = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    out.logp.sum().backward()

    others = (torch.e * 130 + 128) * torch.exp(torch.tensor(-40.0, dtype=F64))  # Σ e^{z_v − 40} over the others
    want_dz = torch.exp(torch.tensor([-39.0, -40.0], dtype=F64))  # p of an even and of an odd column
    assert torch.allclose(out.logp.double().cpu(), -others.expand(N), rtol=1e-5)
    assert weight.grad is not None
    assert hidden.grad is not None
    dw = weight.grad.double().cpu()
    eps = 4 * torch.finfo(dtype).eps
    if dtype is not F16:  # e^{-40} is below fp16's smallest number
        assert torch.allclose(dw[0, 0], -N * want_dz[0], rtol=eps, atol=0)
        assert torch.allclose(dw[1, 0], -N * want_dz[1], rtol=eps, atol=0)
        assert torch.allclose(dw[7, 0], N * others, rtol=eps, atol=0)
        assert torch.allclose(hidden.grad[0, 0].double().cpu(), 40 * others, rtol=eps, atol=0)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_ignored_tokens_have_zero_results_and_zero_gradient(device, backend):
    x = make_inputs(20, 32, 130, BF16, device, scale=3.0)
    x.targets[::3] = -100
    x.dlogp[0] = torch.nan  # what reaches an ignored token from above is not looked at
    kept = x.targets != -100
    got = run(linear_logprob, x, backend=backend)
    for name in ("logp", "entropy", "dhidden"):
        assert (got[name][~kept] == 0).all()
    assert got["dweight"].isfinite().all()
    alone = make_inputs(20, 32, 130, BF16, device, scale=3.0)
    alone = run(linear_logprob, type(x)(**{**vars(alone), **{
        name: getattr(alone, name)[kept] for name in ("hidden", "targets", "dlogp", "dentropy")
    }}), backend=backend)  # fmt: skip
    for name in ("logp", "entropy", "dhidden"):
        torch.testing.assert_close(got[name][kept], alone[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["dweight"], alone["dweight"], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_all_tokens_ignored_gives_zeros(device, backend):
    x = make_inputs(6, 32, 130, BF16, device, bias=True)
    x.targets[:] = 3
    got = run(linear_logprob, x, backend=backend, ignore_index=3)
    assert all((t == 0).all() for t in got.values())


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_no_tokens_give_empty_results_and_zero_gradients(device, backend):
    got = run(linear_logprob, make_inputs(0, 32, 130, BF16, device, bias=True), backend=backend)
    assert got["logp"].shape == got["entropy"].shape == (0,)
    assert got["dweight"].shape == (130, 32)
    assert (got["dweight"] == 0).all()
    assert (got["dbias"] == 0).all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_leading_shape_is_kept_and_strided_inputs_are_read_right(device, backend):
    x = make_inputs(24, 32, 130, BF16, device)
    want = run(linear_logprob, x, backend=backend)
    # Every other token and every other feature of a larger tensor, and a weight stored transposed.
    padded = torch.full((2, 24, 64), 7.0, dtype=BF16, device=device)
    padded[:, ::2, ::2] = x.hidden.view(2, 12, 32)
    hidden = padded[:, ::2, ::2].requires_grad_()
    weight = x.weight.t().contiguous().t().requires_grad_()
    targets = x.targets.view(2, 12).t().contiguous().t()
    out = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    assert out.entropy is not None
    assert out.logp.shape == out.entropy.shape == (2, 12)
    dh, dw = torch.autograd.grad(
        (out.logp, out.entropy), (hidden, weight), (x.dlogp.view(2, 12), x.dentropy.view(2, 12))
    )
    assert dh.shape == hidden.shape
    torch.testing.assert_close(out.logp.flatten().double(), want["logp"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dh.reshape(24, 32).double(), want["dhidden"], rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(dw.double(), want["dweight"], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_one_token_without_leading_dimension(device, backend):
    x = make_inputs(1, 32, 130, BF16, device)
    out = linear_logprob(x.hidden[0], x.weight, x.targets[0], backend=backend)
    assert out.logp.shape == ()
    assert out.entropy is None


@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_same_call_gives_the_same_bits(device, backend, dtype):
    x = make_inputs(70, 40, 301, dtype, device, bias=True, softcap=20.0)
    first, second = (run(linear_logprob, x, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_forward_does_not_depend_on_whether_gradients_are_wanted(device, backend):
    # So that a ratio of new to old log-probs is exactly 1 where nothing was trained in between. (A frozen head works
    # in other tiles.)
    x = make_inputs(33, 40, 301, BF16, device)
    with torch.no_grad():
        old = linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp
    leaves = x.hidden.requires_grad_(), x.weight.requires_grad_()
    new = linear_logprob(*leaves, x.targets, backend=backend).logp
    assert torch.equal(old, new)


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize(("workspace", "all_resident"), [(50_000, True), (35_800, False)])
def test_tiles_change_results_by_rounding_only(device, backend, workspace, all_resident):
    # Blocks of tokens and slices of the vocabulary; in the smaller workspace dX of some tokens only is resident.
    N, D, V = 70, 64, 100
    x = make_inputs(N, D, V, BF16, device, bias=True, scale=2.0)
    counted = {"bytes_per_logit": 4, "half": True, "copies": device == "cpu"}
    tiling = plan_tiling(N, D, V, workspace=workspace, **counted)
    assert tiling.rows < N
    assert tiling.cols < V
    assert (tiling.resident == N) == all_resident
    whole = run(linear_logprob, x, backend=backend)
    set_workspace(workspace)
    tiled = run(linear_logprob, x, backend=backend)
    for name in ("logp", "entropy"):
        torch.testing.assert_close(tiled[name], whole[name], rtol=1e-5, atol=1e-5)
    for name in ("dhidden", "dweight", "dbias"):
        # fp32 sums in another order, then one rounding to bf16: at most one bf16 ulp apart.
        torch.testing.assert_close(tiled[name], whole[name], rtol=2**-7, atol=1e-4)
    assert_results_exact(tiled, x)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_banned_tokens_have_probability_zero(device, backend):
    x = make_inputs(12, 32, 130, BF16, device, bias=True)
    assert x.bias is not None
    x.bias[5:40] = -torch.inf
    x.targets[:] = 50
    got = assert_exact_where_finite(x, backend)
    assert (got["dweight"][5:40] == 0).all()
    assert (got["dbias"][5:40] == 0).all()


def assert_exact_where_finite(x, backend):
    got = run(linear_logprob, x, backend=backend)
    want = run(reference.linear_logprob, make_finite(x).to(F64))
    for name in ("logp", "entropy", "dhidden"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-2)
    return got


def make_finite(x):
    """−inf as −1e4, which is as good as −inf for a softmax and keeps plain torch's gradients finite."""
    return type(x)(**{**vars(x), "bias": x.bias.clamp(min=-1e4)})


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_nan_and_inf_never_become_plausible_numbers(device, backend):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = make_inputs(6, 32, 130, BF16, device)
        x.hidden[2, 3] = bad
        out = linear_logprob(x.hidden, x.weight, x.targets, entropy=True, backend=backend)
        assert out.entropy is not None
        assert out.logp[2].isnan()
        assert out.entropy[2].isnan()
        assert out.logp[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("bias", [-3e38, -torch.inf])
def test_logits_that_are_all_too_small_to_tell_apart_are_no_number(device, backend, bias):
    x = make_inputs(6, 32, 130, BF16, device, bias=True)
    assert x.bias is not None
    found = run(linear_logprob, replace(x, bias=torch.full_like(x.bias, bias)), backend=backend)
    assert all(t.isnan().all() for t in found.values())


@pytest.mark.parametrize("wanted", ["logp", "entropy"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_gradient_through_one_result_alone(device, backend, wanted):
    x = make_inputs(12, 32, 130, BF16, device, scale=2.0)
    leaves = [t.double().requires_grad_() for t in (x.hidden, x.weight)]
    ours = [t.detach().clone().requires_grad_() for t in (x.hidden, x.weight)]
    want = torch.autograd.grad(
        getattr(reference.linear_logprob(*leaves, x.targets, entropy=True), wanted).sum(), leaves
    )
    got = torch.autograd.grad(
        getattr(linear_logprob(*ours, x.targets, entropy=True, backend=backend), wanted).sum(), ours
    )
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 2**-7 * b.norm()


def test_gradcheck_in_fp64():
    x = make_inputs(5, 4, 7, F64, "cpu", bias=True, scale=2.0)
    x.targets[1] = -100
    temperature = torch.linspace(0.5, 2, 5, dtype=F64)

    def op(hidden, weight, bias):
        out = linear_logprob(hidden, weight, x.targets, bias=bias, temperature=temperature, softcap=3.0, entropy=True)
        return out.logp, out.entropy

    assert x.bias is not None
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in (x.hidden, x.weight, x.bias)])


@pytest.mark.parametrize(("device", "backend"), [*RUNS[:1], *RUNS[3:]])
def test_more_tokens_than_a_grid_dimension_holds(device, backend):
    # 65,535 is the limit of a CUDA grid's second and third dimension.
    x = make_inputs(70_001, 8, 5, BF16, device)
    assert_exact(linear_logprob, x, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "chunked", "fused"])
def test_target_outside_the_vocabulary_is_nan_on_cuda(backend):
    x = make_inputs(8, 32, 130, BF16, "cuda")
    x.targets[3], x.targets[4] = 130, -1
    got = run(linear_logprob, x, backend=backend)
    assert got["logp"][[3, 4]].isnan().all()
    assert got["logp"][[0, 1, 2, 5, 6, 7]].isfinite().all()
    assert got["dhidden"][3].isnan().all()


@pytest.mark.gpu
def test_no_host_synchronisation_on_cuda():
    x = make_inputs(64, 64, 1000, BF16, "cuda", temperature=torch.ones(64))
    run(linear_logprob, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = x.hidden.requires_grad_()
        linear_logprob(
            hidden, x.weight, x.targets, entropy=True, temperature=x.options["temperature"]
        ).logp.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_results_are_fp32_or_fp64():
    for dtype, want in ((BF16, F32), (F16, F32), (F32, F32), (F64, F64)):
        x = make_inputs(4, 8, 11, dtype, "cpu")
        out = linear_logprob(x.hidden, x.weight, x.targets, entropy=True)
        assert out.entropy is not None
        assert out.logp.dtype == out.entropy.dtype == want


@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_a_frozen_head_keeps_the_error_bound(device, backend, dtype):
    x = make_inputs(33, 40, 301, dtype, device, scale=2.0, bias=True, temperature=0.7)
    x.targets[::5] = -100

    def gradient(op, x, dlogp, **more):
        hidden = x.hidden.detach().clone().requires_grad_()
        logp = op(hidden, x.weight, x.targets, bias=x.bias, temperature=0.7, **more).logp
        return torch.autograd.grad(logp, hidden, dlogp.to(logp.dtype))[0].double()

    want, plain = (gradient(reference.linear_logprob, x.to(d), x.dlogp) for d in (F64, dtype))
    # What reaches an ignored token from above is not looked at.
    got = gradient(linear_logprob, x, x.dlogp.masked_fill(x.targets == -100, torch.nan), backend=backend)
    assert (got - want).norm() <= 2 * (plain - want).norm() + torch.finfo(dtype).eps * want.norm()
    assert (got[::5] == 0).all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_frozen_heads_backward_takes_many_upstream_gradients_at_once(device, backend):
    x = make_inputs(4, 16, 50, BF16 if backend == "fused" else F32, device)
    hidden = x.hidden.detach().requires_grad_()
    logp = linear_logprob(hidden, x.weight.detach(), x.targets, backend=backend).logp
    upstream = torch.eye(4, device=device)
    (batched,) = torch.autograd.grad(logp, hidden, upstream, is_grads_batched=True, retain_graph=True)
    for row, found in zip(upstream, batched, strict=True):
        assert torch.autograd.grad(logp, hidden, row, retain_graph=True)[0].equal(found)
