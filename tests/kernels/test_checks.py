"""Bad input is refused by name: what it is, what was found, what is wanted."""

import socket

import numpy as np
import pytest
import torch

from prime_kernels import (
    implicit_reward,
    linear_logprob,
    linear_ppo_loss,
    linear_prm_loss,
    linear_token_loss,
    ppo_clip_loss,
    prm_loss,
    set_workspace,
)  # fmt: skip
from tests.support.oracle import F32, make_inputs


def call(**changes):
    args = {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(11, 8),
        "targets": torch.zeros(2, 3, dtype=torch.int64),
    }
    args |= changes
    return linear_logprob(args.pop("hidden"), args.pop("weight"), args.pop("targets"), **args)


CASES = [
    ({"hidden": [1.0]}, TypeError, r"hidden must be a tensor, got list"),
    ({"hidden": torch.ones(2, 3, 8).long()}, TypeError, r"hidden must be float32, .* got torch.int64"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have shape \[\.\.\., D\], got a scalar"),
    ({"weight": torch.ones(11, 7)}, ValueError, r"weight must .* \[V, 8\] for hidden \[2, 3, 8\], got \[11, 7\]"),
    ({"weight": torch.ones(8)}, ValueError, r"weight must have shape \[V, 8\]"),
    ({"weight": torch.ones(0, 8)}, ValueError, r"weight must have at least one row, got \[0, 8\]"),
    ({"weight": torch.ones(11, 8).half()}, TypeError, r"weight must have hidden's dtype .*float32, got torch.float16"),
    ({"weight": torch.ones(11, 8, device="meta")}, ValueError, r"weight must be on hidden's device cpu, got meta"),
    ({"targets": torch.zeros(3, 2).long()}, ValueError, r"targets must have .* shape \[2, 3\], got \[3, 2\]"),
    ({"targets": torch.zeros(2, 3).int()}, TypeError, r"targets must be int64, got torch.int32"),
    ({"targets": torch.full((2, 3), 11)}, ValueError, r"targets must be in \[0, 11\) or .*, got 11 at token 0"),
    ({"targets": torch.full((2, 3), -1)}, ValueError, r"targets must be .* got -1 at token 0 \(6 such tokens\)"),
    ({"bias": torch.ones(10)}, ValueError, r"bias must have shape \[11\], got \[10\]"),
    ({"bias": torch.ones(11).double()}, TypeError, r"bias must have weight's dtype torch.float32, got torch.float64"),
    ({"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0.0"),
    ({"temperature": -1}, ValueError, r"temperature must be > 0, got -1"),
    ({"temperature": "1"}, TypeError, r"temperature must be a float or a tensor, got str"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must .* shape \[2, 3\], got \[3\]"),
    ({"temperature": torch.ones(2, 3).long()}, TypeError, r"temperature must be a float or a floating"),
    ({"temperature": torch.tensor([[1.0, 1, 1], [1, 0, 1]])}, ValueError, r"temperature .* > 0, got 0.0 at token 4"),
    ({"temperature": torch.ones(2, 3, requires_grad=True)}, ValueError, r"temperature must not require grad"),
    ({"temperature": float("nan")}, ValueError, r"temperature must be > 0, got nan"),
    ({"temperature": float("inf")}, ValueError, r"temperature must be finite, got inf"),
    ({"temperature": 1e-40}, ValueError, r"temperature must be >= 1e-30, got 1e-40"),
    ({"temperature": True}, TypeError, r"temperature must be a float or a tensor, got bool"),
    ({"softcap": 0.0}, ValueError, r"softcap must be > 0 or None, got 0.0"),
    ({"softcap": float("nan")}, ValueError, r"softcap must be > 0 or None, got nan"),
    ({"softcap": True}, TypeError, r"softcap must be a number or None, got bool"),
    ({"softcap": "30"}, TypeError, r"softcap must be a number or None, got str"),
    ({"softcap": torch.tensor(30.0)}, TypeError, r"softcap must be a number or None, got Tensor"),
    ({"ignore_index": None}, TypeError, r"ignore_index must be an integer, got NoneType"),
    ({"ignore_index": -100.0}, TypeError, r"ignore_index must be an integer, got float"),
    ({"vocab_group": "tp"}, TypeError, r"vocab_group must be a ProcessGroup or None, got str"),
    ({"ignore_index": 1 << 70}, ValueError, r"ignore_index must be an integer of 64 bits, got 1180591620717411303424"),
    ({"temperature": 10**400}, ValueError, r"temperature must be finite, got 1000"),
    ({"temperature": 1e39}, ValueError, r"temperature must be finite, got 1e\+39, which float32 cannot hold"),
    (
        {"temperature": torch.tensor([[1, 1, 1], [1, torch.inf, 1]])},
        ValueError,
        r"temperature .* finite, got inf at token 4",
    ),
    ({"entropy": torch.ones(2, 3)}, TypeError, r"entropy must be True or False, got Tensor"),
    ({"entropy": "yes"}, TypeError, r"entropy must be True or False, got str"),
    ({"backend": torch.ones(2)}, TypeError, r"backend must be a string, got Tensor"),
    ({"backend": None}, TypeError, r"backend must be a string, got NoneType"),
    ({"weight": torch.ones(11, 8).to_sparse()}, TypeError, r"weight must be a strided tensor, got .* torch.sparse_coo"),
    ({"weight": None}, TypeError, r"weight must be a tensor, got NoneType"),
    ({"targets": None}, TypeError, r"targets must be a tensor, got NoneType"),
    ({"bias": 0.0}, TypeError, r"bias must be a tensor, got float"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of"),
    ({"backend": "fused"}, ValueError, r"backend='fused' takes hidden of bfloat16 or float16, got torch.float32"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_bad_input_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


TOKENS, BOUNDS = torch.full((6,), -1.0), torch.tensor([0, 2, 6])
HIDDEN, WEIGHT, TARGETS = torch.randn(6, 8), torch.randn(11, 8), torch.zeros(6, dtype=torch.int64)
OF_TOKENS = [
    (lambda v: ppo_clip_loss(v, TOKENS, TOKENS, TOKENS), [0.0], r"logp must be a tensor, got list"),
    (lambda v: ppo_clip_loss(TOKENS, v, TOKENS, TOKENS), None, r"old_logp must be a tensor, got NoneType"),
    (lambda v: ppo_clip_loss(TOKENS, TOKENS, TOKENS, v), 1.0, r"token_weight must be a tensor, got float"),
    (lambda v: ppo_clip_loss(TOKENS, TOKENS, TOKENS, TOKENS, clip_low=v), "0.2", r"clip_low must be a number, got str"),
    (lambda v: ppo_clip_loss(TOKENS, TOKENS, TOKENS, TOKENS, dual_clip=v), True, r"dual_clip must be a number or None"),
    (lambda v: ppo_clip_loss(TOKENS.long(), TOKENS, TOKENS, TOKENS), None, r"logp must be float32, .* torch.int64"),
    (lambda v: linear_ppo_loss(HIDDEN, WEIGHT, TARGETS, v, TOKENS, TOKENS), None, r"old_logp must be a tensor, got"),
    (lambda v: linear_ppo_loss(HIDDEN, WEIGHT, TARGETS, TOKENS, TOKENS, TOKENS, importance=v), 1.0, r"importance must"),
    (
        lambda v: linear_token_loss(HIDDEN, WEIGHT, TARGETS, lambda lp, e, x: x, (v,)),
        2.0,
        r"inputs\[0\] must be a tensor",
    ),
    (lambda v: linear_token_loss(HIDDEN, WEIGHT, TARGETS, v), None, r"loss_fn must be a function, got NoneType"),
    (lambda v: linear_token_loss(HIDDEN, WEIGHT, TARGETS, lambda lp, _: v * lp), 1j, r"loss that loss_fn returns must"),
    (
        lambda v: linear_token_loss(HIDDEN, WEIGHT, TARGETS, torch.add, v),
        TOKENS,
        r"inputs must be a sequence of tensors",
    ),
    (lambda v: linear_token_loss(HIDDEN, WEIGHT, TARGETS, torch.add, v), None, r"inputs must be a sequence of tensors"),
    (lambda v: prm_loss(TOKENS, TOKENS, BOUNDS, torch.ones(2), kind=v), TOKENS, r"kind must be a string, got Tensor"),
    (lambda v: implicit_reward(TOKENS, TOKENS, granularity=v), None, r"granularity must be a string, got NoneType"),
    (lambda v: ppo_clip_loss(TOKENS, v, TOKENS, TOKENS), TOKENS.to_sparse(), r"old_logp must be a strided tensor"),
    (lambda v: prm_loss(v, TOKENS, BOUNDS, torch.ones(2)), [0.0], r"prm_logp must be a tensor, got list"),
    (lambda v: prm_loss(TOKENS, TOKENS, v, torch.ones(2)), [0, 2, 6], r"cu_seqlens must be a tensor, got list"),
    (lambda v: prm_loss(TOKENS, TOKENS, BOUNDS, v), [1.0, 0.0], r"outcomes must be a tensor, got list"),
    (
        lambda v: prm_loss(TOKENS, TOKENS, BOUNDS, torch.ones(2), kind="dpo", group_ids=v),
        [0, 0],
        r"group_ids must be a",
    ),
    (lambda v: implicit_reward(TOKENS, v), None, r"ref_logp must be a tensor, got NoneType"),
    (lambda v: implicit_reward(TOKENS, TOKENS, beta=v), torch.tensor(1.0), r"beta must be a number, got Tensor"),
]


@pytest.mark.parametrize(("call", "value", "message"), OF_TOKENS)
def test_what_is_no_tensor_or_no_number_is_refused_by_name(call, value, message):
    with pytest.raises(TypeError, match=message):
        call(value)


ROWS = torch.full((6,), 0.5)
HEAD = {
    "hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "bias": None, "temperature": 1.0, "softcap": None,
    "ignore_index": -100, "backend": "auto",
}  # fmt: skip
OF_PPO = {
    "old_logp": ROWS, "advantages": ROWS, "token_weight": ROWS, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None,
    "entropy_coef": 0.0, "kl_coef": 0.0, "ref_logp": ROWS, "importance": ROWS,
}  # fmt: skip
OF_PRM = {
    "ref_logp": ROWS, "cu_seqlens": BOUNDS, "outcomes": torch.tensor([1.0, 0.0]), "beta": 0.05, "mask": ROWS,
    "kind": "dpo", "group_ids": torch.zeros(2, dtype=torch.int64),
}  # fmt: skip


def with_input(**arguments):
    """linear_token_loss by the name that its one input has in messages."""
    return linear_token_loss(HIDDEN, WEIGHT, TARGETS, lambda logp, *_: -logp, (arguments["inputs[0]"],))


EVERY_OP = [
    (with_input, {"inputs[0]": ROWS}),
    (linear_logprob, {**HEAD, "entropy": False, "vocab_group": None}),
    (linear_token_loss, {**HEAD, "loss_fn": lambda logp, *_: -logp, "inputs": (ROWS,), "entropy": False}),
    (linear_ppo_loss, {**HEAD, **OF_PPO}),
    (linear_prm_loss, {**HEAD, **OF_PRM}),
    (ppo_clip_loss, {"logp": ROWS, **OF_PPO, "entropy": ROWS, "backend": "auto"}),
    (prm_loss, {"prm_logp": ROWS, **OF_PRM, "backend": "auto"}),
    (
        implicit_reward,
        {
            "prm_logp": ROWS, "ref_logp": ROWS, "beta": 0.05, "mask": ROWS, "cu_seqlens": BOUNDS,
            "granularity": "step", "step_ends": ROWS > 0, "backend": "auto",
        },
    ),
]  # fmt: skip
ANYTHING = [
    None, True, 0, -1.0, 3, 2.5, float("nan"), float("inf"), 10**30, -(2**70), "x", "fused", b"auto", [1.0, 2.0],
    (ROWS,), {}, range(3), slice(0, 1), object(), lambda *_: 1, torch.float32, np.ones(6), np.float64(0.5),
    np.array(3), torch.tensor(1.0), torch.ones(0), torch.ones(7), torch.ones(2, 3), ROWS > 0, ROWS.int(),
    ROWS.half(), ROWS.to(torch.complex64), ROWS.to(torch.float8_e4m3fn), ROWS.to_sparse(), ROWS.to("meta"),
    torch.nn.Parameter(ROWS), torch.nested.nested_tensor([ROWS]), 1e39,
    torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("op", "arguments"), EVERY_OP, ids=lambda value: getattr(value, "__name__", ""))
def test_whatever_is_given_for_an_argument_is_served_or_refused_by_its_name_in_a_line(op, arguments):
    op(**arguments)
    for name in arguments:
        for value in ANYTHING:
            try:
                op(**{**arguments, name: value})
            except (TypeError, ValueError) as error:
                message = str(error)
            else:
                message = name
            assert name in message
            assert "\n" not in message


@pytest.mark.parametrize("outcomes", [[2.0, 0.0], [0.5, -0.1], [float("nan"), 1.0], [float("inf"), 0.0]])
@pytest.mark.parametrize("kind", ["ce", "dpo"])
def test_outcomes_outside_0_and_1_are_refused(outcomes, kind):
    options = {"kind": kind, "group_ids": torch.zeros(2)}
    for op, args in ((prm_loss, (TOKENS, TOKENS)), (linear_prm_loss, (HIDDEN, WEIGHT, TARGETS, TOKENS))):
        with pytest.raises(ValueError, match=r"outcomes must be in \[0, 1\], got \S+ of sequence [01]"):
            op(*args, BOUNDS, torch.tensor(outcomes), **options)


def test_numbers_of_numpy_are_numbers():
    half = linear_logprob(HIDDEN, WEIGHT, TARGETS, temperature=0.5, softcap=30.0).logp
    numpys = {"temperature": np.float32(0.5), "softcap": np.int64(30), "ignore_index": np.int64(-100)}
    assert torch.equal(linear_logprob(HIDDEN, WEIGHT, TARGETS, **numpys).logp, half)
    options = {"clip_low": np.float32(0.5), "dual_clip": np.float64(3), "entropy_coef": np.float32(0)}
    args = (HIDDEN, WEIGHT, TARGETS, TOKENS, TOKENS, TOKENS)
    want = linear_ppo_loss(*args, clip_low=0.5, dual_clip=3.0).loss
    assert torch.equal(linear_ppo_loss(*args, **options).loss, want)
    assert torch.equal(implicit_reward(TOKENS, 2 * TOKENS, beta=np.float32(0.5)), torch.full((6,), 0.5))


@pytest.mark.parametrize("softcap", [float("inf"), 1e300, 1e38, 1e30])
def test_a_softcap_beyond_every_logit_is_none(softcap):
    want = linear_logprob(HIDDEN, WEIGHT, TARGETS, entropy=True)
    got = linear_logprob(HIDDEN, WEIGHT, TARGETS, entropy=True, softcap=softcap)
    assert torch.equal(got.logp, want.logp)
    assert torch.equal(got.entropy, want.entropy)


def test_ignored_targets_need_not_be_in_range():
    assert call(targets=torch.full((2, 3), 99), ignore_index=99).logp.eq(0).all()


def test_a_workspace_of_numpys_is_one():
    set_workspace(np.int64(1 << 20))
    set_workspace(None)


@pytest.mark.parametrize("nbytes", [0, -1, 1.5, "1", True])
def test_workspace_must_be_a_positive_number_of_bytes(nbytes):
    with pytest.raises(ValueError, match="nbytes must be a positive number of bytes or None"):
        set_workspace(nbytes)


def test_a_call_that_no_tile_of_the_workspace_fits_says_what_would():
    set_workspace(100)
    with pytest.raises(
        ValueError, match=r"a workspace of 100 bytes is too small .* set_workspace needs at least \d+ bytes"
    ):
        call()


def test_a_dtensor_weight_is_refused_with_the_way_out():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.randn(11, 8), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"weight must be a plain tensor, got a DTensor \[11, 8\]: under FSDP2"):
            call(weight=weight)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan])
def test_the_temperature_of_an_ignored_token_is_not_looked_at(value):
    x = make_inputs(5, 8, 9, F32, "cpu")
    x.targets[2] = -100
    temperature = torch.ones(5)
    temperature[2] = value
    logp = linear_logprob(x.hidden, x.weight, x.targets, temperature=temperature).logp
    assert logp.isfinite().all()
    assert logp[2] == 0
    temperature[3] = value
    with pytest.raises(ValueError, match=r"temperature must be > 0, got .* at token 3"):
        linear_logprob(x.hidden, x.weight, x.targets, temperature=temperature)


@pytest.mark.gpu
def test_targets_are_checked_on_cuda_where_asked_for(monkeypatch):
    monkeypatch.setenv("PRIME_KERNELS_CHECK", "1")
    args = (
        torch.randn(4, 8, device="cuda"),
        torch.randn(11, 8, device="cuda"),
        torch.full((4,), 11, device="cuda"),
    )
    with pytest.raises(ValueError, match=r"targets must be in \[0, 11\)"):
        linear_logprob(*args)


@pytest.mark.gpu
def test_triton_on_cpu_tensors_needs_the_interpreter():
    with pytest.raises(ValueError, match=r"backend='triton' needs an NVIDIA GPU"):
        call(backend="triton")
