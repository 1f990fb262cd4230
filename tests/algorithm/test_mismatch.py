"""Sampler against trainer: figures, truncated importance weights, and what they do to the policy's step."""

import math

import pytest
import torch

from prime_train.algorithm.mismatch import compare
from tests.algorithm.test_policy import descent, scenario, step
from tests.support.tiny import model, weights

NAN = float("nan")


def test_the_same_log_probs_have_no_mismatch_and_weigh_1():
    logp = torch.tensor([-0.1, -3.0, -20.0])
    same = compare(logp, logp, 2.0)
    assert same.importance.tolist() == [1, 1, 1]
    assert (same.kl, same.ratio_mean, same.ratio_max, same.clipped) == (0, 1, 1, 0)
    assert same.alarm is None


def test_ratios_are_the_trainers_probability_over_the_samplers_truncated_at_the_clamp():
    sampler, trainer = torch.tensor([0.5, 0.2, 0.1]).log(), torch.tensor([0.25, 0.2, 0.9]).log()
    found = compare(sampler, trainer, 2.0)
    torch.testing.assert_close(found.importance, torch.tensor([0.5, 1.0, 2.0]))
    assert found.ratio_mean == pytest.approx((0.5 + 1 + 9) / 3)
    assert found.ratio_max == pytest.approx(9)
    assert found.clipped == pytest.approx(1 / 3)
    assert found.kl == pytest.approx(sum(r - 1 - math.log(r) for r in (0.5, 1, 9)) / 3)


def test_an_unknown_sampler_log_prob_weighs_1_and_leaves_the_figures_alone():
    found = compare(torch.tensor([NAN, -1.0]), torch.tensor([-7.0, -1.0]), 2.0)
    assert found.importance.tolist() == [1, 1]
    assert (found.kl, found.ratio_max) == (0, 1)


def test_a_clamp_of_0_weighs_nothing_and_still_measures():
    found = compare(torch.tensor([-1.0]), torch.tensor([0.0]), 0)
    assert found.importance is None
    assert found.ratio_max == pytest.approx(math.e)


@pytest.mark.parametrize(("ratio", "alarmed"), [(1.09, False), (1.12, True), (0.5, False)])
def test_a_mean_ratio_above_1_1_is_warned_of_with_the_figures(ratio, alarmed):
    alarm = compare(torch.zeros(4), torch.full((4,), math.log(ratio)), 2.0).alarm
    assert (alarm is not None) == alarmed
    if alarm:
        assert f"{ratio:.3f} on average" in alarm


def test_k3_is_the_divergence_of_the_sampler_from_the_trainer():
    g = torch.Generator().manual_seed(0)
    sampler, trainer = (torch.randn(8, generator=g).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=g)
    want = float((sampler.exp() * (sampler - trainer)).sum())
    assert compare(sampler[tokens], trainer[tokens], 2.0).kl == pytest.approx(want, rel=0.02)


def test_importance_scales_each_tokens_loss():
    from prime_train.config.keys import Policy

    rollouts, _, scores, advantages = scenario()
    config = Policy(mini_batch=len(rollouts.outcomes), grad_clip=1e9)
    importance = torch.rand(len(advantages), generator=torch.Generator().manual_seed(5)) + 0.5

    def stepped(A, **options):
        net = model()
        step(config, net, rollouts, scores, A, optimizer=descent(net), **options)
        return weights(net)

    # Without entropy and KL, a factor on the loss is a factor on the advantage.
    torch.testing.assert_close(
        stepped(advantages, importance=importance), stepped(advantages * importance), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(stepped(advantages, importance=torch.ones_like(advantages)), stepped(advantages))
