"""Log-probs, entropies and their gradients from hidden states, in a plain torch loop.

    python examples/1_log_probs.py

A tiny model learns which token follows which. Its loss needs the log-prob of each target and the entropy of each
distribution. `linear_logprob` gives both from hidden states and the head's weight, in tiles: the [tokens, vocabulary]
logits are never whole in memory. Then the same loss is taken over the same bf16 weights in fp64, through
`log_softmax` of full logits, and through `linear_logprob`: how far are the last two from fp64?
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prime_kernels import linear_logprob

N, D, V = 512, 64, 8192  # tokens, hidden size, vocabulary
STEPS, LR, ENTROPY_COEF = 9, 0.02, 0.01
Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
backbone = nn.Embedding(V, D, device=device)  # your transformer, without its head
head = nn.Linear(D, V, bias=False, device=device)
optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=LR)
tokens = torch.randint(V, (N,), device=device)
targets = (tokens * 31 + 7) % V

# 1. A training loop. Nothing but the line that makes `out` differs from one with full logits.
print(f"{N} tokens, hidden size {D}, vocabulary {V}, on {device}")
for step in range(1, STEPS + 1):
    out = linear_logprob(backbone(tokens), head.weight, targets, entropy=True)
    assert out.entropy is not None  # it was asked for
    loss = -(out.logp + ENTROPY_COEF * out.entropy).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 2:
        print(f"step {step}  log-prob {out.logp.mean():7.3f}  entropy {out.entropy.mean():6.3f} nats")


# 2. The same loss in four ways, from the same numbers: weights and hidden states rounded to bf16.
def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = linear_logprob(hidden, weight, targets, entropy=True)
    assert out.entropy is not None
    return out.logp, out.entropy


def full(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logp = linear(hidden, weight).log_softmax(-1)  # [N, V]
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def full_then_fp32(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logp = linear(hidden, weight).float().log_softmax(-1)  # the logits were rounded to bf16 all the same
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def measured(way: Way, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients, in fp64."""
    hidden = backbone(tokens).detach().bfloat16().to(dtype).requires_grad_()
    weight = head.weight.detach().bfloat16().to(dtype).requires_grad_()
    logp, entropy = way(hidden, weight)
    dh, dw = torch.autograd.grad(-(logp + ENTROPY_COEF * entropy).mean(), (hidden, weight))
    found = {"log-prob": logp, "entropy": entropy, "gradient of hidden": dh, "gradient of weight": dw}
    return {name: value.detach().double() for name, value in found.items()}


exact = measured(full, torch.float64)
ways = {"full logits": full, "made fp32": full_then_fp32, "linear_logprob": fused}
found = {name: measured(way, torch.bfloat16) for name, way in ways.items()}
print("\nrelative error against fp64, from bf16 hidden states and weight")
print(f"{'':20}" + "".join(f"{name:>16}" for name in ways))
for result, right in exact.items():
    errors = (float((found[name][result] - right).norm() / right.norm()) for name in ways)
    print(f"{result:20}" + "".join(f"{error:16.1e}" for error in errors))


# 3. What was never there. Sizes computed from shapes: nothing is measured here.
print("\nfull logits and their gradient, in bf16, would take")
for n, v, where in ((N, V, "here"), (16384, 151936, "with 16,384 tokens and Qwen2.5's vocabulary")):
    print(f"{2 * 2 * n * v / 2**20:8,.0f} MiB {where}")
