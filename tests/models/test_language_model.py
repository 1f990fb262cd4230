"""The language model's memory: never tokens × vocabulary."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.harness import peak_memory
from prime_kernels import set_workspace
from prime_train import sft
from prime_train.algorithm import policy, prm
from prime_train.algorithm.scoring import token_logp
from prime_train.config.keys import PRM, Policy
from prime_train.models.language_model import LanguageModel, tiny_model, tiny_shape
from prime_train.models.packing import Layout, pack_sequences
from prime_train.records import Batch, Scores
from tests.support.tiny import TOKENIZER, descent

V, D = 60_000, 16
WORKSPACE = 16 * 2**20
ONE_MICRO_BATCH = Layout(budget=10**6)


def large_vocabulary() -> LanguageModel:
    config = Qwen2Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def long_batch(S: int) -> Batch:
    """S responses of 64 tokens."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (S, 68), generator=g).tolist()
    sequences = pack_sequences((row[:4], row[4:]) for row in tokens)
    T = 64 * S
    return Batch(
        sequences=sequences, outcomes=(torch.arange(S) % 2).float(), groups=torch.arange(S) // 4,
        sampler_logp=torch.zeros(T), step_ends=torch.zeros(T, dtype=torch.bool),
    )  # fmt: skip


def policy_step(net, batch):
    T = len(batch.sampler_logp)
    scores = Scores(old=torch.full((T,), -11.0), entropy=torch.zeros(T), reference=None, reference_tempered=None)
    policy.update(
        Policy(mini_batch=len(batch.outcomes), entropy_coef=0.1), net, descent(net), batch, scores, torch.ones(T),
        ONE_MICRO_BATCH, temperature=1.0, max_tokens=64, seed=0,
    )  # fmt: skip


def prm_step(net, batch, loss="ce"):
    reference = torch.full_like(batch.sampler_logp, -11.0)
    prm.learn(PRM(mini_batch=len(batch.outcomes), loss=loss), net, descent(net), batch, reference, ONE_MICRO_BATCH)


def dpo_step(net, batch):
    prm_step(net, batch, loss="dpo")


def sft_step(net, batch):
    for loss in sft.losses(net, batch.sequences, ONE_MICRO_BATCH):
        loss.backward()


def scoring(net, batch):
    token_logp(net, batch.sequences, ONE_MICRO_BATCH, entropy=True)


@pytest.mark.parametrize("stage", [policy_step, prm_step, dpo_step, sft_step, scoring])
def test_memory_does_not_grow_with_tokens_times_vocabulary(stage):
    net = large_vocabulary()
    set_workspace(WORKSPACE)
    few, many = (peak_memory(lambda S=S: stage(net, long_batch(S)), torch.device("cpu")).scratch for S in (4, 12))
    logits = 4 * V * 64 * (12 - 4)  # bytes of the logits of the tokens that many has more
    assert many - few < logits / 20
    assert many < 4 * V * 64 * 12 / 2


@pytest.mark.parametrize("shape", ["16x1", "axbxc", "16x1x2x3", ""])
def test_a_tiny_models_shape_must_have_three_numbers(shape):
    with pytest.raises(ValueError, match="must be hidden x layers x heads such as 96x3x4"):
        tiny_shape(shape)


@pytest.mark.parametrize("shape", ["16x0x2", "0x1x1", "10x1x4", "6x1x2"])
def test_a_tiny_models_heads_must_have_an_even_width(shape):
    with pytest.raises(ValueError, match="must be a multiple of twice its heads"):
        tiny_shape(shape)


def test_a_tiny_model_is_its_seeds_and_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    nets = [tiny_model("16x1x2", TOKENIZER, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (net.transformer.lm_head.weight for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
