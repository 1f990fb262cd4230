"""The policy's step against autograd through the full logits of the same model."""

from collections import Counter

import pytest
import torch

from prime_train.algorithm import policy
from prime_train.config.keys import Policy
from prime_train.records import Scores
from tests.support.tiny import (
    FORMULA_TOLERANCE,
    LAYOUTS,
    WIDE,
    batch,
    descent,
    full_logp,
    gradient,
    model,
    responses,
    weights,
)

LONGEST = 12


def scenario(temperature=1.0, seed=0):
    """A batch whose old policy is off the present one by enough to clip, its scores and advantages."""
    rollouts, net = batch(seed=seed), model()
    logp, entropy = (t.detach() for t in full_logp(net, rollouts.sequences, temperature))
    g = torch.Generator().manual_seed(seed + 1)
    old = logp + 0.6 * torch.randn(len(logp), generator=g)
    scores = Scores(
        old=old, entropy=entropy, reference=None,
        reference_tempered=logp + 0.8 * torch.randn(len(logp), generator=g),
    )  # fmt: skip
    return rollouts, net, scores, torch.randn(len(logp), generator=g)


def per_token_loss(config, logp, entropy, scores, A):
    ratio = (logp - scores.old).exp()
    loss = -torch.minimum(A * ratio, A * ratio.clamp(1 - config.clip_low, 1 + config.clip_high))
    if config.dual_clip is not None:
        loss = torch.where(A < 0, torch.minimum(loss, -A * config.dual_clip), loss)
    delta = scores.reference_tempered - logp
    return loss + config.kl_coef * (delta.exp() - delta - 1) - config.entropy_coef * entropy


def aggregated(config, loss, sequences):
    parts = loss.split(sequences.cu_responses.diff().tolist())
    if config.aggregate == "token":
        return loss.mean()
    if config.aggregate == "sequence":
        return torch.stack([part.mean() for part in parts]).mean()
    return torch.stack([part.sum() for part in parts]).sum() / (len(parts) * LONGEST)


def step(
    config, net, rollouts, scores, advantages, layout=WIDE, temperature=1.0, optimizer=None, seed=0, importance=None
):
    return policy.update(
        config, net, optimizer or descent(net), rollouts, scores, advantages, layout, importance=importance,
        temperature=temperature, max_tokens=LONGEST, seed=seed,
    )  # fmt: skip


OPTIONS = {
    "plain": {},
    "asymmetric clip": {"clip_low": 0.1, "clip_high": 0.6},
    "dual clip": {"dual_clip": 1.3},
    "entropy bonus": {"entropy_coef": 0.3},
    "kl": {"kl_coef": 0.4},
    "sequence": {"aggregate": "sequence"},
    "fixed": {"aggregate": "fixed"},
    "all": {"clip_high": 0.4, "dual_clip": 2.0, "entropy_coef": 0.1, "kl_coef": 0.2, "aggregate": "sequence"},
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_follows_the_gradient_of_the_loss_on_full_logits(options, temperature):
    rollouts, net, scores, advantages = scenario(temperature)
    config = Policy(mini_batch=len(rollouts.outcomes), grad_clip=1e9, **options)
    logp, entropy = full_logp(net, rollouts.sequences, temperature)
    want = aggregated(config, per_token_loss(config, logp, entropy, scores, advantages), rollouts.sequences)
    downhill = gradient(net, want)
    before = weights(net)
    done = step(config, net, rollouts, scores, advantages, temperature=temperature)
    assert done.loss == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    assert done.grad_norm == pytest.approx(downhill.norm().item(), rel=1e-4)
    torch.testing.assert_close(before - weights(net), downhill, **FORMULA_TOLERANCE)

    ratio = (logp - scores.old).exp().detach()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    assert done.clip_fraction == pytest.approx((-advantages * clipped > -advantages * ratio).float().mean().item())
    assert done.approx_kl == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-4)
    assert done.ratio_max == pytest.approx(ratio.max().item(), rel=1e-4)


def spy_on_mini_batches(monkeypatch):
    """The rows of each mini-batch, as they come."""
    taken = []
    laid_out = policy.micro_batches

    def spy(sequences, rows, *args, **options):
        taken.append(rows.tolist())
        return laid_out(sequences, rows, *args, **options)

    monkeypatch.setattr(policy, "micro_batches", spy)
    return taken


