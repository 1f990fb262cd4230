"""LogProbHead: a linear layer as ever, and inside FSDP2, checkpointing and compiled models."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prime_kernels import LogProbHead, linear_logprob, linear_ppo_loss, linear_prm_loss, linear_token_loss
from tests.support.oracle import F32, make_inputs
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


def test_state_dict_is_that_of_nn_linear():
    linear, head = nn.Linear(D, V), LogProbHead(D, V)
    head.load_state_dict(linear.state_dict())
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert torch.equal(head.weight, linear.weight)


def test_a_head_made_of_a_linear_layer_shares_its_parameters():
    linear = nn.Linear(D, V, bias=False)
    head = LogProbHead.from_linear(linear)
    assert head.weight is linear.weight
    assert head.bias is None
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (D, V)


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


def test_works_inside_a_compiled_model():
    plain, compiled = Model(), Model()
    plain(batch(0), "ppo").backward()
    torch.compile(compiled, fullgraph=True)(batch(0), "ppo").backward()
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


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
