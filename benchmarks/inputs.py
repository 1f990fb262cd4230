"""What the ops are run on, and what they should answer: random heads that look trained, and an oracle in fp64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from prime_kernels import reference

BETA = 0.05
ORACLE_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A head and a batch of N tokens in S sequences of equal length."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    upstream: Tensor  # [N] gradient of a loss with respect to each log-prob
    old_logp: Tensor  # [N] the behaviour policy's log-probs; the reference's for the PRM
    advantages: Tensor  # [S] one a sequence, as GRPO has them
    outcomes: Tensor  # [S] 0 or 1
    cu_seqlens: Tensor  # [S + 1] on the host

    @property
    def N(self) -> int:
        return len(self.targets)

    @property
    def S(self) -> int:
        return len(self.outcomes)

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(self.N // self.S)

    @property
    def token_weight(self) -> Tensor:
        return torch.full_like(self.old_logp, 1 / self.N)

    def trained(self, names: tuple[str, ...]) -> "Inputs":
        """The same tensors, those named as leaves that want a gradient."""
        return replace(
            self,
            hidden=self.hidden.detach().requires_grad_("hidden" in names),
            weight=self.weight.detach().requires_grad_("weight" in names),
        )


def make_weight(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(case.V, case.D, dtype=case.torch_dtype, device=device)
    return weight.normal_(generator=generator)


def make_inputs(case: Case, weight: Tensor, seed: int) -> Inputs:
    """Tokens of which some are all but certain and some are not, as in a trained model.

    hidden = noise + lead·w_target/D with lead uniform in ln V − 4 … ln V + 8, so that the target's probability runs
    from a few per cent to nearly 1. Log-ratios to the old policy are within ±0.1 or at ±0.5: none stands at the edge
    of the clip range, where a rounding would decide which way its gradient goes.
    """
    N, D, V, device = case.N, case.D, case.V, weight.device
    g = torch.Generator(device).manual_seed(1 + seed)
    rand, randn = partial(torch.rand, generator=g, device=device), partial(torch.randn, generator=g, device=device)
    targets = torch.randint(V, (N,), generator=g, device=device)
    lead = math.log(V) - 4 + 12 * rand(N)
    chosen = weight[targets].float()
    hidden = (randn(N, D) / D**0.5 + chosen * (lead / D)[:, None]).to(case.torch_dtype)
    # The columns are normal and independent, so the other logits of a row are normal with variance ‖hidden‖².
    norm = hidden.float().square().sum(1)
    logit = (hidden.float() * chosen).sum(1)
    logp = logit - torch.logaddexp(logit, math.log(V) + norm / 2)
    far = rand(N) < 0.2
    log_ratio = torch.where(far, 0.5 * torch.sign(randn(N)), (0.05 * randn(N)).clamp(-0.1, 0.1))
    length = min(N, 512)
    S = N // length
    if S * length != N:
        raise ValueError(f"N must be a multiple of {length}, got {N}")
    return Inputs(
        hidden=hidden, weight=weight, targets=targets, upstream=randn(N) / N, old_logp=logp - log_ratio,
        advantages=randn(S), outcomes=rand(S).round(), cu_seqlens=torch.arange(0, N + 1, length),
    )  # fmt: skip


def ppo_of_logp(x: Inputs, logp: Tensor) -> Tensor:
    """The loss of op "ppo" on given log-probs, in their dtype."""
    rows = (t.to(logp.dtype) for t in (x.old_logp, x.token_advantages, x.token_weight))
    return reference.ppo_clip_loss(logp, *rows).loss


def prm_of_logp(x: Inputs, logp: Tensor) -> Tensor:
    """The loss of op "prm" on given log-probs, in their dtype."""
    return reference.prm_loss(logp, x.old_logp.to(logp.dtype), x.cu_seqlens, x.outcomes, beta=BETA).loss


# What is differentiated, as a function of log-probs; a result [N] comes with the gradient x.upstream.
LOSS_OF_LOGP: dict[str, Callable[[Inputs, Tensor], Tensor]] = {
    "ce": lambda x, logp: -logp.mean(),
    "ppo": ppo_of_logp,
    "prm": prm_of_logp,
}


def oracle(case: Case, x: Inputs) -> dict[str, Tensor]:
    """Every result and gradient of the op in fp64, a few tokens at a time; 8·N·D·V FLOP.

    Of 16-bit inputs they are kept in fp32, whose rounding is far below what is measured.
    """
    weight = x.weight.detach().double()
    rows = max(1, ORACLE_CHUNK_BYTES // (8 * case.V))
    chunks = [slice(i, i + rows) for i in range(0, case.N, rows)]
    logp, entropy = (torch.empty(case.N, dtype=torch.float64, device=weight.device) for _ in range(2))
    for at in chunks:
        log_p = torch.log_softmax(x.hidden[at].detach().double() @ weight.T, 1)
        logp[at] = log_p.gather(1, x.targets[at, None]).squeeze(1)
        if "entropy" in case.spec.results:
            entropy[at] = -(log_p.exp() * log_p).sum(1)
        del log_p
    results = {"logp": logp, "entropy": entropy}
    leaf = logp.clone().requires_grad_()
    if case.op in LOSS_OF_LOGP:
        loss = LOSS_OF_LOGP[case.op](x, leaf)
        (dlogp,) = torch.autograd.grad(loss, leaf)
        results["loss"] = loss.detach()
    else:
        dlogp = x.upstream.double()
    found = {name: results[name] for name in case.spec.results}
    if case.spec.trains:
        found |= _gradients(x, weight, dlogp, chunks, "weight" in case.spec.trains)
    kept = torch.float64 if case.dtype in ("float32", "float64") else torch.float32
    return {name: t.to(kept) for name, t in found.items()}


def _gradients(x: Inputs, weight: Tensor, dlogp: Tensor, chunks: list[slice], need_dw: bool) -> dict[str, Tensor]:
    """∂logp_i/∂z_iv = [v = target_i] − p_iv."""
    dhidden = torch.empty(x.hidden.shape, dtype=torch.float64, device=weight.device)
    dweight = torch.zeros_like(weight) if need_dw else None
    for at in chunks:
        hidden = x.hidden[at].detach().double()
        dlogits = torch.softmax(hidden @ weight.T, 1).mul_(-dlogp[at, None])
        dlogits.scatter_add_(1, x.targets[at, None], dlogp[at, None])
        dhidden[at] = dlogits @ weight
        if dweight is not None:
            dweight.addmm_(dlogits.T, hidden)
        del dlogits
    return {"dhidden": dhidden} if dweight is None else {"dhidden": dhidden, "dweight": dweight}


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64; infinite where got holds a NaN or an infinity."""
    squares = torch.zeros(2, dtype=torch.float64, device=want.device)
    block = 1 << 26
    for a, b in zip(got.detach().reshape(-1).split(block), want.reshape(-1).split(block), strict=True):
        squares[0] += (a.double() - b.double()).square().sum()
        squares[1] += b.double().square().sum()
    error = (squares[0] / squares[1]).sqrt().item()
    return error if math.isfinite(error) else math.inf
