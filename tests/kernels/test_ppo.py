"""PPO's clipped loss, from hidden states and on given log-probs."""

import pytest
import torch

from prime_kernels import linear_logprob, linear_ppo_loss, ppo_clip_loss, reference, set_workspace
from tests.kernels.test_token_loss import tokens
from tests.support.oracle import BF16, F32, F64, RUNS, RUNS_BY_DTYPE, assert_loss_exact, make_inputs, run, run_loss

GIVEN = [
    pytest.param("cpu", "torch", id="torch"),
    pytest.param("cpu", "triton", id="triton"),
    pytest.param("cuda", "triton", id="gpu-triton", marks=pytest.mark.gpu),
]
SHAPES = [
    pytest.param(64, 64, 256, id="aligned"),
    pytest.param(1, 40, 97, id="one-token"),
    pytest.param(17, 33, 1000, id="nothing-divides"),
    pytest.param(130, 16, 5, id="tiny-vocabulary"),
]


def inputs_of(x):
    """old_logp, advantages, token_weight as positional arguments; ref_logp and importance by name."""
    A, w, old = tokens(x)
    g = torch.Generator().manual_seed(5)
    ref = old + 0.1 * torch.randn(len(A), generator=g).to(old)
    return (old, A, w), {"ref_logp": ref, "importance": 2 * torch.rand(len(A), generator=g).to(old)}


@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_loss_and_gradients_keep_the_error_bound(device, backend, dtype, N, D, V):
    x = make_inputs(N, D, V, dtype, device, scale=2.0, bias=True)
    rows, more = inputs_of(x)
    more |= {"clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": 0.01, "kl_coef": 0.05}
    assert_loss_exact(linear_ppo_loss, reference.linear_ppo_loss, x, *rows, backend=backend, **more)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_statistics_equal_the_references(device, backend):
    x = make_inputs(50, 32, 130, BF16, device)
    rows, more = inputs_of(x)
    got = linear_ppo_loss(x.hidden, x.weight, x.targets, *rows, backend=backend, kl_coef=0.1, **more).stats
    want = reference.linear_ppo_loss(x.hidden.double(), x.weight.double(), x.targets, *(r.double() for r in rows)).stats
    assert 0 < got.clip_fraction < 1
    for name in want._fields:
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_one_pass_equals_log_probs_then_loss(device, backend):
    x = make_inputs(50, 32, 130, F32 if backend != "fused" else BF16, device)
    rows, more = inputs_of(x)
    options = {"kl_coef": 0.1, "entropy_coef": 0.02, **more}

    def two_steps(hidden, weight, targets, *rows, bias, backend, **options):
        out = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, backend=backend)
        given = "torch" if backend == "torch" else "triton"
        return ppo_clip_loss(out.logp, *rows, entropy=out.entropy, backend=given, **options)

    one, two = (run_loss(op, x, *rows, backend=backend, **options) for op in (linear_ppo_loss, two_steps))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_ratio_one_makes_it_the_reinforce_gradient(device, backend):
    x = make_inputs(40, 32, 130, BF16, device)
    A, w, _ = tokens(x)
    with torch.no_grad():
        old = linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp
    got = run_loss(linear_ppo_loss, x, old, A, w, backend=backend)
    stats = linear_ppo_loss(x.hidden, x.weight, x.targets, old, A, w, backend=backend).stats
    x.dlogp.copy_(-w * A)
    x.dentropy.zero_()
    want = run(linear_logprob, x, backend=backend)
    assert (got["dhidden"] - want["dhidden"]).norm() <= 2**-7 * want["dhidden"].norm()
    if device == "cpu":  # one tile: the same logits, so the ratio is 1 to the bit
        assert stats.ratio_max == stats.ratio_mean == 1
        assert stats.clip_fraction == stats.approx_kl == 0


@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_gradient_is_exactly_zero_where_the_clip_has_taken_over(device, backend):
    # ρ:      above  above  below  below  inside  dual-clipped
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, 2.0], device=device)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], device=device)
    logp = log_ratio.clone().requires_grad_()
    ppo_clip_loss(
        logp, torch.zeros(6, device=device), A, torch.ones(6, device=device), dual_clip=3.0, backend=backend
    ).loss.backward()
    assert logp.grad is not None
    ratio = log_ratio.exp()
    want = torch.stack((ratio[0] * 0, ratio[1], -ratio[2], ratio[3] * 0, -ratio[4], ratio[5] * 0))
    assert (logp.grad[want == 0] == 0).all()
    torch.testing.assert_close(logp.grad, want)


@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_zero_weight_contributes_exactly_nothing_whatever_stands_there(device, backend):
    N = 2000  # more than one program
    g = torch.Generator().manual_seed(0)
    old, logp, A = (torch.randn(N, generator=g).to(device) for _ in range(3))
    w = (torch.rand(N, generator=g) > 0.5).float().to(device)
    clean = ppo_clip_loss(logp, old, A, w, backend=backend)
    for bad in (torch.nan, torch.inf, -torch.inf):
        dirty = logp.masked_fill(w == 0, bad).requires_grad_()
        out = ppo_clip_loss(dirty, old.masked_fill(w == 0, bad), A.masked_fill(w == 0, bad), w, backend=backend)
        out.loss.backward()
        assert out.loss == clean.loss
        assert dirty.grad is not None
        assert (dirty.grad[w == 0] == 0).all()
        assert all(torch.equal(a, b) for a, b in zip(out.stats, clean.stats, strict=True))


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_fully_masked_batch_gives_zero_loss_finite_statistics_and_zero_gradients(device, backend):
    x = make_inputs(12, 32, 130, BF16, device, bias=True)
    zeros = torch.zeros(12, device=device)
    got = run_loss(linear_ppo_loss, x, zeros, zeros, zeros, backend=backend)
    assert all((t == 0).all() for name, t in got.items() if name != "logp")
    out = linear_ppo_loss(x.hidden, x.weight, x.targets, zeros, zeros, zeros, backend=backend)
    assert all(s == 0 for s in out.stats)


