"""Rewards on tokens that nobody labelled: an implicit PRM learns from outcomes alone, and says where it went wrong.

    python examples/3_implicit_rewards.py

Responses are two worked steps of arithmetic, in which a result is now and then ten too large. First a tiny reference
model learns to write like that, slips included. The PRM starts as a copy of it and learns one bit a response:
whether its last line has the right answer. Its reward of a token is then β·(log π_prm − log π_ref). Responses to
problems that neither model has seen are shown with these rewards: red is negative, green is positive.
"""

import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels import LogProbHead, implicit_reward
from prime_train.algorithm.prm import sequence_sums
from prime_train.algorithm.scoring import token_logp
from prime_train.data import arithmetic
from prime_train.data.prompts import ArithmeticPrompts
from prime_train.models.language_model import LanguageModel, tiny_model
from prime_train.models.packing import Layout, micro_batches, pack_sequences
from prime_train.records import Group, MicroBatch, ProcessRewards, Prompt, Response, Sequences
from prime_train.show.view import View, token_samples

OPERATIONS, SLOPPY = 2, 0.5  # half of the steps are careless; 6 of 10 careless steps slip
SHAPE, BATCH = "32x1x4", 32
REFERENCE_STEPS, PRM_STEPS = 250, 150
BETA = 0.5

Work = tuple[Prompt, str]  # a problem and a response; each character is a token

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)  # models this small gain nothing from a second one
tokenizer = arithmetic.tokenizer()
seen, unseen = (ArithmeticPrompts(OPERATIONS, tokenizer, held_out=held_out) for held_out in (False, True))
layout = Layout(budget=10**6)


def worked(prompts: ArithmeticPrompts, index: int, attempt: int = 0) -> Work:
    """The marks of careful and careless steps are made the same: only the digits tell them apart."""
    chain = arithmetic.chain(index, OPERATIONS, prompts.held_out)
    text = arithmetic.demonstration(chain, random.Random(f"{index} {attempt}"), SLOPPY)
    return prompts[index], text.replace(arithmetic.SLOPPY, arithmetic.CAREFUL)


def packed(works: Sequence[Work]) -> tuple[Sequences, Tensor]:
    """Tokens, and the outcome of each response: all that the PRM is ever told."""
    pairs = [(prompt.tokens, tokens_of(text)) for prompt, text in works]
    outcomes = [arithmetic.outcome(prompt.reference, text) for prompt, text in works]
    return pack_sequences(pairs), torch.tensor(outcomes)


def tokens_of(text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def laid_out(sequences: Sequences) -> MicroBatch:
    [micro] = micro_batches(sequences, torch.arange(BATCH), layout, device)
    return micro


class Trainer:
    """AdamW with a learning rate that rises and falls."""

    def __init__(self, model: LanguageModel, lr: float, steps: int) -> None:
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, steps, pct_start=0.1)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


# 1. The reference: −log p of whatever the responses say.
reference = tiny_model(SHAPE, tokenizer, seed=0).to(device)
trainer = Trainer(reference, 1.5e-2, REFERENCE_STEPS)
for step in range(1, REFERENCE_STEPS + 1):
    sequences, _ = packed([worked(seen, step * BATCH + i) for i in range(BATCH)])
    micro = laid_out(sequences)
    out = reference(micro, LogProbHead.token_loss, lambda logp, _: -logp)
    trainer.step(out.loss / len(micro.targets))
    if step == 1 or step % 50 == 0:
        print(f"reference, step {step:3}  loss {out.loss.item() / len(micro.targets):.3f} a token")

