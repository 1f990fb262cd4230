"""LogProbHead: a linear layer as ever, and inside FSDP2, checkpointing and compiled models."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from prime_kernels import LogProbHead, linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss
from tests.support.oracle import BF16, F32, make_inputs
from tests.support.processes import run_ranks

V, D, N = 61, 16, 12


class Model(nn.Module):
    """An embedding, one layer, and the head."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = LogProbHead(D, V)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / 4)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(self.embedding(tokens)))

    def forward(self, tokens: torch.Tensor, which: str) -> torch.Tensor:
        hidden, targets = self.hidden(tokens[:-1]), tokens[1:]
        n = len(targets)
        ones = torch.ones(n)
        if which == "logprob":
            return -self.head(hidden, targets).logp.sum()
        if which == "token":
            return self.head.token_loss(hidden, targets, lambda logp, entropy, w: -w * logp, (ones,)).loss
        if which == "ppo":
            return self.head.ppo_loss(hidden, targets, -4 * ones, ones, ones, clip_high=5.0).loss
        return self.head.prm_loss(hidden, targets, -4 * ones, torch.tensor([0, n]), torch.tensor([1.0])).loss * n


WHICH = ["logprob", "token", "ppo", "prm"]


def batch(rank: int) -> torch.Tensor:
    return torch.randint(V, (N + 1,), generator=torch.Generator().manual_seed(100 + rank))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    full = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in full.items() if g is not None}


def test_it_is_the_ops_with_its_own_weight():
    x = make_inputs(N, D, V, F32, "cpu", bias=True)
    head = LogProbHead(D, V)
    args, ones = (x.hidden, head.weight, x.targets), torch.ones(N)
    options: dict[str, Any] = {"bias": head.bias, "temperature": 0.8}
    assert torch.equal(head(x.hidden), nn.functional.linear(x.hidden, head.weight, head.bias))
    out = head(x.hidden, x.targets, temperature=0.8, entropy=True)
    want = linear_logprob(*args, entropy=True, **options)
    assert torch.equal(out.logp, want.logp)
    assert torch.equal(out.entropy, want.entropy)
    ppo = head.ppo_loss(x.hidden, x.targets, -ones, ones, ones, temperature=0.8)
    assert torch.equal(ppo.loss, linear_ppo_loss(*args, -ones, ones, ones, **options).loss)
    bounds, outcomes = torch.tensor([0, 5, N]), torch.tensor([1.0, 0.0])
    prm = head.prm_loss(x.hidden, x.targets, -ones, bounds, outcomes, temperature=0.8)
    assert torch.equal(prm.loss, linear_prm_loss(*args, -ones, bounds, outcomes, **options).loss)
    fn = lambda logp, entropy: -logp  # noqa: E731
    token = head.token_loss(x.hidden, x.targets, fn, temperature=0.8)
    assert torch.equal(token.loss, linear_token_loss(*args, fn, **options).loss)


def test_state_dict_and_arguments_are_those_of_nn_linear():
    linear, head = nn.Linear(D, V, True, "cpu", F32), LogProbHead(D, V, True, "cpu", F32)
    head.load_state_dict(linear.state_dict())
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert torch.equal(head.weight, linear.weight)


class Cooler(LogProbHead):
    """A head with an option of its own."""

    def forward(self, hidden, targets=None, *args, **options):
        return super().forward(hidden, targets, *args, **{"temperature": 0.5, **options})


class Named(LogProbHead):
    """One that has the options by name."""

    def forward(self, hidden, targets=None, *, temperature=0.5, **options):
        return super().forward(hidden, targets, temperature=temperature, **options)


class Fixed(LogProbHead):
    """One that takes nothing besides."""

    def forward(self, hidden, targets, temperature=0.5):
        return super().forward(hidden, targets, temperature=temperature)


class Mixin:
    """A forward that comes from beside."""

    def forward(self, hidden, targets=None, *, temperature=0.5, **options):
        return super().forward(hidden, targets, temperature=temperature, **options)


