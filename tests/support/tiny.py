"""Tiny models, ragged batches and short runs for the trainer's tests, and log-probs the slow way."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prime_train.data import arithmetic
from prime_train.models.language_model import LanguageModel, tiny_model
from prime_train.models.packing import Layout, pack_sequences
from prime_train.models.snapshot import save_model
from prime_train.records import Batch, Sequences

CPU = torch.device("cpu")
TOKENIZER = arithmetic.tokenizer()
EOS = TOKENIZER.eos_token_id
WIDE = Layout(budget=10**6)
# One sequence at a time, a few, all; padded and packed.
LAYOUTS = [Layout(budget=budget, packed=packed) for packed in (False, True) for budget in (1, 45, 10**6)]
FORMULA_TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}


def model(seed: int = 0, shape: str = "16x1x2") -> LanguageModel:
    return tiny_model(shape, TOKENIZER, seed)


def prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    """Random characters, of ragged lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(5, len(TOKENIZER)) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def pairs(S: int, seed: int, longest: int = 12) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of random characters, of ragged lengths, the first response of one token."""
    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        return [rng.randrange(5, len(TOKENIZER)) for _ in range(length)]

    return [(text(rng.randint(1, 9)), text(1 if s == 0 else rng.randint(1, longest))) for s in range(S)]


def batch(groups: int = 3, K: int = 4, seed: int = 0) -> Batch:
    """Every group has right, wrong and half right responses, and so an opposite for each."""
    sequences = pack_sequences(pairs(groups * K, seed))
    T = int(sequences.cu_responses[-1])
    g = torch.Generator().manual_seed(seed)
    return Batch(
        sequences=sequences,
        outcomes=torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0])[:K].repeat(groups),
        groups=torch.arange(groups).repeat_interleave(K),
        sampler_logp=torch.zeros(T),
        step_ends=torch.rand(T, generator=g) < 0.3,
    )


def responses(values: Tensor, sequences: Sequences) -> list[Tensor]:
    """Values [T] cut into responses."""
    return list(values.split(sequences.cu_responses.diff().tolist()))


def full_logits(policy: LanguageModel, sequences: Sequences) -> Tensor:
    """[T, V] logits before each response token, from one sequence at a time and `transformers`' own forward."""
    found = []
    for s in range(len(sequences.cu_tokens) - 1):
        tokens = sequences.tokens[sequences.cu_tokens[s] : sequences.cu_tokens[s + 1]]
        n = int(sequences.cu_responses[s + 1] - sequences.cu_responses[s])
        found.append(policy.transformer(input_ids=tokens[None], use_cache=False).logits[0, -n - 1 : -1])
    return torch.cat(found)


def targets(sequences: Sequences) -> Tensor:
    """[T] response tokens."""
    found = []
    for s in range(len(sequences.cu_tokens) - 1):
        n = int(sequences.cu_responses[s + 1] - sequences.cu_responses[s])
        found.append(sequences.tokens[sequences.cu_tokens[s + 1] - n : sequences.cu_tokens[s + 1]])
    return torch.cat(found)


def full_logp(policy: LanguageModel, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] through full logits; differentiable."""
    logp = (full_logits(policy, sequences) / temperature).log_softmax(-1)
    return logp.gather(1, targets(sequences)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def weights(policy: LanguageModel) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def descent(policy: LanguageModel) -> torch.optim.SGD:
    """With it, and no clipping, a step takes the gradient itself off the weights."""
    return torch.optim.SGD(policy.parameters(), lr=1.0)


def gradient(policy: LanguageModel, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(policy.parameters()))
    return torch.cat([g.flatten() for g in found])


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def saved_model(directory: Path, seed: int = 0, shape: str = "16x1x2") -> str:
    save_model(model(seed, shape), TOKENIZER, directory)
    return str(directory)
