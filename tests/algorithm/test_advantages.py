"""Advantages against loops over scalars, written from the paper's formulas."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_train.algorithm.advantages import advantages, leave_one_out, padded, return_scale, returns_to_go, whiten
from prime_train.config.keys import Advantage

Rows = list[list[float]]


def oracle(
    config: Advantage, process: Rows | None, carries: list[list[bool]], outcomes: list[float], groups: list[int],
    lengths: list[int],
) -> Rows:  # fmt: skip
    """Advantages of each response's tokens, in fp64."""
    S = range(len(lengths))
    members = {i: [j for j in S if groups[j] == groups[i]] for i in S}

    def returns(rewards: Rows, gamma: float) -> Rows:
        return [[sum(gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))] for r in rewards]

    def source(rewards: Rows, carries: list[list[bool]], gamma: float, coef: float) -> Rows:
        means = [statistics.fmean(r for r, c in zip(rewards[j], carries[j], strict=True) if c) for j in S]
        centred = []
        for i in S:
            K = len(members[i])
            row = []
            for r, c in zip(rewards[i], carries[i], strict=True):
                if not c:
                    row.append(0.0)
                elif config.estimator == "reinforce":
                    row.append(r)
                elif config.estimator == "grpo":
                    of_group = [means[j] for j in members[i]]
                    row.append((r - statistics.fmean(of_group)) / (statistics.stdev(of_group) + 1e-6))
                elif config.estimator == "rloo":
                    row.append(r - sum(means[j] for j in members[i] if j != i) / (K - 1))
                else:
                    row.append(r * K / (K - 1) - sum(means[j] for j in members[i]) / (K - 1))
            centred.append(row)
        return [[coef * g for g in row] for row in returns(centred, gamma)]

    last = [[t == n - 1 for t in range(n)] for n in lengths]
    outcome = [[outcomes[i] * here for here in last[i]] for i in S]
    total = source(outcome, last, config.outcome_gamma, config.outcome_coef)
    if process is not None:
        if config.process_norm:
            scale = max(abs(g) for row in returns(process, 1.0) for g in row) + 1e-6
            process = [[r / scale for r in row] for row in process]
        found = source(process, carries, config.process_gamma, config.process_coef)
        total = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(total, found, strict=True)]
    if config.whiten:
        every = [a for row in total for a in row]
        mean, variance = statistics.fmean(every), statistics.variance(every)
        total = [[(a - mean) / (variance + 1e-8) ** 0.5 for a in row] for row in total]
    return total


