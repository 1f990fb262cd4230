"""The embedded engine against `generate` of transformers, against the trainer's log-probs, against probabilities."""

import pytest
import torch

from benchmarks.harness import peak_memory
from prime_train.algorithm.scoring import token_logp
from prime_train.models import generation
from prime_train.models.packing import pack_sequences
from prime_train.rollout import sampler
from prime_train.rollout.sampler import CHECK_EVERY, GREEDY, LocalEngine
from tests.support.tiny import EOS, TOKENIZER, WIDE, model, prompts

PLENTY = 2**30
# Longer than the engine's looks at which rows have ended, and no multiple of them.
MAX_TOKENS = 2 * CHECK_EVERY + 5


def seeds(asked, seed):
    return [seed * 1000 + i for i in range(len(asked))]


def sample(net, asked, *, n=1, temperature=1.0, max_tokens=MAX_TOKENS, seed=0, eos=(EOS,), cache_bytes=PLENTY):
    engine = LocalEngine(net, eos=list(eos), cache_bytes=cache_bytes)
    return engine.sample(asked, n=n, temperature=temperature, max_tokens=max_tokens, seeds=seeds(asked, seed))


def tokens_of(found):
    return [[response.tokens for response in group] for group in found]


def generated(net, prompt, eos):
    """Greedy continuation by transformers, through the first end of sequence."""
    out = net.transformer.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=MAX_TOKENS, eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_is_generate_token_for_token(attention):
    net, asked = model(shape="32x2x2").eval(), prompts(12)
    net.transformer.set_attn_implementation(attention)
    # An end of sequence that some responses reach early, some late and some never.
    free = [generated(net, prompt, -1) for prompt in asked]
    eos = max(range(len(TOKENIZER)), key=lambda t: sum(t in response for response in free) % len(free))
    want = [generated(net, prompt, eos) for prompt in asked]
    found = sample(net, asked, temperature=GREEDY, eos=[eos])
    assert [group[0].tokens for group in found] == want
    assert [group[0].finished for group in found] == [response[-1] == eos for response in want]
    assert len({len(response) for response in want}) > 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_trainers(temperature):
    net, asked = model(shape="32x2x2"), prompts(6)
    found = sample(net, asked, n=3, temperature=temperature)
    pairs = [(prompt, r.tokens) for prompt, group in zip(asked, found, strict=True) for r in group]
    logp, _ = token_logp(net, pack_sequences(pairs), WIDE, temperature=temperature)
    sampled = torch.tensor([x for group in found for r in group for x in r.logp])
    torch.testing.assert_close(sampled, logp, rtol=1e-4, atol=1e-5)


def test_log_probs_of_greedy_are_those_of_temperature_1():
    net, asked = model(), prompts(4)
    found = sample(net, asked, temperature=GREEDY)
    logp, _ = token_logp(net, pack_sequences((p, g[0].tokens) for p, g in zip(asked, found, strict=True)), WIDE)
    torch.testing.assert_close(torch.tensor([x for g in found for x in g[0].logp]), logp, rtol=1e-4, atol=1e-5)