@pytest.mark.parametrize("name", ["old_logp", "advantages", "token_weight", "ref_logp", "importance"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_an_infinite_input_makes_the_loss_nan(device, backend, bad, name):
    rows = {
        n: torch.rand(8, device=device) + 0.5
        for n in ("old_logp", "advantages", "token_weight", "ref_logp", "importance")
    }
    rows[name][3] = bad
    out = ppo_clip_loss(torch.rand(8, device=device), **rows, kl_coef=0.1, dual_clip=2.0, backend=backend)
    assert out.loss.isnan()


@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_given_log_probs_match_the_reference_packed_and_padded(device, backend):
    g = torch.Generator().manual_seed(1)
    logp, old, A, ref, entropy = (torch.randn(4, 700, generator=g).to(device) for _ in range(5))
    w = (torch.rand(4, 700, generator=g) > 0.3).float().to(device) / 100
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 4.0, "entropy_coef": 0.1, "kl_coef": 0.2}
    leaves, exact = (
        [t.clone().requires_grad_() for t in (logp, entropy)],
        [t.double().requires_grad_() for t in (logp, entropy)],
    )
    got = ppo_clip_loss(leaves[0], old, A, w, entropy=leaves[1], ref_logp=ref, backend=backend, **options)
    want = reference.ppo_clip_loss(
        exact[0], old.double(), A.double(), w.double(), entropy=exact[1], ref_logp=ref.double(), **options
    )
    (2 * got.loss).backward()
    (2 * want.loss).backward()
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(leaves, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-7)
    packed = ppo_clip_loss(
        logp.flatten(), old.flatten(), A.flatten(), w.flatten(), entropy=entropy.flatten(), ref_logp=ref.flatten(),
        backend=backend, **options,
    )  # fmt: skip
    assert torch.equal(packed.loss, got.loss)


def test_gradcheck_in_fp64():
    g = torch.Generator().manual_seed(2)
    logp, old, A, ref, entropy = (torch.randn(12, generator=g, dtype=F64) for _ in range(5))
    w = torch.rand(12, generator=g, dtype=F64)

    def op(logp, entropy):
        return ppo_clip_loss(logp, old, A, w, entropy=entropy, entropy_coef=0.1, kl_coef=0.3, ref_logp=ref).loss

    assert torch.autograd.gradcheck(op, (logp.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_opcheck_passes(device, backend):
    x = make_inputs(6, 16, 37, BF16, device, bias=True)
    rows, more = inputs_of(x)
    given = "torch" if backend == "torch" else "triton"
    leaves = [t.detach().requires_grad_() for t in (x.hidden, x.weight, x.bias)]
    head = (leaves[0], leaves[1], x.targets, leaves[2], None, None, -100, backend)
    options = (0.2, 0.3, 3.0, 0.01, 0.1)
    args = (*head, *rows, more["ref_logp"], more["importance"], *options, True, True, True)
    torch.library.opcheck(torch.ops.prime_kernels.linear_ppo_loss.default, args)
    logp = torch.randn(6, device=device, requires_grad=True)
    args = (logp, logp.detach(), *rows, more["ref_logp"], None, *options, given == "triton")
    torch.library.opcheck(torch.ops.prime_kernels.ppo_clip_loss.default, args)


@pytest.mark.parametrize(
    ("device", "backend"), [pytest.param(*RUNS[0].values, id="torch", marks=pytest.mark.slow), RUNS[4]]
)
def test_compiles_without_a_graph_break(device, backend):
    x = make_inputs(12, 16, 37, F32 if device == "cpu" else BF16, device)
    rows, _ = inputs_of(x)

    def loss(hidden, weight):
        return linear_ppo_loss(torch.nn.functional.silu(hidden), weight, x.targets, *rows, backend=backend).loss

    eager, compiled = ([t.detach().clone().requires_grad_() for t in (x.hidden, x.weight)] for _ in range(2))
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True)(*compiled).backward()
    for a, b in zip(compiled, eager, strict=True):
        assert (a.grad - b.grad).norm() <= 1e-2 * b.grad.norm()


def test_results_do_not_depend_on_chunks():
    x = make_inputs(90, 16, 301, F32, "cpu")
    rows, _ = inputs_of(x)
    whole = run_loss(linear_ppo_loss, x, *rows, backend="torch")
    set_workspace(200_000)
    parts = run_loss(linear_ppo_loss, x, *rows, backend="torch")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "fused"])
def test_no_host_synchronisation_on_cuda(backend):
    x = make_inputs(64, 64, 1000, BF16, "cuda")
    rows, _ = inputs_of(x)
    run_loss(linear_ppo_loss, x, *rows, backend=backend)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear_ppo_loss(hidden, weight, x.targets, *rows, backend=backend).loss * 0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_options_are_refused_by_name():
    rows = [torch.zeros(3) for _ in range(4)]
    for options, message in (
        ({"clip_low": -0.1}, "clip_low must be >= 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1 or None, got 1.0"),
        ({"kl_coef": 0.1}, "ref_logp must be given where kl_coef is not 0"),
        ({"entropy_coef": 0.1}, "entropy must be given where entropy_coef is not 0"),
        ({"ref_logp": torch.zeros(2)}, r"ref_logp must have logp's shape \[3\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_clip_loss(*rows, **options)
    with pytest.raises(TypeError, match="clip_high must be a number, got str"):
        ppo_clip_loss(*rows, clip_high="0.2")
