"""The implicit PRM: what it rewards, what it learns, and in which order."""

import copy
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from prime_train.algorithm import prm
from prime_train.algorithm.scoring import token_logp
from prime_train.config.keys import PRM
from prime_train.models.optim import adamw
from prime_train.records import ProcessRewards
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

UNCLIPPED = 1e9


def reference_of(rollouts, seed=9):
    """Log-probs under a model that is not the PRM."""
    return token_logp(model(seed), rollouts.sequences, WIDE)[0]


@pytest.mark.parametrize("loss", ["ce", "dpo"])
def test_loss_of_a_prm_that_equals_its_reference_is_ln_2_and_its_rewards_are_0(loss):
    rollouts, net = batch(), model()
    reference, _ = token_logp(net, rollouts.sequences, WIDE)
    rewards, update = prm.reward_and_update(PRM(loss=loss, mini_batch=12), net, descent(net), rollouts, reference, WIDE)
    assert update.loss == pytest.approx(math.log(2), abs=1e-6)
    assert rewards.token.abs().max() < 1e-6


@pytest.mark.parametrize("loss", ["ce", "dpo"])
def test_a_step_follows_the_gradient_of_the_loss_on_full_logits(loss):
    rollouts, net = batch(), model()
    reference = reference_of(rollouts)
    config = PRM(loss=loss, beta=0.7, mini_batch=12, grad_clip=UNCLIPPED)
    logp, _ = full_logp(net, rollouts.sequences)
    logits = torch.stack([(config.beta * part).sum() for part in responses(logp - reference, rollouts.sequences)])
    if loss == "ce":
        want = binary_cross_entropy_with_logits(logits, rollouts.outcomes)
    else:
        terms = []
        for i, outcome in enumerate(rollouts.outcomes):
            group = [j for j in range(len(logits)) if rollouts.groups[j] == rollouts.groups[i]]
            if outcome > 0:
                opposite = [logits[j].item() for j in group if rollouts.outcomes[j] < outcome]
                terms.append(-logsigmoid(logits[i] - sum(opposite) / len(opposite)))
            else:
                opposite = [logits[j].item() for j in group if rollouts.outcomes[j] > outcome]
                terms.append(-logsigmoid(sum(opposite) / len(opposite) - logits[i]))
        want = torch.stack(terms).mean()
    downhill = gradient(net, want)
    before = weights(net)
    rewards, update = prm.learn(config, net, descent(net), rollouts, reference, WIDE)
    assert update.loss == pytest.approx(want.item(), rel=1e-5)
    assert update.grad_norm == pytest.approx(downhill.norm().item(), rel=1e-4)
    torch.testing.assert_close(before - weights(net), downhill, **FORMULA_TOLERANCE)
    torch.testing.assert_close(rewards.token, config.beta * (logp.detach() - reference), **FORMULA_TOLERANCE)
    torch.testing.assert_close(rewards.logits, logits.detach(), **FORMULA_TOLERANCE)


@pytest.mark.parametrize("loss", ["ce", "dpo"])
def test_layout_changes_neither_rewards_nor_the_updated_weights(loss):
    rollouts = batch(groups=4)
    reference = reference_of(rollouts)
    config = PRM(loss=loss, beta=0.5, mini_batch=8, grad_clip=UNCLIPPED)
    found = []
    for layout in LAYOUTS:
        net = model()
        found.append((*prm.learn(config, net, descent(net), rollouts, reference, layout), weights(net)))
    for rewards, update, updated in found[1:]:
        torch.testing.assert_close(rewards.token, found[0][0].token, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rewards.logits, found[0][0].logits, rtol=1e-4, atol=1e-6)
        assert update.loss == pytest.approx(found[0][1].loss, rel=1e-5)
        torch.testing.assert_close(updated, found[0][2], rtol=1e-4, atol=1e-6)