# 2. The PRM: `linear_prm_loss` inside the head, the cross-entropy of outcome and σ(Σ rewards).
prm = tiny_model(SHAPE, tokenizer, seed=0).to(device)
prm.load_state_dict(reference.state_dict())
trainer = Trainer(prm, 5e-3, PRM_STEPS)
for step in range(1, PRM_STEPS + 1):
    sequences, outcomes = packed([worked(seen, 500_000 + step * BATCH + i) for i in range(BATCH)])
    reference_logp, _ = token_logp(reference, sequences, layout)
    micro = laid_out(sequences)
    out = prm(
        micro, LogProbHead.prm_loss, reference_logp[micro.tokens].to(device), micro.cu_seqlens,
        outcomes[micro.sequences], beta=BETA,
    )  # fmt: skip
    trainer.step(out.loss)
    if step == 1 or step % 50 == 0:
        print(f"PRM, step {step:3}  loss {out.loss.item():.3f} a response")


# 3. Rewards of problems that were held out.
def rewards_of(works: Sequence[Work]) -> tuple[ProcessRewards, Sequences, Tensor]:
    sequences, outcomes = packed(works)
    prm_logp, reference_logp = (token_logp(model, sequences, layout)[0] for model in (prm, reference))
    token = implicit_reward(prm_logp, reference_logp, beta=BETA)
    return ProcessRewards(token=token, logits=sequence_sums(token, sequences.cu_responses)), sequences, outcomes


def responses(values: Tensor, sequences: Sequences) -> Sequence[Tensor]:
    """Values [T] of the tokens, cut into responses."""
    return values.split(sequences.cu_responses.diff().tolist())


def wrong_digits(text: str) -> list[int]:
    """Which characters of the results are not what their own step comes to. Neither model is told."""
    found = []
    for step in re.finditer(r"(\d\d)([+-]\d)=(\d\d)", text):
        right = f"{(int(step[1]) + int(step[2])) % arithmetic.MODULUS:02}"
        found += [step.start(3) + i for i in (0, 1) if step[3][i] != right[i]]
    return found


works = [worked(unseen, i) for i in range(300)]
rewards, sequences, outcomes = rewards_of(works)
sign = ((rewards.logits > 0) == (outcomes == 1)).float().mean()
print(f"\n{len(works)} held-out responses, {outcomes.mean():.0%} of them right")
print(f"the sum of its rewards says whether a response is right in {sign:.0%}")
blamed, by_chance = [], []
for work, outcome, token in zip(works, outcomes, responses(rewards.token, sequences), strict=True):
    if outcome == 0:
        wrong = wrong_digits(work[1])
        blamed.append(int(token.argmin()) in wrong)
        by_chance.append(len(wrong) / len(token))
share, chance = sum(blamed) / len(blamed), sum(by_chance) / len(by_chance)
print(f"a wrong one's lowest reward stands on a wrong digit in {share:.0%} (by chance: {chance:.0%})\n")

# A right and a wrong response to each of three problems, shown as training shows its samples.
groups, shown = [], []
for index in range(3):
    attempts = [worked(unseen, index, attempt) for attempt in range(20)]
    prompt = attempts[0][0]
    texts = [next(t for _, t in attempts if arithmetic.outcome(prompt.reference, t) == wanted) for wanted in (1, 0)]
    group = [Response(tokens=tuple(tokens_of(t)), logp=(0.0,) * len(tokens_of(t)), finished=True) for t in texts]
    groups.append(Group(prompt=prompt, responses=tuple(group), texts=tuple(texts), outcomes=(1.0, 0.0)))
    shown += [(prompt, t) for t in texts]
rewards, sequences, outcomes = rewards_of(shown)
View().samples(
    "held out, each on a scale of its own",
    token_samples(groups, rewards, sequences.cu_responses, tokenizer),
)

print("\nthe wrong ones in numbers, token by token, a line a step")
for (prompt, text), outcome, token in zip(shown, outcomes, responses(rewards.token, sequences), strict=True):
    if outcome == 0:
        print(f"{prompt.text}, right is {prompt.reference}")
        for line in re.finditer(r".+", text):
            numbers = token[line.start() : line.end()].tolist()
            print(f"  {line[0]:10}" + " ".join(f"{number:+.2f}" for number in numbers))
