"""This library, a provider for each of its strategies, and PPO in two passes for comparison."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import ALL_OPS, Case
from benchmarks.inputs import BETA, Inputs
from benchmarks.providers.provider import Fn, Provider
from benchmarks.providers.wheels import Unavailable
from prime_kernels import linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss, ppo_clip_loss
from prime_kernels.calls import strategy_for


def _per_token(x: Inputs, *, entropy: bool, backend: str) -> tuple[Tensor, ...]:
    out = linear_logprob(x.hidden, x.weight, x.targets, entropy=entropy, backend=backend)
    return (out.logp,) if out.entropy is None else (out.logp, out.entropy)


def _ce(x: Inputs, *, backend: str) -> tuple[Tensor, ...]:
    scale = -1 / x.N
    return (linear_token_loss(x.hidden, x.weight, x.targets, lambda logp, _: scale * logp, backend=backend).loss,)


def _ppo(x: Inputs, *, backend: str) -> tuple[Tensor, ...]:
    rows = x.old_logp, x.token_advantages, x.token_weight
    return (linear_ppo_loss(x.hidden, x.weight, x.targets, *rows, backend=backend).loss,)


def _ppo_two_passes(x: Inputs, *, backend: str) -> tuple[Tensor, ...]:
    logp = linear_logprob(x.hidden, x.weight, x.targets, backend=backend).logp
    return (ppo_clip_loss(logp, x.old_logp, x.token_advantages, x.token_weight).loss,)


def _prm(x: Inputs, *, backend: str) -> tuple[Tensor, ...]:
    rows = x.old_logp, x.cu_seqlens, x.outcomes
    return (linear_prm_loss(x.hidden, x.weight, x.targets, *rows, beta=BETA, backend=backend).loss,)


def _build(backend: str, case: Case, device: torch.device) -> Fn:
    try:
        strategy_for(torch.empty(0, dtype=case.torch_dtype, device=device), backend)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    if case.op in ("ce", "ppo", "prm"):
        return partial({"ce": _ce, "ppo": _ppo, "prm": _prm}[case.op], backend=backend)
    return partial(_per_token, entropy=case.op == "entropy", backend=backend)


def _build_two_passes(case: Case, device: torch.device) -> Fn:
    return partial(_ppo_two_passes, backend="auto")


PROVIDERS = (
    Provider(name="ours-chunked", what="prime_kernels, backend 'chunked': cuBLAS and Triton row kernels", ops=ALL_OPS,
             build=partial(_build, "chunked")),
    Provider(name="ours-fused", what="prime_kernels, backend 'fused': Triton GEMMs with an epilogue", ops=ALL_OPS,
             build=partial(_build, "fused")),
    Provider(name="ours-torch", what="prime_kernels, backend 'torch'", ops=ALL_OPS, build=partial(_build, "torch")),
    Provider(name="ours-two-pass", what="prime_kernels, linear_logprob and then ppo_clip_loss", ops=("ppo",),
             build=_build_two_passes),
)  # fmt: skip
