"""GRPO with a loss of one's own: a few lines of torch, one pass over the vocabulary.

    python examples/2_grpo.py

A prompt is a digit. The reward is the share of a response's digits that count on from the one before: 4 is best
answered by 5 6 7 8 … A tiny recurrent model samples a group of responses to each prompt, advantages are normalised
within the group, and `linear_token_loss` takes PPO's clipped ratio as a Python function on log-probs. It computes the
loss and the gradients of hidden states and head in the same pass, without [tokens, vocabulary] logits.
"""

import torch
from torch import Tensor, nn

from prime_kernels import linear_logprob, linear_token_loss

V, D, LENGTH = 10, 64, 12  # digits, hidden size, tokens of a response
PROMPTS, K = 16, 8  # a batch has K responses to each prompt
STEPS, EPOCHS, CLIP = 50, 2, 0.2

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # a model this small gains nothing from a second one
torch.manual_seed(0)


class Policy(nn.Module):
    """Digits to the hidden state after each of them; the head is apart, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.recurrent = nn.GRU(D, D, batch_first=True)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.recurrent(self.embedding(tokens), state)


def sample(policy: Policy, prompts: Tensor) -> Tensor:
    """[S, 1 + LENGTH]: prompts and what follows."""
    tokens, state = [prompts], None
    with torch.no_grad():
        for _ in range(LENGTH):
            hidden, state = policy(tokens[-1], state)
            tokens.append(torch.multinomial(policy.head(hidden[:, -1]).softmax(-1), 1))
    return torch.cat(tokens, 1)


def reward_of(sequences: Tensor) -> Tensor:
    """[S]: the share of tokens that count on."""
    return (sequences[:, 1:] == (sequences[:, :-1] + 1) % V).float().mean(1)


def grpo(logp: Tensor, entropy: Tensor | None, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """[n] losses of n tokens. All it knows of the vocabulary is the log-prob of each token."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


policy = Policy().to(device)
optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
for step in range(1, STEPS + 1):
    prompts = torch.randint(V, (PROMPTS, 1), device=device).repeat_interleave(K, 0)
    sequences = sample(policy, prompts)
    reward = reward_of(sequences)

    # How much better than the other responses to the same prompt, in standard deviations; the same for all its tokens.
    groups = reward.view(PROMPTS, K)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    advantage = advantage.view(-1, 1).expand(-1, LENGTH)

    inputs, targets = sequences[:, :-1], sequences[:, 1:]
    with torch.no_grad():
        old_logp = linear_logprob(policy(inputs)[0], policy.head.weight, targets).logp
    for _ in range(EPOCHS):
        hidden, _ = policy(inputs)
        out = linear_token_loss(hidden, policy.head.weight, targets, grpo, (old_logp, advantage))
        optimizer.zero_grad()
        (out.loss / targets.numel()).backward()  # the loss is a sum over tokens
        optimizer.step()

    if step == 1 or step % 10 == 0:
        ratio = (out.logp - old_logp).exp()
        clipped = ((ratio - 1).abs() > CLIP).float().mean()
        print(f"step {step:2}  reward {reward.mean():.3f}  ratio within {ratio.min():.2f} … {ratio.max():.2f}, "
              f"{clipped:.0%} clipped")  # fmt: skip

for sequence in sample(policy, torch.tensor([[1], [4], [7]], device=device)):
    prompt, *response = sequence.tolist()
    print(f"prompt {prompt}  response {' '.join(map(str, response))}")
