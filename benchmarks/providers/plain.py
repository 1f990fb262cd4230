"""What one writes in torch: full logits, the same compiled, the same in checkpointed chunks, and torch's own op."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import ALL_OPS, Case
from benchmarks.inputs import BETA, Inputs
from benchmarks.providers.provider import Fn, Provider
from benchmarks.providers.wheels import Unavailable

CHUNK = 1024  # tokens; prime-rl's choice


def _logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As most trainers compute them: logits in the model's dtype, softmax in fp32."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)


def _logp_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def _ppo(x: Inputs, logp: Tensor) -> Tensor:
    ratio, advantages = torch.exp(logp - x.old_logp), x.token_advantages
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()


def _prm(x: Inputs, logp: Tensor) -> Tensor:
    # Sequences are of equal length here, which makes their sums a reshape.
    logits = BETA * (logp - x.old_logp).view(x.S, -1).sum(1)
    return F.binary_cross_entropy_with_logits(logits, x.outcomes)


LOSSES: dict[str, Callable[[Inputs, Tensor], Tensor]] = {"ppo": _ppo, "prm": _prm}


def _eager(op: str, x: Inputs) -> tuple[Tensor, ...]:
    if op == "entropy":
        return _logp_and_entropy(x.hidden, x.weight, x.targets)
    if op == "ce":
        return (F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.targets),)
    logp = _logp(x.hidden, x.weight, x.targets)
    return (LOSSES[op](x, logp) if op in LOSSES else logp,)


def _chunked(op: str, x: Inputs) -> tuple[Tensor, ...]:
    """Log-probs a chunk of tokens at a time; each chunk's logits are computed again in its backward."""
    parts = zip(x.hidden.split(CHUNK), x.targets.split(CHUNK), strict=True)
    logp = torch.cat([checkpoint(_logp, h, x.weight, t, use_reentrant=False) for h, t in parts])
    if op == "ce":
        return (-logp.mean(),)
    return (LOSSES[op](x, logp) if op in LOSSES else logp,)


def _build_torch_op(case: Case, device: torch.device) -> Fn:
    op = getattr(F, "linear_cross_entropy", None)
    if op is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: (op(x.hidden, x.weight, x.targets, options=options),)


PROVIDERS = (
    Provider(name="eager", what="full logits, fp32 softmax, autograd", ops=ALL_OPS,
             build=lambda case, device: partial(_eager, case.op)),
    Provider(name="compile", what="the same under torch.compile", ops=ALL_OPS,
             build=lambda case, device: torch.compile(partial(_eager, case.op))),
    Provider(name="chunked-eager", what=f"{CHUNK} tokens at a time, checkpointed",
             ops=("forward", "logprob", "frozen", "ce", "ppo", "prm"),
             build=lambda case, device: partial(_chunked, case.op)),
    Provider(name="torch-lce", what="torch.nn.functional.linear_cross_entropy, chunked", ops=("ce",),
             build=_build_torch_op),
)  # fmt: skip