class Mixed(Mixin, LogProbHead):  # type: ignore[misc]
    pass


def cool(_, args, options):
    return args, {**options, "temperature": 0.5}


def cool_by_name(_, args, options):
    return (), {"hidden": args[0], "targets": args[1], **options, "temperature": 0.5}


def patched_head(*sizes):
    head = LogProbHead(*sizes)
    inner = head.forward
    head.forward = lambda hidden, targets=None, temperature=0.5: inner(hidden, targets, temperature=temperature)
    return head


def hooked_head(hook):
    def of(*sizes):
        head = LogProbHead(*sizes)
        head.register_forward_pre_hook(hook, with_kwargs=True)
        return head

    return of


HOOKED = [hooked_head(cool), hooked_head(cool_by_name)]


@pytest.mark.parametrize("kind", [Cooler, Named, Fixed, Mixed, patched_head, *HOOKED])
def test_an_option_that_a_subclass_or_a_hook_adds_counts(kind):
    x = make_inputs(N, D, V, F32, "cpu")
    head = kind(D, V)
    want = linear_logprob(x.hidden, head.weight, x.targets, bias=head.bias, temperature=0.5).logp
    assert torch.equal(head(x.hidden, x.targets).logp, want)
    if kind not in HOOKED:
        warm = linear_logprob(x.hidden, head.weight, x.targets, bias=head.bias, temperature=2.0).logp
        assert torch.equal(head(x.hidden, x.targets, temperature=2.0).logp, warm)


@pytest.mark.parametrize("kind", [Cooler, Named])
def test_an_option_of_a_subclass_counts_in_the_losses_too(kind):
    x, ones = make_inputs(N, D, V, F32, "cpu"), torch.ones(N)
    head, bounds = kind(D, V), torch.tensor([0, 5, N])
    args, options = (x.hidden, head.weight, x.targets), {"bias": head.bias, "temperature": 0.5}
    given, fn = (-ones, ones, ones), lambda logp, entropy, a: -a * logp
    found = [
        head.ppo_loss(x.hidden, x.targets, *given).loss,
        head.prm_loss(x.hidden, x.targets, -ones, bounds, ones[:2]).loss,
        head.token_loss(x.hidden, x.targets, fn, (ones,)).loss,
    ]
    want = [
        linear_ppo_loss(*args, *given, **options).loss,
        linear_prm_loss(*args, -ones, bounds, ones[:2], **options).loss,
        linear_token_loss(*args, fn, (ones,), **options).loss,
    ]
    assert torch.equal(torch.stack(found), torch.stack(want))


def test_logits_come_by_the_name_that_nn_linear_gives_its_input():
    x, head = make_inputs(N, D, V, F32, "cpu"), LogProbHead(D, V)
    assert torch.equal(head(input=x.hidden), head(x.hidden))


@pytest.mark.parametrize("which", WHICH)
def test_tied_embedding_gets_the_gradients_of_both_uses(which):
    tied, untied = Model(), Model()
    tied.head.weight = tied.embedding.weight
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
        untied.head.bias.copy_(tied.head.bias)
    tied(batch(0), which).backward()
    untied(batch(0), which).backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)


@pytest.mark.parametrize("which", WHICH)
def test_gradients_accumulate_over_micro_batches_some_without_valid_tokens(which):
    model, apart = Model(), [Model(), Model()]
    ignored = torch.full((N,), -100)
    model(batch(0), which).backward()
    (model.head(model.hidden(batch(2)[:-1]), ignored).logp.sum() * 0.5).backward()
    model.head.token_loss(model.hidden(batch(2)[:-1]), ignored, lambda logp, entropy: -logp).loss.backward()
    model(batch(1), which).backward()
    for rank, other in enumerate(apart):
        other(batch(rank), which).backward()
    for name, p in model.named_parameters():
        want = dict(apart[0].named_parameters())[name].grad + dict(apart[1].named_parameters())[name].grad
        torch.testing.assert_close(p.grad, want)