@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
def test_each_mini_batchs_step_is_normalised_by_its_own_responses_and_tokens(monkeypatch, aggregate):
    rollouts, net, scores, advantages = scenario()
    other = model()
    taken = spy_on_mini_batches(monkeypatch)
    config = Policy(mini_batch=5, grad_clip=1e9, aggregate=aggregate)
    step(config, net, rollouts, scores, advantages, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert [len(rows) for rows in taken] == [5, 5, 2]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for rows in taken:
        logp, entropy = full_logp(other, rollouts.sequences)
        losses = responses(per_token_loss(config, logp, entropy, scores, advantages), rollouts.sequences)
        chosen = [losses[row] for row in rows]
        if aggregate == "token":
            loss = torch.cat(chosen).mean()
        elif aggregate == "sequence":
            loss = torch.stack([part.mean() for part in chosen]).mean()
        else:
            loss = torch.cat(chosen).sum() / (len(rows) * LONGEST)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights(net), weights(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
def test_layout_does_not_change_the_updated_weights(aggregate):
    found = []
    for layout in LAYOUTS:
        rollouts, net, scores, advantages = scenario()
        config = Policy(mini_batch=6, grad_clip=1e9, aggregate=aggregate, kl_coef=0.1)
        # A descent small enough that rounding does not grow from one step to the next.
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        done = step(config, net, rollouts, scores, advantages, layout=layout, optimizer=optimizer)
        found.append((weights(net), done))
    for updated, done in found[1:]:
        torch.testing.assert_close(updated, found[0][0], rtol=1e-4, atol=1e-6)
        for name in ("loss", "grad_norm", "clip_fraction", "approx_kl", "ratio_max"):
            assert getattr(done, name) == pytest.approx(getattr(found[0][1], name), rel=1e-4, abs=1e-6), name


def test_on_the_old_policy_itself_nothing_is_clipped():
    rollouts, net, _, advantages = scenario()
    logp, entropy = (t.detach() for t in full_logp(net, rollouts.sequences))
    on_policy = Scores(old=logp, entropy=entropy, reference=None, reference_tempered=None)
    done = step(Policy(mini_batch=len(rollouts.outcomes)), net, rollouts, on_policy, advantages)
    assert done.clip_fraction == 0
    assert done.approx_kl == pytest.approx(0, abs=1e-6)
    assert done.loss == pytest.approx(-advantages.mean().item(), abs=1e-5)


def test_zero_advantages_leave_the_weights_alone():
    rollouts, net, scores, advantages = scenario()
    before = weights(net)
    step(Policy(mini_batch=6), net, rollouts, scores, torch.zeros_like(advantages))
    assert torch.equal(weights(net), before)


@pytest.mark.parametrize(("mini_batch", "epochs"), [(12, 1), (4, 1), (5, 2), (1, 1)])
def test_each_epoch_takes_every_response_once(monkeypatch, mini_batch, epochs):
    rollouts, net, scores, advantages = scenario()
    taken = spy_on_mini_batches(monkeypatch)
    step(Policy(mini_batch=mini_batch, epochs=epochs, lr=1e-9), net, rollouts, scores, advantages)
    S = len(rollouts.outcomes)
    assert max(map(len, taken)) == mini_batch
    assert len(taken) == epochs * -(-S // mini_batch)
    per_epoch = len(taken) // epochs
    for e in range(epochs):
        rows = [row for part in taken[e * per_epoch : (e + 1) * per_epoch] for row in part]
        assert Counter(rows) == Counter(range(S))
    if epochs > 1:
        assert taken[:per_epoch] != taken[per_epoch:]


def test_same_seed_same_weights_and_another_seed_another_order():
    updated = []
    for seed in (1, 1, 2):
        rollouts, net, scores, advantages = scenario()
        step(Policy(mini_batch=4), net, rollouts, scores, advantages, seed=seed)
        updated.append(weights(net))
    assert torch.equal(updated[0], updated[1])
    assert not torch.equal(updated[0], updated[2])


def test_gradient_norm_is_clipped():
    rollouts, net, scores, advantages = scenario()
    before = weights(net)
    step(Policy(mini_batch=12, grad_clip=1e-3), net, rollouts, scores, advantages)
    assert (weights(net) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_token_weights_are_the_documented_normalisers():
    lengths = torch.tensor([1, 4, 5])
    assert policy.token_weights("token", lengths, 100).tolist() == pytest.approx([0.1] * 3)
    assert policy.token_weights("sequence", lengths, 100).tolist() == pytest.approx([1 / 3, 1 / 12, 1 / 15])
    assert policy.token_weights("fixed", lengths, 100).tolist() == pytest.approx([1 / 300] * 3)
