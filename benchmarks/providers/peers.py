"""Other libraries' kernels, each called as its authors call it."""

import os
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.providers import wheels
from benchmarks.providers.provider import Fn, Provider
from benchmarks.providers.wheels import Unavailable

TRL_COLUMNS = 32768  # vocabulary columns in one of TRL's tiles; its own setting


def _wants_gpu(device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("a Triton kernel, which runs on a GPU")


def _liger_ce(accumulate: torch.dtype | None, case: Case, device: torch.device) -> Fn:
    module = wheels.load("liger_kernel.ops.fused_linear_cross_entropy")
    _wants_gpu(device)
    op = module.LigerFusedLinearCrossEntropyFunction

    def run(x: Inputs) -> tuple[Tensor, ...]:
        # ..., bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss
        out = op.apply(x.hidden, x.weight, x.targets, None, None, -100, 0.0, 0.0, "mean", None, False, accumulate)
        return (out[0] if isinstance(out, tuple) else out,)

    return run


def _liger_scaled(case: Case, device: torch.device) -> Fn:
    module = wheels.load("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    op, entropy = module.LigerFusedLinearScaledCrossEntropyFunction, case.op == "entropy"

    def run(x: Inputs) -> tuple[Tensor, ...]:
        out = op.apply(x.hidden, x.weight, x.targets, return_entropy=entropy)
        return (-out[0], out[1]) if entropy else (-out,)

    return run


def _liger_grpo(case: Case, device: torch.device) -> Fn:
    loss = wheels.load("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss

    def run(x: Inputs) -> tuple[Tensor, ...]:
        # All sequences as one chunk: its kernels work in tiles of 2048 × 4096 within.
        op = loss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=x.S)
        shape = x.S, x.N // x.S
        rows = x.targets.view(shape), torch.ones(shape, device=x.targets.device), x.advantages
        out = op(x.hidden.view(*shape, -1), x.weight, *rows, old_per_token_logps=x.old_logp.view(shape))
        return (out[0],)

    return run


def _cce(filter_eps: str | None, case: Case, device: torch.device) -> Fn:
    op = wheels.load("cut_cross_entropy").linear_cross_entropy
    _wants_gpu(device)
    if case.op == "ce":
        return lambda x: (op(x.hidden, x.weight, x.targets, filter_eps=filter_eps),)
    return lambda x: (-op(x.hidden, x.weight, x.targets, filter_eps=filter_eps, reduction="none"),)


def _trl(case: Case, device: torch.device) -> Fn:
    op = wheels.trl_chunked_logprob()
    wanted = ("entropy",) if case.op == "entropy" else ()

    def run(x: Inputs) -> tuple[Tensor, ...]:
        out = op.apply(x.hidden, x.weight, None, x.targets, 1.0, TRL_COLUMNS, None, 1.0, wanted)
        return tuple(t for t in out if t is not None)

    return run


def _verl(case: Case, device: torch.device) -> Fn:
    op = wheels.verl_linear_cross_entropy()
    if device.type != "cuda":
        raise Unavailable("takes CUDA tensors alone")
    results = len(case.spec.results)
    return lambda x: op(x.hidden, x.weight, x.targets, 1.0, "none", None)[:results]


def _fla(case: Case, device: torch.device) -> Fn:
    op = wheels.fla_linear_cross_entropy()
    _wants_gpu(device)
    return lambda x: (op(x.hidden, x.targets, x.weight),)


PROVIDERS = (
    Provider(name="liger-ce", what="Liger fused linear cross-entropy", ops=("ce",), build=partial(_liger_ce, None)),
    Provider(name="liger-ce-fp32", what="the same with dW accumulated in fp32", ops=("ce",),
             build=partial(_liger_ce, torch.float32)),
    Provider(name="liger-scaled", what="Liger fused linear scaled cross-entropy",
             ops=("forward", "entropy", "logprob", "frozen"), build=_liger_scaled),
    Provider(name="liger-grpo", what="Liger fused linear GRPO", ops=("ppo",), build=_liger_grpo),
    Provider(name="cce", what="cut-cross-entropy, gradient filtering as by default",
             ops=("forward", "logprob", "frozen", "ce"), build=partial(_cce, "high")),
    Provider(name="cce-exact", what="cut-cross-entropy without filtering", ops=("logprob", "frozen", "ce"),
             build=partial(_cce, None)),
    Provider(name="trl", what="TRL's chunked log-prob head", ops=("forward", "entropy", "logprob", "frozen"),
             build=_trl),
    Provider(name="verl", what="verl's Triton linear cross-entropy", ops=("forward", "entropy", "logprob"),
             build=_verl),
    Provider(name="fla", what="flash-linear-attention's fused linear cross-entropy", ops=("ce",), build=_fla),
)  # fmt: skip
