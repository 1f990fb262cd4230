"""The implicit PRM: rewards and losses, on given log-probs and in one pass from hidden states."""

import math

import pytest
import torch

from prime_kernels import implicit_reward, linear_logprob, linear_prm_loss, prm, prm_loss, reference, set_workspace
from prime_kernels.onepass import aligned_chunks
from tests.kernels.test_ppo import GIVEN
from tests.support.oracle import BF16, F32, F64, RUNS, RUNS_BY_DTYPE, assert_loss_exact, make_inputs, run_loss

# One token, a fraction as outcome, and lengths that nothing divides.
BOUNDS = torch.tensor([0, 1, 14, 31, 33, 50])
OUTCOMES = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0])
GROUPS = torch.tensor([0, 0, 0, 1, 1])


def sequences(device):
    return BOUNDS, OUTCOMES.to(device)


def ref_and_mask(x, seed=7):
    g = torch.Generator().manual_seed(seed)
    new = reference.linear_logprob(x.hidden.double().cpu(), x.weight.double().cpu(), x.targets.cpu()).logp
    ref = (new + 0.5 * torch.randn(len(new), generator=g)).float()
    mask = (torch.rand(len(new), generator=g) > 0.3).float()
    return ref.to(x.hidden.device), mask.to(x.hidden.device)


@pytest.mark.parametrize("kind", ["ce", "dpo"])
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS_BY_DTYPE)
def test_loss_rewards_and_gradients_keep_the_error_bound(device, backend, dtype, kind):
    x = make_inputs(50, 40, 301, dtype, device, scale=2.0, bias=True)
    ref, mask = ref_and_mask(x)
    options = {"beta": 0.3, "mask": mask, "kind": kind, "group_ids": GROUPS}
    assert_loss_exact(
        linear_prm_loss, reference.linear_prm_loss, x, ref, *sequences(device), backend=backend, **options
    )