def test_after_rewards_each_mini_batch_as_it_was_before_its_own_step():
    rollouts, net = batch(groups=2), model()
    reference = reference_of(rollouts)
    config = PRM(update="after", mini_batch=4, lr=1e-2)
    untrained = copy.deepcopy(net)
    rewards, update = prm.reward_and_update(config, net, adamw(net, lr=config.lr), rollouts, reference, WIDE)
    first_half = int(rollouts.sequences.cu_responses[4])

    once = copy.deepcopy(untrained)
    prm.learn(config, once, adamw(once, lr=config.lr), batch(groups=1), reference[:first_half], WIDE)
    at_first = prm.score(config, untrained, rollouts, reference, WIDE)
    then = prm.score(config, once, rollouts, reference, WIDE)
    assert not torch.allclose(at_first.token, then.token, atol=1e-4)
    torch.testing.assert_close(rewards.token[:first_half], at_first.token[:first_half], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rewards.token[first_half:], then.token[first_half:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rewards.logits[4:], then.logits[4:], rtol=1e-4, atol=1e-6)
    assert update.skipped == 0


def test_before_learns_the_same_and_rewards_with_what_it_learned():
    rollouts, reference = batch(), reference_of(batch())
    found = {}
    for order in ("after", "before"):
        net = model()
        config = PRM(update=order, mini_batch=4, lr=1e-2)
        rewards, update = prm.reward_and_update(config, net, adamw(net, lr=config.lr), rollouts, reference, WIDE)
        found[order] = (rewards, update, net)
    assert torch.equal(weights(found["after"][2]), weights(found["before"][2]))
    assert found["after"][1] == found["before"][1]
    rescored = prm.score(PRM(), found["before"][2], rollouts, reference, WIDE)
    assert torch.equal(found["before"][0].token, rescored.token)
    assert not torch.allclose(found["after"][0].token, rescored.token, atol=1e-4)


def test_none_only_scores():
    rollouts, net = batch(), model()
    before = weights(net)
    rewards, update = prm.reward_and_update(
        PRM(update="none", beta=0.3), net, None, rollouts, reference_of(rollouts), WIDE
    )
    assert update is None
    assert torch.equal(weights(net), before)
    logp, _ = full_logp(net, rollouts.sequences)
    torch.testing.assert_close(rewards.token, 0.3 * (logp.detach() - reference_of(rollouts)), **FORMULA_TOLERANCE)


def test_learning_raises_right_responses_over_wrong_ones():
    rollouts, net = batch(), model()
    reference, _ = token_logp(net, rollouts.sequences, WIDE)
    config, optimizer = PRM(lr=3e-3, mini_batch=12), adamw(net, lr=3e-3)
    losses = [prm.learn(config, net, optimizer, rollouts, reference, WIDE)[1].loss for _ in range(20)]
    rewards = prm.score(config, net, rollouts, reference, WIDE)
    assert losses == sorted(losses, reverse=True)
    assert prm.pairwise_accuracy(rewards.logits, rollouts.outcomes, rollouts.groups) > 0.9


def test_gradient_clipping_bounds_the_step():
    rollouts, net = batch(), model()
    before = weights(net)
    prm.learn(PRM(mini_batch=12, grad_clip=1e-3), net, descent(net), rollouts, reference_of(rollouts), WIDE)
    assert (weights(net) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("seed", range(20))
def test_pairwise_accuracy_is_the_weighted_share_of_pairs_in_order(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (12,), generator=g).float()
    outcomes = torch.randint(0, 5, (12,), generator=g) / 4
    groups = torch.randint(0, 3, (12,), generator=g)
    right = total = 0.0
    for i in range(12):
        for j in range(i):
            gap = float(outcomes[i] - outcomes[j])
            if groups[i] == groups[j] and gap:
                total += abs(gap)
                better, worse = (i, j) if gap > 0 else (j, i)
                right += abs(gap) * (0.5 if logits[i] == logits[j] else float(logits[better] > logits[worse]))
    assert prm.pairwise_accuracy(logits, outcomes, groups) == pytest.approx(right / total)


def test_pairwise_accuracy_without_a_pair_is_a_half():
    logits, groups = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([0, 0, 1])
    assert prm.pairwise_accuracy(logits, torch.tensor([1.0, 1.0, 0.0]), groups) == 0.5


# -- where rewards stand --


def some_rewards(rollouts, beta=0.05):
    g = torch.Generator().manual_seed(3)
    token = beta * torch.randn(int(rollouts.sequences.cu_responses[-1]), generator=g)
    sums = torch.stack([part.sum() for part in responses(token, rollouts.sequences)])
    return ProcessRewards(token=token, logits=sums)


def test_token_rewards_stand_where_they_are():
    rollouts = batch()
    rewards = some_rewards(rollouts)
    token, carries = prm.placed(PRM(granularity="token"), rewards, rollouts)
    assert torch.equal(token, rewards.token)
    assert carries.all()


def test_whole_rewards_stand_on_the_last_token():
    rollouts = batch()
    rewards = some_rewards(rollouts)
    token, carries = prm.placed(PRM(granularity="whole"), rewards, rollouts)
    for found, carried, total in zip(
        responses(token, rollouts.sequences), responses(carries, rollouts.sequences), rewards.logits, strict=True
    ):
        assert carried.tolist() == [False] * (len(found) - 1) + [True]
        assert (found[:-1] == 0).all()
        assert found[-1].item() == pytest.approx(total.item(), abs=1e-7)


def test_step_rewards_stand_on_each_steps_last_token():
    rollouts = batch()
    rewards = some_rewards(rollouts)
    token, carries = prm.placed(PRM(granularity="step"), rewards, rollouts)
    for found, carried, ends, given in zip(
        *(responses(t, rollouts.sequences) for t in (token, carries, rollouts.step_ends, rewards.token)), strict=True
    ):
        want, running = [], 0.0
        for t, r in enumerate(given.tolist()):
            running += r
            end = bool(ends[t]) or t == len(given) - 1
            want.append(running if end else 0.0)
            running = 0.0 if end else running
            assert bool(carried[t]) == end
        torch.testing.assert_close(found, torch.tensor(want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("granularity", ["token", "step", "whole"])
def test_placing_keeps_each_responses_sum(granularity):
    rollouts = batch()
    rewards = some_rewards(rollouts)
    token, _ = prm.placed(PRM(granularity=granularity), rewards, rollouts)
    sums = torch.stack([part.sum() for part in responses(token, rollouts.sequences)])
    torch.testing.assert_close(sums, rewards.logits, rtol=1e-5, atol=1e-7)


def test_log_ratios_are_bounded_before_they_are_summed():
    rollouts = batch()
    rewards = some_rewards(rollouts, beta=0.2)
    token, _ = prm.placed(PRM(beta=0.2, max_log_ratio=0.5), rewards, rollouts)
    assert torch.equal(token, rewards.token.clamp(-0.1, 0.1))
    assert (token != rewards.token).any()
    whole, _ = prm.placed(PRM(beta=0.2, max_log_ratio=0.5, granularity="whole"), rewards, rollouts)
    ends = rollouts.sequences.cu_responses[1:] - 1
    sums = torch.stack([part.sum() for part in responses(token, rollouts.sequences)])
    torch.testing.assert_close(whole[ends], sums, rtol=1e-5, atol=1e-7)