configs = st.builds(
    Advantage,
    estimator=st.sampled_from(["rloo", "rloo_released", "grpo", "reinforce"]),
    process_coef=st.sampled_from([0.5, 5.0]), outcome_coef=st.sampled_from([0.0, 5.0]),
    process_gamma=st.sampled_from([1.0, 0.9, 0.0]), outcome_gamma=st.sampled_from([1.0, 0.7]),
    process_norm=st.booleans(), whiten=st.booleans(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    configs, st.booleans(), st.sampled_from(["token", "step", "whole"]), st.integers(1, 3), st.integers(2, 4),
    st.integers(0, 10**6),
)  # fmt: skip
def test_every_estimator_is_its_formula(config, with_process, granularity, prompts, K, seed):
    g = torch.Generator().manual_seed(seed)
    S = prompts * K
    lengths = torch.randint(1, 8, (S,), generator=g).tolist()
    outcomes = torch.randint(0, 5, (S,), generator=g) / 4
    # Members of a group need not stand together.
    groups = torch.arange(prompts).repeat(K)
    rewards = [torch.randn(n, generator=g, dtype=torch.float64) for n in lengths]
    carries = [torch.rand(n, generator=g) < {"token": 2, "step": 0.4, "whole": -1}[granularity] for n in lengths]
    for row in carries:
        row[-1] = True
    rewards = [r * c for r, c in zip(rewards, carries, strict=True)]

    cu = torch.tensor([0, *lengths]).cumsum(0)
    process, mask = padded(torch.cat(rewards).float(), cu)
    found = advantages(
        config, process if with_process else None, padded(torch.cat(carries), cu)[0] if with_process else None,
        outcomes, mask, groups,
    ).token  # fmt: skip

    want = oracle(
        config, [r.tolist() for r in rewards] if with_process else None, [c.tolist() for c in carries],
        outcomes.tolist(), groups.tolist(), lengths,
    )  # fmt: skip
    want = torch.tensor([a for row in want for a in row])
    assert (found[~mask] == 0).all()
    # A standard deviation of a group that happens to be small magnifies fp32's rounding.
    size = 1 + want.abs().max().item() if config.estimator == "grpo" else 10
    torch.testing.assert_close(found[mask], want, rtol=1e-4, atol=1e-5 * size)


def example(K: int = 4, L: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Process rewards, mask, outcomes and groups of two prompts, full length."""
    g = torch.Generator().manual_seed(5)
    rewards = torch.randn(2 * K, L, generator=g)
    outcomes = torch.randint(0, 2, (2 * K,), generator=g).float()
    return rewards, torch.ones(2 * K, L, dtype=torch.bool), outcomes, torch.arange(2).repeat_interleave(K)


def test_released_and_papers_leave_one_out_differ_by_the_deviation_from_the_own_mean():
    rewards, mask, _, group = example(K=4)
    paper, released = (leave_one_out(rewards, mask, group, released=r) for r in (False, True))
    torch.testing.assert_close(released - paper, (rewards - rewards.mean(1, keepdim=True)) / 3)


def test_released_and_papers_leave_one_out_agree_on_outcomes():
    _, mask, outcomes, group = example()
    found = [
        advantages(Advantage(estimator=form, whiten=False), None, None, outcomes, mask, group).token
        for form in ("rloo", "rloo_released")
    ]
    torch.testing.assert_close(*found)


def test_outcome_baseline_is_the_mean_of_the_others():
    mask = torch.ones(3, 2, dtype=torch.bool)
    config = Advantage(whiten=False, outcome_coef=1.0)
    found = advantages(config, None, None, torch.tensor([1.0, 0.0, 0.5]), mask, torch.zeros(3, dtype=torch.int64))
    want = torch.tensor([1 - 0.25, 0 - 0.75, 0.5 - 0.5])
    torch.testing.assert_close(found.token, want[:, None].expand(3, 2))


def test_rewards_that_are_all_zero_change_nothing():
    _, mask, outcomes, group = example()
    zeros = torch.zeros(mask.shape)
    alone = advantages(Advantage(), None, None, outcomes, mask, group)
    found = advantages(Advantage(), zeros, mask, outcomes, mask, group)
    assert torch.equal(found.token, alone.token)
    assert found.process_share == 0


def test_rounding_of_an_untrained_prm_is_not_blown_up_to_a_signal():
    _, mask, outcomes, group = example()
    rounding = 1e-9 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    alone = advantages(Advantage(), None, None, outcomes, mask, group).token
    torch.testing.assert_close(advantages(Advantage(), rounding, mask, outcomes, mask, group).token, alone)


def test_process_norm_is_the_largest_return_of_the_whole_batch():
    rewards, *_ = example()
    largest = max(abs(row[t:].sum().item()) for row in rewards for t in range(len(row)))
    assert return_scale(rewards).item() == pytest.approx(largest + 1e-6)
    assert returns_to_go(rewards / return_scale(rewards), 1.0).abs().max().item() == pytest.approx(1, abs=1e-5)


def test_scale_of_process_rewards_does_not_matter_once_normed():
    rewards, mask, outcomes, group = example()
    found = [advantages(Advantage(), rewards * scale, mask, outcomes, mask, group).token for scale in (0.05, 1.0, 1e3)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-4)


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    rewards, mask, outcomes, group = example()
    mask = mask.clone()
    mask[0, 2:] = mask[5, 1:] = False
    token = advantages(Advantage(), rewards * mask, mask, outcomes, mask, group).token[mask]
    assert token.mean().item() == pytest.approx(0, abs=1e-6)
    assert token.var().item() == pytest.approx(1, abs=1e-5)


def test_a_single_token_is_whitened_to_0():
    mask = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 0.0]]), mask).tolist() == [[0.0, 0.0]]


def test_process_share_is_that_of_the_two_sources_sizes():
    rewards, mask, outcomes, group = example()
    both = Advantage(whiten=False)
    process = advantages(Advantage(whiten=False, outcome_coef=0), rewards, mask, outcomes, mask, group).token
    outcome = advantages(both, None, None, outcomes, mask, group).token
    share = advantages(both, rewards, mask, outcomes, mask, group).process_share
    assert share == pytest.approx((process.abs().sum() / (process.abs().sum() + outcome.abs().sum())).item())


def test_padded_values_come_back_through_the_mask():
    values, cu = torch.arange(1.0, 7), torch.tensor([0, 3, 4, 6])
    rows, mask = padded(values, cu)
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert torch.equal(rows[mask], values)