@pytest.mark.parametrize("beta", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_any_beta_keeps_the_error_bound(device, backend, beta):
    x = make_inputs(50, 16, 37, BF16, device)
    ref, _ = ref_and_mask(x)
    assert_loss_exact(
        linear_prm_loss, reference.linear_prm_loss, x, ref, *sequences(device), backend=backend, beta=beta
    )


@pytest.mark.parametrize("kind", ["ce", "dpo"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("what", ["ref", "mask"])
@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_an_infinite_input_of_a_token_that_counts_makes_the_loss_nan(device, backend, what, value, kind):
    logp, ref, mask = torch.randn(50).to(device), torch.randn(50).to(device), torch.ones(50, device=device)
    {"ref": ref, "mask": mask}[what][7] = value
    bounds, outcomes = sequences(device)
    for outcome in (0.0, 1.0):  # of the sequence that token 7 is in: whichever agrees with the infinite reward
        outcomes = outcomes.clone()
        outcomes[1] = outcome
        leaf = logp.clone().requires_grad_()
        loss = prm_loss(
            leaf, ref, bounds, outcomes, mask=mask, kind=kind, group_ids=GROUPS.to(device), backend=backend
        ).loss  # fmt: skip
        loss.backward()
        assert loss.isnan()
        assert leaf.grad is not None
        assert leaf.grad[1:14].isnan().all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_prm_that_equals_its_reference_has_loss_ln_2_and_reward_zero(device, backend):
    x = make_inputs(50, 32, 130, BF16, device)
    ref = linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp
    out = linear_prm_loss(x.hidden, x.weight, x.targets, ref, *sequences(device), backend=backend)
    if device == "cpu":  # one tile: the same logits
        assert (out.reward == 0).all()
    assert abs(out.loss.item() - math.log(2)) < 1e-6


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_ignored_tokens_have_no_reward_and_no_gradient(device, backend):
    x = make_inputs(50, 32, 130, BF16, device)
    ref, _ = ref_and_mask(x)
    x.targets[::3] = -100
    got = assert_loss_exact(
        linear_prm_loss, reference.linear_prm_loss, x, ref, *sequences(device), backend=backend
    )  # fmt: skip
    assert (got["reward"][::3] == 0).all()
    assert (got["dhidden"][::3] == 0).all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("workspace", [250_000, 60_000])
def test_results_do_not_depend_on_chunks_even_where_a_sequence_exceeds_one(device, backend, workspace):
    x = make_inputs(50, 16, 301, F32 if backend != "fused" else BF16, device)
    ref, mask = ref_and_mask(x)
    whole = run_loss(linear_prm_loss, x, ref, *sequences(device), mask=mask, backend=backend)
    set_workspace(workspace)
    parts = run_loss(linear_prm_loss, x, ref, *sequences(device), mask=mask, backend=backend)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=2**-7 if backend == "fused" else 1e-4, atol=1e-6)


def test_chunks_hold_whole_sequences():
    assert aligned_chunks([0, 3, 5, 9, 10], 5) == [(0, 5), (5, 10)]
    assert aligned_chunks([0, 3, 5, 9, 10], 4) == [(0, 3), (3, 5), (5, 9), (9, 10)]
    assert aligned_chunks([0, 3, 5, 9, 10], 100) == [(0, 10)]
    # A longer one is alone, and changes nothing for the others.
    assert aligned_chunks([0, 3, 5, 9, 10], 3) == [(0, 3), (3, 5), (5, 9), (9, 10)]


@pytest.mark.parametrize("kind", ["ce", "dpo"])
@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_sequences_of_1_to_10000_tokens_match_the_reference(device, backend, kind):
    lengths = torch.tensor([1, 2, 1000, 1024, 1025, 1, 10_000, 37])
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    g = torch.Generator().manual_seed(3)
    logp, ref = (torch.randn(int(bounds[-1]), generator=g).to(device) for _ in range(2))
    mask = (torch.rand(len(logp), generator=g) > 0.2).float().to(device)
    outcomes = torch.tensor([1, 0, 0.5, 1, 0, 0, 1, 0.25], device=device)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2], device=device)
    options = {"beta": 0.05, "mask": mask, "kind": kind, "group_ids": groups}
    leaf, exact = logp.clone().requires_grad_(), logp.double().requires_grad_()
    got = prm_loss(leaf, ref, bounds.int(), outcomes, backend=backend, **options)
    want = reference.prm_loss(exact, ref.double(), bounds, outcomes.double(), **{**options, "mask": mask.double()})
    got.loss.backward()
    want.loss.backward()
    for a, b in ((got.loss, want.loss), (got.reward, want.reward), (got.logits, want.logits), (leaf.grad, exact.grad)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_masked_tokens_are_not_looked_at(device, backend):
    g = torch.Generator().manual_seed(4)
    logp, ref = (torch.randn(50, generator=g).to(device) for _ in range(2))
    mask = (torch.rand(50, generator=g) > 0.5).float().to(device)
    clean = prm_loss(logp, ref, *sequences(device), mask=mask, backend=backend)
    dirty = logp.masked_fill(mask == 0, torch.nan).requires_grad_()
    out = prm_loss(dirty, ref, *sequences(device), mask=mask, backend=backend)
    out.loss.backward()
    assert torch.equal(out.reward, clean.reward)
    assert dirty.grad is not None
    assert (dirty.grad[mask == 0] == 0).all()
    assert prm_loss(dirty, ref, *sequences(device), backend=backend).loss.isnan()


@pytest.mark.parametrize("granularity", ["token", "whole", "step"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_rewards_of_every_granularity_match_the_reference(device, backend, granularity, masked):
    # 2,000 tokens: a step that spans blocks of the kernel.
    bounds = torch.tensor([0, 1, 14, 31, 33, 50, 2050])
    g = torch.Generator().manual_seed(5)
    logp, ref = (torch.randn(2050, generator=g).to(device) for _ in range(2))
    mask = (torch.rand(2050, generator=g) > 0.4).float().to(device) if masked else None
    ends = (torch.rand(2050, generator=g) > 0.9).to(device)
    ends[900:2000] = False
    options = {"cu_seqlens": bounds, "granularity": granularity, "step_ends": ends if granularity == "step" else None}
    leaf, exact = logp.clone().requires_grad_(), logp.double().requires_grad_()
    got = implicit_reward(leaf, ref, mask=mask, beta=0.1, backend=backend, **options)
    want = reference.implicit_reward(
        exact, ref.double(), mask=None if mask is None else mask.double(), beta=0.1, **options
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2050, generator=g).to(device)
    got.backward(upstream)
    want.backward(upstream.double())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["token", "whole"])
@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_padded_and_packed_layouts_agree(device, backend, granularity):
    lengths = [3, 8, 5]
    g = torch.Generator().manual_seed(6)
    logp, ref = (torch.randn(3, 8, generator=g).to(device) for _ in range(2))
    mask = torch.tensor([[i < n for i in range(8)] for n in lengths]).float().to(device)
    bounds = torch.tensor([0, 3, 11, 16])
    outcomes = torch.tensor([1.0, 0.0, 0.5], device=device)
    kept = mask.bool()
    padded = prm_loss(logp, ref, None, outcomes, mask=mask, backend=backend)
    packed = prm_loss(logp[kept], ref[kept], bounds, outcomes, backend=backend)
    assert torch.equal(padded.reward[kept], packed.reward)
    torch.testing.assert_close(padded.loss, packed.loss)
    reward = implicit_reward(logp, ref, mask=mask, granularity=granularity, backend=backend)
    same = implicit_reward(logp[kept], ref[kept], cu_seqlens=bounds, granularity=granularity, backend=backend)
    torch.testing.assert_close(reward[kept], same)
    assert (reward[~kept] == 0).all()


def test_gradcheck_in_fp64():
    g = torch.Generator().manual_seed(8)
    logp, ref = (torch.randn(50, generator=g, dtype=F64) for _ in range(2))
    for kind in ("ce", "dpo"):
        op = lambda t, kind=kind: prm_loss(t, ref, BOUNDS, OUTCOMES, beta=0.5, kind=kind, group_ids=GROUPS).loss  # noqa: E731
        if kind == "ce":  # "dpo" detaches its group's statistics, which a numerical derivative does not
            assert torch.autograd.gradcheck(op, logp.requires_grad_())


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_opcheck_passes(device, backend):
    x = make_inputs(50, 16, 37, BF16, device, bias=True)
    ref, mask = ref_and_mask(x)
    hidden, weight, bias = (t.detach().requires_grad_() for t in (x.hidden, x.weight, x.bias))
    head = (hidden, weight, x.targets, bias, None, None, -100, backend)
    bounds, outcomes = BOUNDS, OUTCOMES.to(device)
    args = (*head, ref, mask, bounds, outcomes, None, 0.05, True, True, True)
    torch.library.opcheck(torch.ops.prime_kernels.linear_prm_loss.default, args)
    logp, use_triton = ref.clone().requires_grad_(), backend != "torch"
    torch.library.opcheck(
        torch.ops.prime_kernels.prm_loss.default, (logp, ref, mask, bounds, outcomes, None, 0.05, use_triton)
    )
    torch.library.opcheck(
        torch.ops.prime_kernels.implicit_reward.default, (logp, ref, mask, bounds, None, 0.05, use_triton)
    )


@pytest.mark.parametrize(
    ("device", "backend"), [pytest.param(*RUNS[0].values, id="torch", marks=pytest.mark.slow), RUNS[4]]
)
def test_compiles_without_a_graph_break(device, backend):
    x = make_inputs(50, 16, 37, F32 if device == "cpu" else BF16, device)
    ref, mask = ref_and_mask(x)
    bounds, outcomes = sequences(device)

    def loss(hidden, weight):
        out = linear_prm_loss(
            torch.tanh(hidden), weight, x.targets, ref, bounds, outcomes, mask=mask, beta=1.0, backend=backend
        )
        given = linear_logprob(hidden, weight, x.targets, backend=backend).logp
        whole = implicit_reward(given, ref, cu_seqlens=bounds, granularity="whole", mask=mask)
        each = implicit_reward(given, ref, mask=mask)
        return out.loss + prm_loss(given, ref, bounds, outcomes, mask=mask).loss + whole.square().sum() + each.sum()

    eager, compiled = ([t.detach().clone().requires_grad_() for t in (x.hidden, x.weight)] for _ in range(2))
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True)(*compiled).backward()
    for a, b in zip(compiled, eager, strict=True):
        assert (a.grad - b.grad).norm() <= 1e-2 * b.grad.norm()


LOGP = torch.zeros(50)
BAD = [
    ({"cu_seqlens": torch.tensor([0, 20, 20, 30, 33, 50])}, ValueError, r"no sequence empty, got 0 tokens in .* 1"),
    ({"cu_seqlens": torch.tensor([0, 20, 10, 30, 33, 50])}, ValueError, r"no sequence empty, got -10 tokens"),
    ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 4, 49])}, ValueError, r"must run from 0 to .* 50, got 0 to 49"),
    ({"cu_seqlens": BOUNDS.float()}, TypeError, r"cu_seqlens must be int32 or int64, got torch.float32"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, r"cu_seqlens must have shape \[S \+ 1\] with S >= 1, got \[1\]"),
    ({"outcomes": torch.ones(4)}, ValueError, r"outcomes must have shape \[5\], one for each .* got \[4\]"),
    ({"beta": 0.0}, ValueError, r"beta must be > 0, got 0.0"),
    ({"kind": "bce"}, ValueError, r"kind must be 'ce' or 'dpo', got 'bce'"),
    ({"kind": "dpo"}, ValueError, r"group_ids must have shape \[5\] where kind is 'dpo', got None"),
    ({"mask": torch.ones(49)}, ValueError, r"mask must have .* shape \[50\], got \[49\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_is_refused_by_name(changes, error, message):
    options = {"cu_seqlens": BOUNDS, "outcomes": OUTCOMES, **changes}
    with pytest.raises(error, match=message):
        prm_loss(LOGP, LOGP, **options)
    x = make_inputs(50, 8, 11, F32, "cpu")
    with pytest.raises(error, match=message):
        linear_prm_loss(x.hidden, x.weight, x.targets, LOGP, **options)
    del options["outcomes"]
    if not {"outcomes", "kind"} & set(changes):
        with pytest.raises(error, match=message):
            implicit_reward(LOGP, LOGP, granularity="whole", **options)


@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_no_tokens_have_no_rewards(device, backend):
    nothing = torch.zeros(0, device=device)
    assert implicit_reward(nothing, nothing, backend=backend).shape == (0,)


@pytest.mark.parametrize("outcome", [torch.nan, torch.inf, -torch.inf, 2.0, -1.0])
@pytest.mark.parametrize("kind", ["ce", "dpo"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_outcome_that_nobody_looked_at_is_nan_where_it_is_none(backend, kind, outcome, monkeypatch):
    """On CUDA the host does not look."""
    monkeypatch.setattr(prm, "may_read", lambda t: False)
    logp, bounds = torch.randn(50).requires_grad_(), torch.tensor([0, 20, 50])
    outcomes, groups = torch.tensor([outcome, 1.0]), torch.zeros(2)
    out = prm_loss(logp, torch.randn(50), bounds, outcomes, kind=kind, group_ids=groups, backend=backend)
    out.loss.backward()
    assert out.loss.isnan()
    assert logp.grad is not None
    assert logp.grad[:20].isnan().all()


@pytest.mark.parametrize("name", ["mask", "outcomes"])
@pytest.mark.parametrize("op", [linear_prm_loss, prm_loss, implicit_reward])
def test_an_input_that_wants_a_gradient_it_would_not_get_is_refused(op, name):
    x = make_inputs(50, 16, 37, F32, "cpu")
    given = {"mask": torch.rand(50), "outcomes": OUTCOMES.clone()}
    given[name].requires_grad_()
    logp = (x.hidden, x.weight, x.targets) if op is linear_prm_loss else (x.dlogp,)
    if op is implicit_reward:
        del given["outcomes"]
    else:
        given["cu_seqlens"] = BOUNDS
    if name in given:
        with pytest.raises(ValueError, match=f"{name} must not require grad: no gradient is computed for it"):
            op(*logp, ref_logp=x.dlogp, **given)
        with torch.no_grad():
            op(*logp, ref_logp=x.dlogp, **given)


@pytest.mark.parametrize(("device", "backend"), GIVEN)
def test_summed_rewards_are_the_same_bits_every_time(device, backend):
    g, size = torch.Generator().manual_seed(0), 100_000 if device == "cuda" else 500
    logp, ref = (torch.randn(2 * size, generator=g).to(device) for _ in range(2))
    bounds = torch.tensor([0, size, 2 * size])
    found = [
        implicit_reward(logp, ref, cu_seqlens=bounds, granularity="whole", backend=backend)[bounds[1:] - 1]
        for _ in range(3)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = torch.stack([t.sum() for t in (0.05 * (logp.double() - ref.double())).split(size)])
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-3, atol=1e-3)


def test_bad_granularity_is_refused_by_name():
    with pytest.raises(ValueError, match="granularity must be 'token', 'whole' or 'step', got 'sentence'"):
        implicit_reward(LOGP, LOGP, granularity="sentence")
    with pytest.raises(ValueError, match="step_ends must be given for granularity 'step'"):
        implicit_reward(LOGP, LOGP, granularity="step", cu_seqlens=BOUNDS)
