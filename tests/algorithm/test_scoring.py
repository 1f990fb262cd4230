"""Log-probs of response tokens: those of full logits, in any layout; and which model gives which."""

import pytest
import torch

from prime_train.algorithm.scoring import score, token_logp
from tests.support.tiny import FORMULA_TOLERANCE, LAYOUTS, WIDE, batch, full_logp, model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_log_probs_and_entropies_are_those_of_full_logits(layout, temperature):
    net, sequences = model(), batch().sequences
    logp, entropy = token_logp(net, sequences, layout, temperature=temperature, entropy=True)
    want = full_logp(net, sequences, temperature)
    torch.testing.assert_close(logp, want[0].detach(), **FORMULA_TOLERANCE)
    torch.testing.assert_close(entropy, want[1].detach(), **FORMULA_TOLERANCE)


def test_scoring_leaves_no_gradient_behind():
    net = model()
    logp, _ = token_logp(net, batch().sequences, WIDE)
    assert not logp.requires_grad
    assert all(p.grad is None for p in net.parameters())


def log_probs(temperature, relative_to, kl=False, reference=True):
    """Scores of a batch, and log-probs by model and temperature to compare with."""
    rollouts, policy, frozen = batch(), model(0), model(1)
    found = score(
        policy, frozen if reference else None, rollouts, WIDE, temperature=temperature, relative_to=relative_to, kl=kl
    )

    def want(of, temperature):
        return full_logp(of, rollouts.sequences, temperature)[0].detach()

    return found, lambda t: want(policy, t), lambda t: want(frozen, t)


def assert_same(found, want):
    torch.testing.assert_close(found, want, **FORMULA_TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_only_the_policy_is_scaled_by_the_sampling_temperature(temperature):
    found, policy, frozen = log_probs(temperature, "frozen")
    assert_same(found.old, policy(temperature))
    assert_same(found.reference, frozen(1.0))
    assert found.reference_tempered is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_old_policy_stands_in_for_the_reference_at_temperature_1(temperature):
    found, policy, _ = log_probs(temperature, "policy", reference=False)
    assert_same(found.old, policy(temperature))
    assert_same(found.reference, policy(1.0))


@pytest.mark.parametrize("relative_to", ["frozen", "policy", None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_terms_reference_is_the_frozen_model_at_the_sampling_temperature(temperature, relative_to):
    found, _, frozen = log_probs(temperature, relative_to, kl=True)
    assert_same(found.reference_tempered, frozen(temperature))


def test_without_prm_and_kl_there_is_no_reference():
    found, *_ = log_probs(1.0, None, reference=False)
    assert found.reference is None
    assert found.reference_tempered is None