@pytest.mark.parametrize("which", WHICH)
def test_activation_checkpointing_gives_the_same_gradients(which):
    plain, checkpointed = Model(), Model()
    plain(batch(0), which).backward()
    torch.utils.checkpoint.checkpoint(checkpointed, batch(0), which, use_reentrant=False).backward()
    for a, b in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_works_inside_a_compiled_model():
    plain, compiled = Model(), Model()
    plain(batch(0), "ppo").backward()
    torch.compile(compiled, fullgraph=True)(batch(0), "ppo").backward()
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def in_mixed_precision() -> list[str]:
    """What a head under FSDP2's default mixed precision gets wrong."""
    dist.init_process_group("gloo")
    try:
        head = LogProbHead(D, V)
        weight, bias = (t.detach().to(BF16) for t in (head.weight, head.bias))
        x = make_inputs(48, D, V, BF16, "cpu", scale=8.0)
        hidden, targets = x.hidden.view(4, 12, D), x.targets.view(4, 12)
        # None of these is a number of bf16.
        rows = [t.view(4, 12) for t in (x.dlogp - 5.1, x.dlogp, x.dentropy.abs())]
        taus, bounds, y = rows[2] + 0.3, torch.tensor([0, 20, 48]), torch.tensor([0.3, 1.0])
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        fn = lambda logp, _, a: -a * logp  # noqa: E731
        given = (hidden, weight, targets)
        flat = (x.hidden, x.targets, rows[0].view(-1), bounds, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # FSDP2 warns of results that are views
            found = {
                "logprob": (head(hidden, targets, temperature=taus).logp,
                            linear_logprob(*given, bias=bias, temperature=taus).logp),
                "token": (head.token_loss(hidden, targets, fn, (rows[1],), temperature=taus).loss,
                          linear_token_loss(*given, fn, (rows[1],), bias=bias, temperature=taus).loss),
                "ppo": (head.ppo_loss(hidden, targets, *rows, ref_logp=rows[0] + 0.1, kl_coef=0.1).loss,
                        linear_ppo_loss(*given, *rows, ref_logp=rows[0] + 0.1, kl_coef=0.1, bias=bias).loss),
                "importance": (head.ppo_loss(hidden, targets, *rows, importance=rows[2]).loss,
                               linear_ppo_loss(*given, *rows, importance=rows[2], bias=bias).loss),
                "prm": (head.prm_loss(*flat, mask=rows[2].view(-1)).reward,
                        linear_prm_loss(x.hidden, weight, *flat[1:], mask=rows[2].view(-1), bias=bias).reward),
            }  # fmt: skip
        wrong = [name for name, (ours, want) in found.items() if not torch.equal(ours, want)]
        model = nn.Sequential(head)
        try:
            model[0] = nn.Linear(D, V)
            wrong.append("a sharded head was replaced")
        except TypeError as error:
            wrong += [] if "before fully_shard" in str(error) else [str(error)]
        return wrong
    finally:
        dist.destroy_process_group()


def test_default_mixed_precision_of_fsdp2_rounds_no_argument():
    assert run_ranks(1, in_mixed_precision) == [[]]


def sharded_gradients() -> dict[str, dict[str, torch.Tensor]]:
    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        found = {}
        for which in WHICH:
            model = Model()
            for module in (model.layer, model.head, model):
                fully_shard(module, mesh=mesh)
            model(batch(dist.get_rank()), which).backward()
            found[which] = gradients(model)
        return found
    finally:
        dist.destroy_process_group()


def test_gradients_under_fsdp2_on_two_processes_equal_those_of_one():
    ranks = run_ranks(2, sharded_gradients)
    for which in WHICH:
        model = Model()
        # FSDP averages over ranks.
        (sum(model(batch(rank), which) for rank in range(2)) / 2).backward()
        want = gradients(model)
        for found in ranks:
            assert found[which].keys() == want.keys()
            for name in want:
                torch.testing.assert_close(found[which][name], want[name])