def test_same_seed_same_responses_and_another_seed_others():
    net, asked = model(), prompts(5)
    first, again, other = (sample(net, asked, n=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert tokens_of(first) != tokens_of(other)


def test_responses_to_one_prompt_differ():
    found = sample(model(), [[6, 7]], n=8)
    assert len(set(tokens_of(found)[0])) == 8


def test_a_response_ends_with_its_first_end_of_sequence_or_at_the_limit():
    found = [r for group in sample(model(), prompts(20), n=8, eos=[EOS, 9]) for r in group]
    for response in found:
        assert not {EOS, 9} & set(response.tokens[:-1])
        assert response.finished == (response.tokens[-1] in (EOS, 9))
        assert response.finished or len(response.tokens) == MAX_TOKENS
        assert len(response.logp) == len(response.tokens)
    assert any(response.finished for response in found)
    assert any(not response.finished for response in found)


@pytest.mark.parametrize("max_tokens", [1, CHECK_EVERY - 1, CHECK_EVERY, CHECK_EVERY + 1])
def test_no_response_is_longer_than_the_limit(max_tokens):
    found = sample(model(), prompts(3), n=2, max_tokens=max_tokens, eos=[])
    assert {len(r.tokens) for group in found for r in group} == {max_tokens}
    assert not any(r.finished for group in found for r in group)


@pytest.mark.parametrize("cache_bytes", [1, 20_000, 60_000, PLENTY])
def test_a_bounded_cache_gives_every_response_in_the_prompts_order(cache_bytes):
    net, asked = model(), prompts(11, seed=3)
    want = sample(net, asked, temperature=GREEDY)
    found = sample(net, asked, n=2, temperature=GREEDY, cache_bytes=cache_bytes)
    for group, one in zip(tokens_of(found), tokens_of(want), strict=True):
        assert group == [one[0], one[0]]


@pytest.mark.parametrize("n", [2, 50])
def test_no_more_rows_are_sampled_together_than_the_cache_has_room_for(monkeypatch, n):
    net, asked = model(), prompts(11, seed=3, longest=4)
    together = []
    forward = net.next_token_logits

    def spy(input_ids, mask, positions, cache):
        logits = forward(input_ids, mask, positions, cache)
        together.append(sum(2 * layer.keys.numel() * layer.keys.itemsize for layer in cache.layers))
        return logits

    monkeypatch.setattr(net, "next_token_logits", spy)
    budget = 60_000
    found = sample(net, asked, n=n, cache_bytes=budget)
    assert {len(group) for group in found} == {n}
    assert budget / 3 < max(together) <= budget


@pytest.mark.parametrize("n", [1, 3])
def test_prompts_in_pieces_give_what_all_of_them_together_give(monkeypatch, n):
    net, asked = model(shape="32x2x2"), prompts(9, seed=4)
    together = sample(net, asked, n=n)
    monkeypatch.setattr(generation, "PREFILL", 20)
    widths = []
    forward = net.next_token_logits

    def spy(input_ids, mask, positions, cache):
        if cache.get_seq_length() == 0:
            widths.append(input_ids.numel())
        return forward(input_ids, mask, positions, cache)

    monkeypatch.setattr(net, "next_token_logits", spy)
    in_pieces = sample(net, asked, n=n)
    assert tokens_of(in_pieces) == tokens_of(together)
    assert len(widths) > 3
    assert max(widths) <= 20


def test_a_prompt_that_is_longer_than_a_piece_goes_alone(monkeypatch):
    net, asked = model(), [[6] * 9, [7] * 9]
    together = sample(net, asked, temperature=GREEDY)
    monkeypatch.setattr(generation, "PREFILL", 4)
    assert tokens_of(sample(net, asked, temperature=GREEDY)) == tokens_of(together)


@pytest.mark.parametrize("temperature", [GREEDY, 1.0, 0.7])
def test_rows_that_take_turns_draw_the_same_tokens(monkeypatch, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 50, generator=generator)
    noise = torch.rand(11, dtype=torch.float64, generator=generator)
    want = sampler._choose(logits, temperature, noise)
    monkeypatch.setattr(generation, "CHOICES", 3 * 50 * generation.CHOICE)
    found = sampler._choose(logits, temperature, noise)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_tokens_are_drawn_within_the_bytes_that_are_stated(monkeypatch):
    logits, noise = torch.randn(64, 20_000), torch.rand(64, dtype=torch.float64)
    monkeypatch.setattr(generation, "CHOICES", 4 * 20_000 * generation.CHOICE)
    peak = peak_memory(lambda: sampler._choose(logits, 1.0, noise), torch.device("cpu")).peak
    assert generation.CHOICES / 2 < peak <= generation.CHOICES


def chi_square(found, probabilities):
    observed = torch.bincount(torch.tensor(found), minlength=len(probabilities))
    expected = probabilities * len(found)
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_with_the_models_probabilities(temperature):
    net, prompt = model(), [6, 7, 8]
    logits = net.transformer(input_ids=torch.tensor([prompt])).logits[0, -1].detach()
    found = [r.tokens[0] for r in sample(net, [prompt], n=20_000, temperature=temperature, max_tokens=1)[0]]
    # 99.9% of χ² with 21 degrees of freedom lie below 46.8.
    assert chi_square(found, (logits / temperature).softmax(-1)) < 46.8
    assert chi_square(found, (logits / (1.5 * temperature)).softmax(-1)) > 100


def test_progress_is_told_often_and_no_more_tokens_than_there_could_be():
    told = []
    engine = LocalEngine(model(), eos=[EOS], cache_bytes=PLENTY)
    engine.sample(prompts(4), n=2, temperature=1.0, max_tokens=MAX_TOKENS, seeds=[0, 1, 2, 3], progress=told.append)
    assert len(told) == MAX_TOKENS // CHECK_EVERY
    assert 0 < sum(told) <= 8 * MAX_TOKENS


def test_sampling_leaves_the_model_as_it_was_even_when_stopped():
    net = model().train()

    def stop(tokens):
        raise KeyboardInterrupt

    engine = LocalEngine(net, eos=[], cache_bytes=PLENTY)
    with pytest.raises(KeyboardInterrupt):
        engine.sample([[6]], n=1, temperature=1.0, max_tokens=MAX_TOKENS, seeds=[0], progress=stop)
    assert net.training
    sample(net.eval(), [[6]])
    assert not net.training


def test_sampling_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(model(), prompts(2))
    assert torch.equal(torch.get_rng_state(), before)
